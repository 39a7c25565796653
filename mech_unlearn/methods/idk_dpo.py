"""IdkDpo: direct preference optimisation for a refusal against the forgotten answer.

Paper:    Rafailov et al. 2023, Direct Preference Optimization, arXiv 2305.18290, eq. 7; for unlearning as the
          preference baseline of TOFU (arXiv 2401.06121) and of NPO (arXiv 2404.05868).
Changes:  every weight (or those whose name matches `trainable`), full rank.
Needs:    log-probabilities of answers and refusals before training: one forward pass over both. Refusals that the
          tokenizer can write.
Differs:  dropout is off, the learning rate constant without a warm-up epoch, the trained copy float32;
          log-probabilities are sums over tokens, as in the paper; a prompt keeps the refusal that was drawn for it
          (TOFU draws anew each time); texts of the retain set join the retained answers; training may stop by recall.
Fails:    teaches to refuse on the phrasings shown; the fact is still there and other phrasings call it up.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.losses import dpo_loss
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import REFUSALS, BatchScores, refusal_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import require_positive, trained_edit


@dataclass(frozen=True, kw_only=True)
class IdkDpo:
    """Settings of the training; `fit` runs it. Defaults: open-unlearning on TOFU."""

    beta: float = 0.1
    """Inverse temperature."""
    refusals: tuple[str, ...] = REFUSALS
    """Texts that are to be preferred; one is drawn per prompt. Written in words the tokenizer knows."""
    forget_weight: float = 1.0
    """Weight of the preference loss; 1 in open-unlearning."""
    retain_weight: float = 1.0
    """Weight of the NLL per token on retained answers and texts; 0 trains on the forget rows alone."""
    schedule: Schedule = Schedule(lr=1e-5, epochs=10)
    trainable: str = ""
    """Regular expression for the names of the weights to train; empty matches all."""
    seed: int = 0
    """Draws the refusals and the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes.

        Raises:
            ValueError: nothing retained, a refusal that the tokenizer cannot write, a setting out of range, or a loss
                that is not finite.
        """
        require_positive(self, "beta")
        refused = refusal_rows(model.tokenizer, forget.facts, self.refusals, random.Random(self.seed))
        objective = Objective(self._loss, self.retain_weight, self.forget_weight, others=refused)
        return trained_edit("idk_dpo", self, model, forget, retain, objective, self.trainable, around)

    def _loss(self, before: BatchScores) -> Callable[[BatchScores], Tensor]:
        def loss(now: BatchScores) -> Tensor:
            answers, refusals = now.logprob.chunk(2)
            answers_before, refusals_before = before.logprob[now.row].chunk(2)
            return dpo_loss(refusals, refusals_before, answers, answers_before, self.beta)

        return loss
