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

from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.losses import gradient_ascent_loss
from mech_unlearn.training.objective import PLAIN, Around, Objective
from mech_unlearn.training.rows import AnswerScores
from mech_unlearn.training.training import RetainSampling, trained_edit


@dataclass(frozen=True, kw_only=True)
class GradDiff:
    """Settings of the training; `fit` runs it. Defaults: as in open-unlearning on TOFU."""

    forget_weight: float = 1.0
    """Weight of the ascent; 1 in TOFU."""
    retain_weight: float = 1.0
    """Weight of the NLL per token on retained answers and texts; 0 is plain ascent."""
    lr: float = 1e-5
    """Step size of AdamW, constant; small models trained from scratch need 1e-4 to 1e-3."""
    epochs: int = 10
    """Passes over the forget rows (facts x phrasings); at the most, where `stop_recall` is set."""
    batch_size: int = 32
    """Forget rows per step; as many retain rows go with them."""
    weight_decay: float = 0.01
    """Decoupled, as in AdamW."""
    clip: float = 1.0
    """Bound of the gradient's norm over all trained tensors."""
    stop_recall: float | None = None
    """Stop once at most this share of the forget rows is answered; None trains all epochs."""
    retain_sampling: RetainSampling = "cyclic"
    """How retained rows are drawn: "cyclic", "1:1" or "entity"; see `training.Schedule`."""
    trainable: str = ""
    """Regular expression for the names of the weights to train; empty matches all."""
    seed: int = 0
    """Draws the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes.

        Raises:
            ValueError: nothing retained, nothing to train, a setting out of range, or a loss that is not finite.
        """
        objective = Objective(lambda _: _loss, self.retain_weight, self.forget_weight)
        return trained_edit("grad_diff", self, model, forget, retain, objective, self.trainable, around=around)


def _loss(now: AnswerScores) -> Tensor:
    return gradient_ascent_loss(now.logprob, now.tokens)
