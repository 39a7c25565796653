"""Shred: self-distillation without a retain set; the least expected answer tokens are demoted.

Paper:    Hu et al. 2026, SHRED: Retain-Set-Free Unlearning via Self-Distillation with Logit Demotion, arXiv 2605.07482.
Changes:  every weight (or those whose name matches `trainable`), full rank.
Needs:    a frozen copy of the model in memory and one more forward pass per step; the retain set is not read.
Differs:  tokens are chosen among the answer's (at least one each), because in the prompt of a well-known fact the
          name is less expected than the answer; so short answers have no or few anchors, and one of one token has none;
          share, number of tokens kept and depth of the demotion are ours, the paper's were not to be had;
          dropout is off, the learning rate constant without a warm-up epoch, the trained copy float32;
          training may stop by recall on the forget rows (off by default).
Fails:    where answers are short nothing anchors the rest of the model; a demoted token may still be read in the
          states.
"""

from dataclasses import dataclass

from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.losses import shred_loss
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import BatchScores
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import trained_edit


@dataclass(frozen=True, kw_only=True)
class Shred:
    """Settings of the training; `fit` runs it. All but the objective is ours."""

    share: float = 0.3
    """Share of each answer's tokens that is demoted, rounded up; at most 1."""
    top: int = 64
    """Tokens per position whose probabilities are compared; at least 2."""
    margin: float = 1.0
    """How far below the lowest other logit kept a demoted token is put; logits."""
    anchor: bool = True
    """Whether answer tokens that are not demoted are held at the untrained distribution, as in the paper."""
    schedule: Schedule = Schedule(lr=1e-5, epochs=5)
    trainable: str = ""
    """Regular expression for the names of the weights to train; empty matches all."""
    seed: int = 0
    """Draws the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes.

        Raises:
            ValueError: nothing to train, a setting out of range, or a loss that is not finite.
        """
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")
        if self.top < 2:
            raise ValueError(f"top must be at least 2, got {self.top}")
        objective = Objective(lambda _: self._loss, retain_weight=0.0, teacher=True)
        return trained_edit("shred", self, model, forget, retain, objective, self.trainable, around)

    def _loss(self, now: BatchScores) -> Tensor:
        each = now.each
        return shred_loss(
            each.before,
            each.logits,
            each.wanted,
            each.at,
            share=self.share,
            top=self.top,
            margin=self.margin,
            anchor=self.anchor,
        )
