"""SimNpo: negative preference optimisation by the answer's own likelihood, without a reference model.

Paper:    Fan et al. 2024, Simplicity Prevails: Rethinking Negative Preference Optimization, arXiv 2410.07163.
Changes:  every weight (or those whose name matches `trainable`), full rank.
Needs:    nothing beforehand.
Differs:  dropout is off, the learning rate constant without a warm-up epoch, the trained copy float32;
          texts of the retain set join the retained answers; training may stop by recall (off by default).
Fails:    output-level, as Npo; an answer that is unlikely at first gets hardly any gradient.
"""

from dataclasses import dataclass

from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.losses import simnpo_loss
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import BatchScores
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import require_positive, trained_edit


@dataclass(frozen=True, kw_only=True)
class SimNpo:
    """Settings of the training; `fit` runs it. Defaults: open-unlearning on TOFU."""

    beta: float = 4.5
    """Inverse temperature; 2.5 in the authors' configuration for TOFU forget05, 4.5 in open-unlearning."""
    delta: float = 0.0
    """NLL per token, nats, around which the loss saturates."""
    forget_weight: float = 0.125
    """0.1375 with the authors, 0.125 in open-unlearning."""
    retain_weight: float = 1.0
    """Weight of the NLL per token on retained answers and texts; 0 trains on the forget rows alone."""
    schedule: Schedule = Schedule(lr=1e-5, epochs=10)
    trainable: str = ""
    """Regular expression for the names of the weights to train; empty matches all."""
    seed: int = 0
    """Draws the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes; a ValueError as of `train`, or for a setting out of range."""
        require_positive(self, "beta")
        objective = Objective(lambda _: self._loss, self.retain_weight, self.forget_weight)
        return trained_edit("sim_npo", self, model, forget, retain, objective, self.trainable, around)

    def _loss(self, now: BatchScores) -> Tensor:
        return simnpo_loss(now.logprob, now.tokens, self.beta, self.delta)
