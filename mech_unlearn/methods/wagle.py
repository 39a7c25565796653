"""Wagle: only the weights with the largest attribution to the forget loss are trained.

Paper:    Jia et al. 2024, WAGLE: Strategic Weight Attribution for Effective and Modular Unlearning, arXiv 2410.17509.
          S_i = |(theta_i - g_r,i / mu) g_f,i|.
Changes:  the entries with the top `rho` of the scores, of what the wrapped method trains; every other keeps its bits.
Needs:    one forward and backward pass over all forget and all retained rows before training.
Differs:  entries that are masked are put back after each step, so weight decay does not move them either; scores are
          taken from the losses of the wrapped method (the retain loss from NLL where it is KL, whose gradient is 0
          before training); ties are kept in the order of the tensors.
Fails:    with mu = 1e-6 the retain gradient outweighs theta unless gradients are tiny, so that the score is nearly
          |g_r g_f|; a mask of 95 % hardly constrains.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods.npo import Npo
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around, Trains
from mech_unlearn.training.rows import nll
from mech_unlearn.training.trainee import Trainee
from mech_unlearn.training.training import require_positive
from mech_unlearn.training.wrapping import extended, require_trains, wrapped


@dataclass(frozen=True, kw_only=True)
class Wagle:
    """What is wrapped and how its mask is chosen. Defaults: the code's configuration for TOFU."""

    base: Trains = Npo()
    """A method that trains, with its own settings."""
    rho: float = 0.95
    """Share of the trained entries that is kept; 1 is the wrapped method itself."""
    mu: float = 1e-6
    """Stands for the retain loss's curvature."""
    batch_size: int = 32
    """Rows per pass of the scoring; a gradient is the mean over a batch's rows, and batches are added up."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes inside the mask.

        Raises:
            ValueError: a base that does not train, a setting out of range, nothing retained, or what the base refuses.
        """
        require_trains(self.base, "wagle")
        require_positive(self, "mu", "batch_size")
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho must be above 0 and at most 1, got {self.rho}")
        inner = extended(around, "wagle", self, masks=(self._mask,), retained=True)
        return wrapped(self.base.fit(model, forget, retain, inner), "wagle", self)

    def _mask(self, run: Trainee) -> dict[str, Tensor]:
        def kept_nll(members: Sequence[int]) -> Tensor:
            return nll(run.forward(run.kept, members, False))

        ours = _summed(run, run.n_forget, run.forget_loss, self.batch_size)
        theirs = _summed(
            run, len(run.kept), kept_nll if run.objective.retain == "kl" else run.retain_loss, self.batch_size
        )
        each = zip(run.weights.items(), ours, theirs, strict=True)
        return top_share({name: attribution(w.detach(), f, r, self.mu) for (name, w), f, r in each}, self.rho)


def _summed(run: Trainee, n: int, loss: Callable[[Sequence[int]], Tensor], size: int) -> list[Tensor]:
    """Gradients of a loss, added up over all batches."""
    from tqdm import tqdm

    total = [torch.zeros_like(w) for w in run.weights.values()]
    starts = tqdm(range(0, n, size), desc="attributing", unit="batch", delay=2, leave=False)
    for start in starts:
        found = run.gradients(loss(range(start, min(start + size, n))))
        total = [t.add_(g) for t, g in zip(total, found, strict=True)]
    return total


def attribution(weight: Tensor, forget: Tensor, retain: Tensor, mu: float) -> Tensor:
    """|(theta - g_r / mu) g_f| per entry.

    Source: 2410.17509.
    """
    return ((weight - retain / mu) * forget).abs()


def top_share(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The mask of the largest `share` of all entries together, at least one; ties in the order of the tensors."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    n = max(1, round(share * len(flat)))
    least = flat.kthvalue(len(flat) - n + 1).values
    keep = flat > least
    ties = (flat == least).nonzero()[:, 0]
    keep[ties[: n - int(keep.sum())]] = True
    parts = keep.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}
