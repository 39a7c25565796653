"""KlMin: gradient ascent on the forgotten answers while retained predictions stay those of before.

Paper:    Maini et al. 2024, TOFU (KL minimisation), arXiv 2401.06121.
Changes:  every weight (or those whose name matches `trainable`), full rank.
Needs:    a frozen copy of the model in memory and one more forward pass per step.
Differs:  dropout is off, the learning rate constant without a warm-up epoch, the trained copy float32;
          KL(before || now) is taken where a retained answer or text is predicted; public code averages it over all
          positions, prompts and padding included, so that its strength depends on how a batch was padded;
          texts of the retain set join the retained answers; training may stop by recall (off by default).
Fails:    as GradDiff; it also holds what the model got wrong about the retained facts.
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
class KlMin:
    """Settings of the training; `fit` runs it. Defaults: as in open-unlearning on TOFU."""

    forget_weight: float = 1.0
    """Weight of the ascent; 1 in TOFU."""
    retain_weight: float = 1.0
    """Weight of the KL per token (nats) on retained answers and texts; 0 is plain ascent."""
    schedule: Schedule = Schedule(lr=1e-5, epochs=10)
    trainable: str = ""
    """Regular expression for the names of the weights to train; empty matches all."""
    seed: int = 0
    """Draws the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes; a ValueError as of `train`, or for a setting out of range."""
        objective = Objective(lambda _: ascent, self.retain_weight, self.forget_weight, retain="kl")
        return trained_edit("kl_min", self, model, forget, retain, objective, self.trainable, around)
