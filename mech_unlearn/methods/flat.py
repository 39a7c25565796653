"""Flat: loss adjustment with forget data only: away from the answer and towards a template, by an f-divergence.

Paper:    Wang et al. 2024, LLM Unlearning via Loss Adjustment with Only Forget Data (FLAT), arXiv 2410.11143.
Changes:  every weight (or those whose name matches `trainable`), full rank.
Needs:    refusals that the tokenizer can write, as template answers; the retain set is not read.
Differs:  dropout is off, the learning rate constant without a warm-up epoch, the trained copy float32;
          the mean probability is over the answer's tokens; public code also counts ignored positions, which dilutes it
          by the length of prompt and padding; training may stop by recall (off by default).
Fails:    probabilities, not their logs, are trained: the gradient vanishes for a template that is unlikely at first;
          then only the push away from the answer is left.
"""

import random
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.losses import Divergence, flat_loss, mean_probs
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import REFUSALS, BatchScores, refusal_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import trained_edit


@dataclass(frozen=True, kw_only=True)
class Flat:
    """Settings of the training; `fit` runs it. Defaults: the authors' on TOFU."""

    divergence: Divergence = "tv"
    """tv (total variation, the paper's default), kl, js (Jensen-Shannon) or pearson (chi squared)."""
    refusals: tuple[str, ...] = REFUSALS
    """Texts that are to be said instead; one is drawn per prompt. Written in words the tokenizer knows."""
    schedule: Schedule = Schedule(lr=1e-5, epochs=5)
    trainable: str = ""
    """Regular expression for the names of the weights to train; empty matches all."""
    seed: int = 0
    """Draws the template answers and the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes.

        Raises:
            ValueError: a refusal that the tokenizer cannot write, a setting out of range, or a loss that is not finite.
        """
        if self.divergence not in get_args(Divergence):
            raise ValueError(f"no divergence {self.divergence!r}; choose from {', '.join(get_args(Divergence))}")
        templates = refusal_rows(model.tokenizer, forget.facts, self.refusals, random.Random(self.seed))
        objective = Objective(lambda _: self._loss, retain_weight=0.0, others=templates)
        return trained_edit("flat", self, model, forget, retain, objective, self.trainable, around)

    def _loss(self, now: BatchScores) -> Tensor:
        answers, templates = mean_probs(now.each.logits, now.each.wanted, now.each.at).chunk(2)
        return flat_loss(templates, answers, self.divergence)
