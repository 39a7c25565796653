"""Unlikelihood: training that makes forgotten answers unlikely, -log(1 - p) for each of their tokens.

Paper:    the loss: Welleck et al. 2020, Neural Text Generation with Unlikelihood Training, arXiv 1908.04319; as the
          outer loss of latent adversarial training for unlearning, with a floor: Sheshadri et al. 2024, arXiv
          2407.15549.
Changes:  every weight (or those whose name matches `trainable`), full rank.
Needs:    nothing beforehand.
Differs:  retained answers and texts are trained by their NLL per token; dropout is off; the step size is constant after
          the warm-up; the copy that is trained is float32.
Fails:    forgotten answers are made unlikely, nothing is said in their place; relearning is quick.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.losses import mean_of_rows, token_logprobs
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import AnswerTokens, BatchScores
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import trained_edit


@dataclass(frozen=True, kw_only=True)
class Unlikelihood:
    """Settings of the training; `fit` runs it. Rates and weights: chosen on SmolLM2-135M, where 2407.15549's for 7B
    models (lr 5e-5, retain_weight 4, 200 batches) forget in one step and take a fifth of the unseen neighbours
    along."""

    floor: float = -5.0
    """An answer token whose log-probability (nats) is below this gives no more gradient."""
    forget_weight: float = 1.0
    """Weight of -log(1 - p) on forgotten answers."""
    retain_weight: float = 8.0
    """Weight of the NLL per token on retained answers and texts."""
    schedule: Schedule = Schedule(lr=5e-6, epochs=20, batch_size=8, stop_recall=0.2)
    trainable: str = ""
    """Regular expression for the names of the weights to train; empty matches all."""
    seed: int = 0
    """Draws the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes.

        Raises:
            ValueError: nothing retained, a setting out of range, or a loss that is not finite.
        """
        objective = Objective(self._loss, self.retain_weight, self.forget_weight)
        return trained_edit("unlikelihood", self, model, forget, retain, objective, self.trainable, around)

    def _loss(self, _: BatchScores) -> Callable[[BatchScores], Tensor]:
        return lambda now: unlikelihood_loss(now.each, self.floor)


def log_not(logits: Float[Tensor, "token d_vocab"], hit: Bool[Tensor, "token d_vocab"]) -> Float[Tensor, " token"]:
    """Log-probability (nats) of all tokens but those hit, log(1 - sum p): from the others' logits, so that it is
    finite and has a gradient where p rounds to 1."""
    return logits.masked_fill(hit, float("-inf")).logsumexp(1) - logits.logsumexp(1)


def unlikelihood_loss(each: AnswerTokens, floor: float = float("-inf")) -> Float[Tensor, ""]:
    """-log(1 - p(answer token)), nats: mean over each row's tokens, then over rows.

    A token with log p < floor counts as zero, and stays in the mean.

    Source: 2407.15549, the unlearning loss; the floor as in its code.
    """
    hit = torch.zeros_like(each.logits, dtype=torch.bool).scatter(1, each.wanted[:, None], True)
    loss = -log_not(each.logits, hit)
    gone = token_logprobs(each.logits.detach(), each.wanted) < floor
    return mean_of_rows(torch.where(gone, torch.zeros_like(loss), loss), each.at)
