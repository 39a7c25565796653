"""Lat: another method's training, while an adversary shifts hidden states to bring the forgotten answers back.

Paper:    Sheshadri et al. 2024, Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors,
          arXiv 2407.15549 (targeted, its unlearning experiments); around NPO: Yuan et al. 2024, AdvNPO, arXiv
          2408.10682, which is `Lat(base=Npo())`.
Changes:  what the base changes.
Needs:    what the base needs; per batch `pgd_steps` forward and backward passes for the attack, and `repeats` steps.
Differs:  the adversary only goes toward the forgotten answer: for facts there is no safe answer, so it has no term
          that leads away from one; shifts sit in the residual stream after `attack_layer` (the code: at a submodule of
          it), on the prompt's tokens by default, since whoever attacks does not have the answer, and never on the first
          token, an attention sink; their bound is in units of the states' norm; a base's other answers (refusals) are
          not attacked; full rank in place of LoRA (wrap by `Lora` for that).
Fails:    guards against shifts at that layer, up to that length; other phrasings and relearning are another matter.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods.unlikelihood import Unlikelihood
from mech_unlearn.methods.writing import keys
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Adversary, Around, Attack, Trains
from mech_unlearn.training.rows import collate
from mech_unlearn.training.trainee import Trainee
from mech_unlearn.training.training import require_positive
from mech_unlearn.training.wrapping import extended, require_trains, wrapped

Where = Literal["prompt", "all"]


@dataclass(frozen=True, kw_only=True)
class Lat:
    """Settings of the attack; `fit` trains the base under it. Where nothing is said, as 2407.15549's code for WMDP."""

    base: Trains = Unlikelihood()
    """The method that trains, with its settings; by default with the paper's outer loss."""
    attack_layer: int | None = None
    """Layer after which states are shifted; None is the last of `keys.default_layers` (7 of 32 in the paper)."""
    eps: float = 0.1
    """Bound of each token's shift, Euclidean norm, as a share of the mean norm of the batch's states there. With
    relative=False the length itself: 1.5 to 2 in the code, for 7B models."""
    relative: bool = True
    """Whether `eps` and `pgd_lr` are such shares."""
    where: Where = "prompt"
    """Tokens that may be shifted: those of the prompt, or those of the answer, too."""
    pgd_steps: int = 8
    """Steps of the attack; 16 in the code."""
    pgd_lr: float = 5e-2
    """Step size of the attack's AdamW, per coordinate."""
    repeats: int = 2
    """Optimiser steps on each batch, under the same shift; 4 in the code."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that the base's training makes under attack.

        Raises:
            ValueError: a base that does not train answers, a layer that the model lacks, a setting out of range, or
                what the base refuses.
        """
        require_trains(self.base, "lat")
        require_positive(self, "eps", "pgd_steps", "pgd_lr", "repeats")
        if self.where not in get_args(Where):
            raise ValueError(f"where must be 'prompt' or 'all', got {self.where!r}")
        layer = keys.default_layers(model.n_layers)[-1] if self.attack_layer is None else self.attack_layer
        keys.check_layers(model, (layer,), layer)
        attack = Adversary(lambda run, members: self._attack(run, members, layer, model.d_model), self.repeats)
        return wrapped(
            self.base.fit(model, forget, retain, extended(around, "lat", self, adversary=attack)), "lat", self
        )

    def _attack(self, run: Trainee, members: Sequence[int], layer: int, width: int) -> Attack:
        if run.objective.rows or not run.objective.logits:
            raise ValueError("lat attacks answers, and its base does not train them: give base=npo or the like")
        rows, n = run.beside(members), len(members)
        batch = collate(run.asked, rows, run.fill, run.device)
        free = batch.ordinary if self.where == "all" else batch.ordinary & ~batch.answer
        free[n:] = False
        unit = self._unit(run, rows, layer, batch.ordinary) if self.relative else 1.0

        def loss(shift: Tensor) -> Tensor:
            with shifted(run.block(layer), shift):
                scores = run.forward(run.asked, rows, teacher=False)
            return -(scores.logprob / scores.tokens)[:n].mean()

        shift = worst_shift(loss, free, width, self.eps * unit, self.pgd_lr * unit, self.pgd_steps)
        run.n_backward += self.pgd_steps
        return lambda: shifted(run.block(layer), shift)

    @torch.no_grad()
    def _unit(self, run: Trainee, members: Sequence[int], layer: int, counted: Tensor) -> float:
        norms: list[Tensor] = []

        def read(_: Any, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            norms.append(states.norm(dim=-1)[counted])

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
