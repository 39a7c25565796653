"""GradDiff: gradient ascent on the forgotten answers with ordinary training on the retained ones.

Paper:    Liu, Liu and Stone 2022, Continual Learning and Private Unlearning, arXiv 2203.12817; as a baseline of TOFU,
          Maini et al. 2024, arXiv 2401.06121.
Changes:  every weight (or those whose name matches `trainable`), full rank.
Needs:    nothing beforehand.
Differs:  dropout is off, the learning rate constant without a warm-up epoch, the trained copy float32;
          texts of the retain set join the retained answers; training may stop by recall (off by default).
Fails:    the ascent is unbounded: once the answers are gone it still pushes, and the retain term has to hold.
"""

from dataclasses import dataclass

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.losses import ascent
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import trained_edit


@dataclass(frozen=True, kw_only=True)
class GradDiff:
    """Settings of the training; `fit` runs it. Defaults: as in open-unlearning on TOFU."""

    forget_weight: float = 1.0
    """Weight of the ascent; 1 in TOFU."""
    retain_weight: float = 1.0
    """Weight of the NLL per token on retained answers and texts; 0 is plain ascent."""
    schedule: Schedule = Schedule(lr=1e-5, epochs=10)
    trainable: str = ""
    """Regular expression for the names of the weights to train; empty matches all."""
    seed: int = 0
    """Draws the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes; a ValueError as of `train`, or for a setting out of range."""
        objective = Objective(lambda _: ascent, self.retain_weight, self.forget_weight)
        return trained_edit("grad_diff", self, model, forget, retain, objective, self.trainable, around)
