"""Distances of a name's state from the known and the unknown ones, and the bands that unknown names keep.

Coordinates are latents of an SAE before their nonlinearity, or the residual stream itself; all are standardised over
known and unknown names. The definitions are ours (the loss of arXiv 2509.15631 is not public); latents that separate
known from unknown as in arXiv 2411.14257.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.methods.sae_shift import ACTIVE, known_scores, pre_activations
from mech_unlearn.model.latents import Sae

Space = Literal["latents", "states"]


@dataclass(frozen=True, eq=False)
class Bands:
    """Where unknown names' states lie, in standardised coordinates."""

    sae: Sae | None
    """None: coordinates are the states themselves."""
    chosen: Int[Tensor, " coordinate"]
    """Latents, or features of the state."""
    mean: Float[Tensor, " coordinate"]
    std: Float[Tensor, " coordinate"]
    known: Float[Tensor, " coordinate"]
    unknown: Float[Tensor, " coordinate"]
    """Standardised means of known and of unknown names."""
    near: float = float("inf")
    """Most mean squared distance from the unknown mean."""
    far: float = 0.0
    """Least mean squared distance from the known mean."""

    def coordinates(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch coordinate"]:
        """Standardised coordinates of states."""
        raw = x if self.sae is None else pre_activations(self.sae, x)
        return (raw[..., self.chosen] - self.mean) / self.std

    def distances(self, x: Float[Tensor, "*batch d_model"]) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """(D_U, D_K): mean squared distance over coordinates from the unknown and the known mean."""
        q = self.coordinates(x)
        return (q - self.unknown).square().mean(-1), (q - self.known).square().mean(-1)

    def inside(self, x: Float[Tensor, "*batch d_model"]) -> Bool[Tensor, "*batch"]:
        """Whether a state is within both bands."""
        unknown, known = self.distances(x)
        return (unknown <= self.near) & (known >= self.far)

    def excess(self, x: Float[Tensor, "*batch d_model"], eta: float) -> Float[Tensor, "*batch"]:
        """relu(D_U - near) + eta relu(far - D_K): exactly zero, with no gradient, inside both bands."""
        unknown, known = self.distances(x)
        return (unknown - self.near).relu() + eta * (self.far - known).relu()


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """What is measured before training."""

    bands: Bands
    auc: float
    share: float
    """Share of held-out unknown names' mentions in held-out contexts that is inside the bands."""
    error: float
    """Share of a state's square that the SAE leaves unexplained, 90th percentile over unknown names."""
    variance: float
    """Variance of a feature among known names' states, mean over features."""


def bands_of(
    sae: Sae | None,
    chosen: Int[Tensor, " coordinate"],
    known: Float[Tensor, "known context d_model"],
    unknown: Float[Tensor, "unknown context d_model"],
    others: Float[Tensor, "other context d_model"],
) -> Bands:
    """The bands: the quartiles of D_U (upper) and D_K (lower) of unknown names that are no part of the reference."""
    raw = [(x if sae is None else pre_activations(sae, x))[..., chosen].flatten(0, 1) for x in (known, unknown)]
    both = torch.cat(raw)
    mean, std = both.mean(0), both.std(0).clamp(min=1e-6)
    centre_k, centre_u = (((group - mean) / std).mean(0) for group in raw)
    bare = Bands(sae, chosen, mean, std, known=centre_k, unknown=centre_u)
    near, far = (distance.flatten() for distance in bare.distances(others))
    return replace(bare, near=near.quantile(0.75).item(), far=far.quantile(0.25).item())


def separating(
    sae: Sae,
    known: Float[Tensor, "known context d_model"],
    unknown: Float[Tensor, "unknown context d_model"],
    n_latents: int,
    frequency: Float[Tensor, " d_sae"] | None = None,
    most: float = 1.0,
) -> Int[Tensor, " coordinate"]:
    """The n latents that are most known and the n that are most unknown, each once, in ascending order.

    Args:
        frequency: share of other tokens at which each is active; those above `most` are left out.

    Raises:
        ValueError: no latent is left.
    """
    scores = known_scores(sae, known, unknown)
    usable = torch.arange(len(scores), device=scores.device)
    if frequency is not None:
        usable = usable[frequency <= most]
    if not len(usable):
        raise ValueError(f"every latent is active on more than {most} of the retained tokens: raise background")
    ranked = usable[scores[usable].argsort(stable=True)]
    return torch.cat([ranked[:n_latents], ranked[-n_latents:]]).unique()


def active_rate(sae: Sae, states: Float[Tensor, "token d_model"]) -> Float[Tensor, " d_sae"]:
    """Share of tokens at which each latent is active."""
    return (sae.encode(states) > ACTIVE).float().mean(0)


def error_share(sae: Sae, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
    """||x - SAE(x)||^2 / ||x||^2."""
    return (x - sae.reconstruct(x)).square().sum(-1) / x.square().sum(-1).clamp(min=1e-12)
