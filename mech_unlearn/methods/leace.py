"""Leace: erase from a name's state, by the smallest affine change, all that linearly tells it from other names.

Paper:    Belrose, Schneider-Joseph, Ravfogel, Cotterell, Raff, Biderman 2023, LEACE: perfect linear concept erasure in
          closed form, arXiv 2306.03819, theorem 4.3: r(x) = x - W^+ P W (x - mu), W = (Sigma_xx^(1/2))^+, P the
          orthogonal projection onto the columns of W Sigma_xz.
Changes:  states at the chosen sites, by default at the last token of each forgotten name; rank one per site.
Needs:    states of the forgotten and of unknown (or retained) names in every context; an eigendecomposition per site.
Differs:  the concept is whether a name is to be forgotten; several sites are erased from the lowest up, each fitted
          under those below (the paper's concept scrubbing). An optional shrinkage of Sigma_xx keeps the erasure exact
          and gives up only that it is the smallest. Written anew in float64 in place of the `concept-erasure` package,
          which agrees.
Fails:    guards against linear readers of this site on data like that it was fitted on, not against nonlinear ones, nor
          unseen names. With fewer states than dimensions an estimated covariance overfits (use shrinkage). That one
          cannot tell known from unknown names does not say that their facts are gone: attributes are other concepts.
"""

import time
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.edit.interventions import Where
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.columns import outcome
from mech_unlearn.methods.writing.state_maps import Against, Map, fitted, groups, sites_of
from mech_unlearn.model.bridge import Model

TOLERANCE = 1e-10
"""Directions with less than this share of the largest variance have none: they are left as they are."""


@dataclass(frozen=True, kw_only=True)
class Leace:
    """Settings of the erasure; `fit` computes it."""

    layers: tuple[int, ...] | None = None
    """Layers whose residual stream is mapped; by default up to three that end at a third of the depth."""
    kind: str = "resid_post"
    """Or "resid_pre"."""
    against: Against = "unknown"
    """What the forgotten names become linearly indistinguishable from."""
    where: Where = "last"
    """Apply at the name's last token, from there on, or at every token (fitted at the last token in any case)."""
    skip_first: bool = True
    """For where="all": leave position 0 as it is."""
    shrinkage: float = 0.0
    """Share s of (1 - s) Sigma + s tr(Sigma) / d I; in [0, 1)."""
    seed: int = 0
    """Nothing is drawn; kept with the result."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Edit:
        """The erasure.

        Raises:
            ValueError: no names to compare with, a layer the model lacks, or a setting out of range.
        """
        start = time.perf_counter()
        if not 0 <= self.shrinkage < 1:
            raise ValueError(f"shrinkage={self.shrinkage}: choose a share in [0, 1)")
        sites, (names, others) = sites_of(model, self.layers, self.kind), groups(forget, retain, self.against)
        contexts = keys.contexts_of(forget.facts)
        with keys.count_forwards(model) as forwards:
            maps = fitted(model, names, others, contexts, sites, self._map, self.where, self.skip_first)
            edit = Edit(name="leace", base=model.hash(), interventions=maps)
            report = outcome(model, edit, forget.facts)
        report |= {"sites": [str(site) for site in sites], "names": len(names), "others": len(others)}
        report |= {"n_forward": forwards[0], "n_backward": 0, "seconds": time.perf_counter() - start}
        recipe = {"method": "leace", "settings": asdict(self), "seed": self.seed, "report": report}
        return Edit(name="leace", base=edit.base, interventions=maps, recipe=recipe)

    def _map(self, own: Tensor, other: Tensor) -> Map:
        x = torch.cat([own.flatten(0, 1), other.flatten(0, 1)])
        z = torch.zeros(len(x), 1, dtype=x.dtype, device=x.device)
        z[: own.shape[0] * own.shape[1]] = 1
        return leace(x, z, self.shrinkage)


def leace(x: Float[Tensor, "n d"], z: Float[Tensor, "n labels"], shrinkage: float = 0.0) -> Map:
    """(left, right, mu) of r(x) = x - left right (x - mu): no linear predictor of z from r(x) beats a constant.

    left = W^+ U and right = U^T W with U an orthonormal basis of the columns of W Sigma_xz. Of all affine maps after
    which r(x) and z are uncorrelated, r has the least E ||r(x) - x||^2, in every inner product (shrinkage = 0).

    Raises:
        ValueError: fewer than two rows, or labels or states that do not vary.

    Source: arXiv 2306.03819, theorem 4.3.
    """
    if len(x) < 2:
        raise ValueError(f"LEACE needs at least two states, got {len(x)}")
    x, z = x.double(), z.double()
    mu = x.mean(0)
    centered, labels = x - mu, z - z.mean(0)
    sigma = centered.T @ centered / len(x)
    if shrinkage:
        eye = torch.eye(len(sigma), dtype=sigma.dtype, device=sigma.device)
        sigma = (1 - shrinkage) * sigma + shrinkage * sigma.diagonal().mean() * eye
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > TOLERANCE * values.max().clamp(min=1e-300)
    root, vectors = values[kept].sqrt(), vectors[:, kept]
    # In the eigenbasis W is diag(1 / root) and W^+ diag(root), so that neither is ever formed.
    cross = vectors.T @ (centered.T @ labels) / len(x) / root[:, None]
    u, size, _ = torch.linalg.svd(cross, full_matrices=False)
    if not kept.any() or not size.numel() or not size.max() > 1e-12:
        raise ValueError("states and labels do not vary together: there is nothing to erase")
    u = u[:, size > 1e-10 * size.max()]
    return vectors @ (root[:, None] * u), (u / root[:, None]).T @ vectors.T, mu
