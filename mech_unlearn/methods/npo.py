"""Npo: negative preference optimisation, a bounded gradient ascent on the forgotten answers.

Paper:    Zhang, Lin, Bai and Mei 2024, Negative Preference Optimization, arXiv 2404.05868.
          Eq. 3 is the loss; NLL on retained answers is its variant NPO + RT.
Changes:  every weight (or those whose name matches `trainable`), full rank.
Needs:    answer log-probabilities of the forget rows before training: one forward pass over them.
Differs:  dropout is off; texts of the retain set join the retained answers in the retain term; training stops early
          where `stop_recall` says so (off by default); the copy that is trained is float32; the step size is constant,
          where the code warms up over the first epoch (`schedule.warmup`) and then falls linearly to 0.
Fails:    output-level: on one phrasing only it forgets that phrasing; relearning a few facts brings back others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import BatchScores
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import require_positive, trained_edit


@dataclass(frozen=True, kw_only=True)
class Npo:
    """Settings of the training; `fit` runs it. Defaults: 2404.05868 on TOFU, weights as in open-unlearning."""

    beta: float = 0.1
    """Inverse temperature; towards 0 the loss becomes gradient ascent."""
    forget_weight: float = 1.0
    """Weight of the preference loss; 1 in open-unlearning."""
    retain_weight: float = 1.0
    """Weight of the NLL per token on retained answers and texts; 0 is plain NPO."""
    schedule: Schedule = Schedule(lr=1e-5, epochs=10)
    trainable: str = ""
    """Regular expression for the names of the weights to train; empty matches all."""
    seed: int = 0
    """Draws the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes; a ValueError as of `train`, or for a setting out of range."""
        require_positive(self, "beta")
        objective = Objective(self._loss, self.retain_weight, self.forget_weight)
        return trained_edit("npo", self, model, forget, retain, objective, self.trainable, around)

    def _loss(self, before: BatchScores) -> Callable[[BatchScores], Tensor]:
        return lambda now: npo_loss(now.logprob, before.logprob[now.row], self.beta)


def npo_loss(logprob: Float[Tensor, " batch"], reference: Float[Tensor, " batch"], beta: float) -> Float[Tensor, ""]:
    """-(2 / beta) mean log sigmoid(-beta (log p(y) - log p_ref(y))), sums over answer tokens, nats; mean over rows.

    Its gradient at the reference is that of gradient ascent, mean grad log p(y), because 2 sigmoid(0) = 1.

    Source: 2404.05868, eq. 3.
    """
    return -(2 / beta) * torch.nn.functional.logsigmoid(-beta * (logprob - reference)).mean()
