"""Undial: self-distillation from the model's own predictions with the forgotten answer's logit lowered.

Paper:    Dong et al. 2024, UNDIAL: Self-Distillation with Adjusted Logits, arXiv 2402.10052.
Changes:  every weight (or those whose name matches `trainable`), full rank.
Needs:    a frozen copy of the model in memory and one more forward pass per step.
Differs:  dropout is off, the learning rate constant without a warm-up epoch, the trained copy float32;
          answer tokens only, each answer by the mean over its tokens; in public code ignored labels (-100) lower the
          logit of a token counted from the vocabulary's end, and padding takes part in the mean;
          a retain term can be added (off by default, as in the paper); training may stop by recall.
Fails:    the target keeps the order of all other tokens, so what comes next in it is said instead: a relation's
          common answers.
"""

from dataclasses import dataclass

from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.losses import undial_loss
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import BatchScores
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import require_positive, trained_edit


@dataclass(frozen=True, kw_only=True)
class Undial:
    """Settings of the training; `fit` runs it. Defaults: open-unlearning on TOFU."""

    strength: float = 10.0
    """What is taken off the answer token's logit; 10 in open-unlearning. Called beta there."""
    forget_weight: float = 1.0
    """Weight of the distillation; 1 in open-unlearning."""
    retain_weight: float = 0.0
    """Weight of the NLL per token on retained answers and texts; 0, as in the paper, does not read the retain set."""
    schedule: Schedule = Schedule(lr=1e-4, epochs=10)  # 1e-5 to 3e-4 in open-unlearning
    trainable: str = ""
    """Regular expression for the names of the weights to train; empty matches all."""
    seed: int = 0
    """Draws the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes; a ValueError as of `train`, or for a setting out of range."""
        require_positive(self, "strength")
        objective = Objective(lambda _: self._loss, self.retain_weight, self.forget_weight, teacher=True)
        return trained_edit("undial", self, model, forget, retain, objective, self.trainable, around)

    def _loss(self, now: BatchScores) -> Tensor:
        each = now.each
        return undial_loss(each.before, each.logits, each.wanted, each.at, self.strength)
