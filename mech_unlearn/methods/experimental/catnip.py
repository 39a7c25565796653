"""Catnip: negative preference optimisation token by token, weighted by the model's own confidence.

Paper:    Yang et al. 2026, CATNIP: Calibrated and Tokenized Negative Preference Alignment, arXiv 2602.02824.
Changes:  every weight (or those whose name matches `trainable`), full rank.
Needs:    nothing beforehand; the retain set is not read.
Differs:  a working form after the abstract (token-wise, scaled by confidence, no retain data, no chosen reference), not
          the paper's equations: the reference is the strongest other token, the weight p^kappa;
          dropout is off, the learning rate constant without a warm-up epoch, the trained copy float32;
          training may stop by recall on the forget rows (off by default).
Fails:    nothing holds the other facts but the weight that falls with confidence; kappa and beta are ours.
"""

from dataclasses import dataclass

from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.losses import catnip_loss
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import BatchScores
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import require_positive, trained_edit


@dataclass(frozen=True, kw_only=True)
class Catnip:
    """Settings of the training; `fit` runs it. Rates: as for NPO in open-unlearning."""

    beta: float = 0.1
    """Inverse temperature; towards 0 the loss becomes gradient ascent weighted by confidence. 0.1 as in NPO."""
    kappa: float = 1.0
    """Exponent of the confidence weight p^kappa; 0 weighs all answer tokens alike."""
    schedule: Schedule = Schedule(lr=1e-5, epochs=10)
    trainable: str = ""
    """Regular expression for the names of the weights to train; empty matches all."""
    seed: int = 0
    """Draws the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes.

        Raises:
            ValueError: nothing to train, a setting out of range, or a loss that is not finite.
        """
        require_positive(self, "beta")
        if not self.kappa >= 0:
            raise ValueError(f"kappa must not be negative, got {self.kappa}")
        objective = Objective(lambda _: self._loss, retain_weight=0.0)
        return trained_edit("catnip", self, model, forget, retain, objective, self.trainable, around)

    def _loss(self, now: BatchScores) -> Tensor:
        return catnip_loss(now.each.logits, now.each.wanted, now.each.at, self.beta, self.kappa)
