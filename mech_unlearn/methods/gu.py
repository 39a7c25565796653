"""Gu: forget gradients are projected off the span of retain gradients, in the metric of the optimiser.

Paper:    Geometric-disentanglement unlearning, arXiv 2511.17100. To first order an update leaves the retain loss as it
          is if it is orthogonal to the retain gradients in the metric H of the optimiser.
Changes:  what the wrapped method changes; per step k retain batches are read more.
Needs:    retained facts or texts, also where the method gives them no weight.
Differs:  which batches span the retain gradients and whether tensors are projected one by one were not to be had:
          k fresh batches per step, and both scopes are offered. An entry without a second moment yet (all, at the first
          step) takes the squares of the gradients at hand, because 1 / eps would outweigh everything else.
          The method's own retain term is added afterwards and is the alpha g_r of the paper; clipping scales only.
Fails:    holds for a step along H^-1 g: Adam's momentum carries older directions, its second moment moves, and weight
          decay is not projected. Retained facts that are in none of the k batches are not protected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods.npo import Npo
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around, Trains, masked_gradients
from mech_unlearn.training.trainee import Trainee
from mech_unlearn.training.wrapping import extended, require_trains, wrapped

Scope = Literal["tensor", "global"]
DEPENDENT = 1e-12
"""A direction whose square falls below this share of what it was lies in the span of the others."""


@dataclass(frozen=True, kw_only=True)
class Gu:
    """What is wrapped and how it is projected."""

    base: Trains = Npo()
    """A method that trains, with its own settings; its `retain_weight` is the paper's alpha."""
    k: int = 1
    """Retain batches per step whose gradients are projected off; 1 to 4."""
    scope: Scope = "tensor"
    """"tensor": each tensor's gradient by itself; "global": all as one vector."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes with projected forget gradients.

        Raises:
            ValueError: a base that does not train, a setting out of range, nothing retained, or what the base refuses.
        """
        require_trains(self.base, "gu")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope must be 'tensor' or 'global', got {self.scope!r}")
        inner = extended(around, "gu", self, direct=self._direct, retained=True)
        return wrapped(self.base.fit(model, forget, retain, inner), "gu", self)

    def _direct(
        self,
        run: Trainee,
        gradients: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        masks: Mapping[str, Tensor],
    ) -> list[Tensor]:
        theirs = []
        for _ in range(self.k):
            found = run.gradients(run.retain_loss(run.next_kept()))
            theirs.append(masked_gradients(run.weights, found, masks))
        metric = adam_metric(list(run.weights.values()), optimizer, [gradients, *theirs])
        if self.scope == "global":
            return projected(gradients, theirs, metric)
        each = zip(gradients, metric, *theirs, strict=True)
        return [projected([g], [[q] for q in some], [h])[0] for g, h, *some in each]


def adam_metric(
    weights: Sequence[Tensor], optimizer: torch.optim.Optimizer, gradients: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """sqrt(v) + eps per entry, where v is Adam's second moment, corrected for its start at zero.

    An entry whose second moment is 0 takes the square of the first gradient plus the mean square of the others.
    """
    out = []
    for i, weight in enumerate(weights):
        ours, others = gradients[0][i], [g[i] for g in gradients[1:]]
        v = ours.square() + sum((g.square() for g in others), torch.zeros_like(ours)) / max(1, len(others))
        group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
        state = optimizer.state.get(weight)
        if state:
            known = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            v = torch.where(known > 0, known, v)
        out.append(v.sqrt() + group["eps"])
    return out


def inner(a: Sequence[Tensor], b: Sequence[Tensor], metric: Sequence[Tensor]) -> float:
    """<a, b>_H = sum of a b / h over all entries, added up in float64.

    Source: 2511.17100, the inner product of whitened coordinates.
    """
    each = zip(a, b, metric, strict=True)
    return float(sum((x.double() * y.double() / h.double()).sum() for x, y, h in each))


def projected(gradient: Sequence[Tensor], others: Sequence[Sequence[Tensor]], metric: Sequence[Tensor]) -> list[Tensor]:
    """The gradient less its part in the span of the others, by Gram-Schmidt in the metric (each step twice).

    g - sum_i <g, q_i> / <q_i, q_i> q_i, where the q_i are the others made orthogonal to one another.
    """

    def less(g: list[Tensor], directions: Sequence[tuple[list[Tensor], float]]) -> list[Tensor]:
        for _ in range(2):  # once leaves what rounding brings back
            for q, square in directions:
                share = inner(g, q, metric) / square
                g = [x - share * y for x, y in zip(g, q, strict=True)]
        return g

    basis: list[tuple[list[Tensor], float]] = []
    for other in others:
        q = less(list(other), basis)
        square = inner(q, q, metric)
        if square > DEPENDENT * inner(other, other, metric):
            basis.append((q, square))
    return less(list(gradient), basis)
