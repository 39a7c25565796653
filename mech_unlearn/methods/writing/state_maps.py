"""Affine maps of residual-stream states, fitted on names to be forgotten against others, one site after the other."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.edit.edit import Edit
from mech_unlearn.edit.interventions import Affine, Where
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.anchors import known_names, unknown_names
from mech_unlearn.model.bridge import Model

Against = Literal["unknown", "retained"]
"""What forgotten names are compared with: names the model knows nothing about, or names of retained facts."""
Map = tuple[Tensor, Tensor, Tensor]
"""left [d_model, rank], right [rank, d_model] and center [d_model] of x - left right (x - center), float64."""
Fit = Callable[[Tensor, Tensor], Map]
"""From states [name, context, d_model] of forgotten and of other names to a map."""


def sites_of(model: Model, layers: Sequence[int] | None, kind: str) -> tuple[Site, ...]:
    """The sites, lowest first; by default the layers of `keys.default_layers`.

    Raises:
        ValueError: another kind than resid_pre or resid_post (a write at resid_mid reaches the MLP's input only, the
            stream goes past it), or a layer that the model lacks or that is given twice.
    """
    if kind not in ("resid_pre", "resid_post"):
        raise ValueError(f"kind={kind!r}: states are mapped in the residual stream, at resid_pre or resid_post")
    wanted = keys.default_layers(model.n_layers) if layers is None else tuple(layers)
    checked = keys.check_layers(model, wanted, max(wanted, default=0))
    return tuple(Site(layer, kind) for layer in checked)  # pyright: ignore[reportArgumentType]


def groups(forget: ForgetSet, retain: RetainSet, against: Against) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(Names to be forgotten with their aliases, names they are compared with).

    Raises:
        ValueError: no name to compare with.
    """
    other = unknown_names if against == "unknown" else known_names
    return keys.names_of(forget.entities), other(forget, retain)


def spelled(model: Model, names: Sequence[str], contexts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Every token sequence by which one of the names may occur, each once."""
    found = (tokens for name in names for tokens in keys.spellings(model.tokenizer, name, contexts))
    return tuple(dict.fromkeys(found))


def fitted(
    model: Model,
    names: Sequence[str],
    others: Sequence[str],
    contexts: Sequence[str],
    sites: Sequence[Site],
    fit: Fit,
    where: Where,
    skip_first: bool,
) -> tuple[Affine, ...]:
    """One map per site, lowest first, each fitted on states at the names' last tokens under the maps below it."""
    maps: tuple[Affine, ...] = ()
    subjects = () if where == "all" else spelled(model, names, contexts)
    for site in sites:
        with Edit(name="partial", base="", interventions=maps).on(model):
            own, other = (keys.name_states(model, group, contexts, site) for group in (names, others))
        left, right, center = (x.float().cpu().contiguous() for x in fit(own, other))
        new = Affine(
            site=site, subjects=subjects, left=left, right=right, center=center, where=where, skip_first=skip_first
        )
        maps += (new,)
    return maps


def mean_distance(
    own: Float[Tensor, "name context d_model"], other: Float[Tensor, "other context d_model"]
) -> Float[Tensor, " d_model"]:
    """Mean state of the names minus that of the others, over names and contexts."""
    return own.mean((0, 1)) - other.mean((0, 1))


def orthonormal(rows: Float[Tensor, "row d_model"], tolerance: float = 1e-10) -> Float[Tensor, "rank d_model"]:
    """Orthonormal directions that span the rows; shorter ones than `tolerance` of the longest are left out."""
    _, size, directions = torch.linalg.svd(rows, full_matrices=False)
    return directions[size > tolerance * size.max().clamp(min=1e-300)]
