"""Lat: training against the answer while an adversary shifts hidden states to bring the answer back.

Paper:    Sheshadri et al. 2024, Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors,
          arXiv 2407.15549 (targeted, its unlearning experiments); with other names Yuan et al. 2024, 2408.10682.
Changes:  every weight (or those whose name matches `trainable`), full rank.
Needs:    nothing beforehand; per batch `pgd_steps` forward and backward passes for the attack, and `repeats` steps.
Differs:  the adversary only goes toward the forgotten answer: for facts there is no safe answer, so it has no term
          that leads away from one, and the outer loss none that leads to one; shifts sit in the residual stream after
          `attack_layer` (the code: at a submodule of it), on the prompt's tokens by default, since whoever attacks does
          not have the answer; full rank in place of LoRA (wrap for that); retained answers and texts are trained by
          their NLL per token.
Fails:    guards against shifts at that layer, up to that length; other phrasings and relearning are another matter.
          Forgotten answers are made unlikely, nothing is said in their place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods.writing import keys
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around, Attack
from mech_unlearn.training.losses import mean_of_rows, token_logprobs
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import AnswerTokens, BatchScores, collate, nll
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.trainee import Trainee
from mech_unlearn.training.training import require_positive, trained_edit

Where = Literal["prompt", "all"]


@dataclass(frozen=True, kw_only=True)
class Lat:
    """Settings of the training; `fit` runs it. Defaults: 2407.15549's code for WMDP."""

    attack_layer: int | None = None
    """Layer after which states are shifted; None is the last of `keys.default_layers` (7 of 32 in the paper)."""
    eps: float = 2.0
    """Bound of each token's shift, Euclidean norm; 1.5 to 2 for 7B models."""
    relative: bool = False
    """Whether `eps` and `pgd_lr` are shares of the mean norm of the batch's states there."""
    where: Where = "prompt"
    """Tokens that may be shifted: those of the prompt, or those of the answer, too."""
    pgd_steps: int = 16
    """Steps of the attack."""
    pgd_lr: float = 5e-2
    """Step size of the attack's AdamW, per coordinate."""
    repeats: int = 4
    """Optimiser steps on each batch, under the same shift."""
    floor: float = -5.0
    """An answer token whose log-probability (nats) is below this gives no more gradient."""
    forget_weight: float = 1.0
    """Weight of -log(1 - p) on forgotten answers under attack."""
    retain_weight: float = 4.0
    """Weight of the NLL per token on retained answers and texts, which are not attacked."""
    schedule: Schedule = Schedule(lr=5e-5, epochs=10, batch_size=16)
    """The paper takes 200 batches."""
    trainable: str = ""
    """Regular expression for the names of the weights to train; empty matches all."""
    seed: int = 0
    """Draws the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes.

        Raises:
            ValueError: nothing retained, a layer that the model lacks, a setting out of range, or a loss that is not
                finite.
        """
        require_positive(self, "eps", "pgd_steps", "pgd_lr", "repeats")
        if self.where not in get_args(Where):
            raise ValueError(f"where must be 'prompt' or 'all', got {self.where!r}")
        layer = keys.default_layers(model.n_layers)[-1] if self.attack_layer is None else self.attack_layer
        keys.check_layers(model, (layer,), layer)
        objective = Objective(self._loss, self.retain_weight, self.forget_weight, repeats=self.repeats)
        attacked = replace(around, adversary=lambda run, members: self._attack(run, members, layer, model.d_model))
        return trained_edit("lat", self, model, forget, retain, objective, self.trainable, attacked)

    def _loss(self, _: BatchScores) -> Callable[[BatchScores], Tensor]:
        return lambda now: away_loss(now.each, self.floor)

    def _attack(self, run: Trainee, members: Sequence[int], layer: int, width: int) -> Attack:
        batch = collate(run.asked, members, run.fill, run.device)
        free = batch.ordinary if self.where == "all" else batch.ordinary & ~batch.answer
        unit = self._unit(run, members, layer, batch.mask.bool()) if self.relative else 1.0

        def loss(shift: Tensor) -> Tensor:
            with shifted(run.block(layer), shift):
                return nll(run.forward(run.asked, members, teacher=False))

        shift = worst_shift(loss, free, width, self.eps * unit, self.pgd_lr * unit, self.pgd_steps)
        run.n_backward += self.pgd_steps
        return lambda: shifted(run.block(layer), shift)

    @torch.no_grad()
    def _unit(self, run: Trainee, members: Sequence[int], layer: int, real: Tensor) -> float:
        norms: list[Tensor] = []

        def read(_: Any, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            norms.append(states.norm(dim=-1)[real])

        handle = run.block(layer).register_forward_hook(read)
        try:
            run.forward(run.asked, members, teacher=False)
        finally:
            handle.remove()
        return norms[0].mean().item()


@contextmanager
def shifted(block: Any, shift: Float[Tensor, "batch pos d_model"]) -> Iterator[None]:
    """Add a shift to what a decoder layer gives."""

    def add(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + shift, *output[1:])
        return output + shift

    handle = block.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def worst_shift(
    loss: Callable[[Tensor], Tensor],
    free: Bool[Tensor, "batch pos"],
    width: int,
    eps: float,
    lr: float,
    steps: int,
) -> Float[Tensor, "batch pos width"]:
    """The shift that projected AdamW finds to minimise a loss, from zero; each token's is at most eps long.

    Args:
        free: tokens that may be shifted; the others' stays zero.

    Source: 2407.15549's code (AdamW, then projection of each token's shift onto the ball).
    """
    shift = torch.zeros(*free.shape, width, device=free.device, requires_grad=True)
    optimizer = torch.optim.AdamW([shift], lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(loss(shift), [shift])
            shift.grad = gradient * free[..., None]
            optimizer.step()
            with torch.no_grad():
                shift.mul_((eps / shift.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0))
    return shift.detach()


def log_not(logits: Float[Tensor, "token d_vocab"], hit: Bool[Tensor, "token d_vocab"]) -> Float[Tensor, " token"]:
    """Log-probability (nats) of all tokens but those hit, log(1 - sum p): from the others' logits, so that it is
    finite and has a gradient where p rounds to 1."""
    return logits.masked_fill(hit, float("-inf")).logsumexp(1) - logits.logsumexp(1)


def away_loss(each: AnswerTokens, floor: float = float("-inf")) -> Float[Tensor, ""]:
    """-log(1 - p(answer token)), nats: mean over each row's tokens, then over rows.

    A token with log p < floor counts as zero, and stays in the mean.

    Source: 2407.15549, the unlearning loss; the floor as in its code.
    """
    hit = torch.zeros_like(each.logits, dtype=torch.bool).scatter(1, each.wanted[:, None], True)
    loss = -log_not(each.logits, hit)
    gone = token_logprobs(each.logits.detach(), each.wanted) < floor
    return mean_of_rows(torch.where(gone, torch.zeros_like(loss), loss), each.at)
