"""Where forgotten prompts differ from others: a direction in the MLP outputs of one layer, and how large the effect is.

Source: KIF, arXiv 2601.10566 (activation signature). It measures the effect on the prompts that gave the direction,
which finds one in pure noise as soon as there are more features than prompts; here each bootstrap draws prompts for the
direction and measures on those it left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import ordinary_positions, stream


@dataclass(frozen=True, eq=False, kw_only=True)
class Signature:
    """The layer whose MLP output tells forgotten prompts from others best, and how."""

    layer: int
    direction: Float[Tensor, " d_model"]
    """Unit vector in standardised coordinates; forgotten prompts project higher."""
    mean: Float[Tensor, " d_model"]
    std: Float[Tensor, " d_model"]
    """Mean and standard deviation of both groups together, by which coordinates are standardised."""
    effect: Float[Tensor, " layer"]
    """Difference of mean projections over their pooled standard deviation: mean over bootstraps."""
    low: Float[Tensor, " layer"]
    high: Float[Tensor, " layer"]
    """95 % interval over bootstraps."""


def signature(
    model: Model,
    forget: Sequence[Sequence[int]],
    control: Sequence[Sequence[int]],
    *,
    bootstraps: int = 100,
    seed: int = 0,
) -> Signature:
    """The signature of some prompts (rows of token ids) against control prompts, best of all layers.

    Raises:
        ValueError: fewer than two prompts in a group.
    """
    if min(len(forget), len(control)) < 2:
        raise ValueError(f"a signature needs two prompts of each kind, got {len(forget)} and {len(control)}")
    groups = [mean_outputs(model, rows) for rows in (forget, control)]
    layers = range(model.n_layers)
    found = torch.stack([effects(groups[0][k], groups[1][k], bootstraps, seed) for k in layers])
    effect = found.mean(1)
    layer = int(effect.argmax())
    mean, std, direction = contrast(groups[0][layer], groups[1][layer])
    low, high = found.quantile(torch.tensor([0.025, 0.975]).to(found), dim=1)
    return Signature(layer=layer, direction=direction, mean=mean, std=std, effect=effect, low=low, high=high)


def mean_outputs(model: Model, rows: Sequence[Sequence[int]]) -> Float[Tensor, "layer row d_model"]:
    """MLP outputs as they enter the residual stream, mean over the ordinary tokens of each row, float64 on the CPU."""
    sites = [Site(layer, "mlp_out") for layer in range(model.n_layers)]
    out = torch.zeros(model.n_layers, len(rows), model.d_model, dtype=torch.float64)
    count = torch.tensor([len(places) for places in ordinary_positions(model, rows)])
    if not count.all():
        raise ValueError("a prompt holds no token behind its first: a signature needs longer prompts")
    for part in stream(model, rows, sites, "ordinary"):
        at = part.index[:, 0]
        for layer, site in enumerate(sites):
            out[layer].index_add_(0, at, part.at[site].double())
    return out / count[:, None]


def contrast(
    forget: Float[Tensor, "forget width"], control: Float[Tensor, "control width"]
) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"], Float[Tensor, " width"]]:
    """(Mean, standard deviation, unit direction from control to forget in coordinates standardised by them)."""
    both = torch.cat([forget, control])
    mean, std = both.mean(0), both.std(0).clamp(min=1e-8)
    direction = (forget.mean(0) - control.mean(0)) / std
    return mean, std, direction / direction.norm().clamp(min=1e-12)


def effect_size(first: Float[Tensor, " first"], second: Float[Tensor, " second"]) -> float:
    """(Mean of the first - mean of the second) over the pooled standard deviation, as Cohen's d."""
    n, m = len(first), len(second)
    pooled = ((n - 1) * first.var() + (m - 1) * second.var()) / (n + m - 2)
    return ((first.mean() - second.mean()) / pooled.sqrt().clamp(min=1e-12)).item()


def effects(
    forget: Float[Tensor, "forget width"], control: Float[Tensor, "control width"], bootstraps: int, seed: int
) -> Float[Tensor, " bootstrap"]:
    """Effect sizes of directions from drawn prompts, on the prompts that were not drawn (two of each kind at least)."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(bootstraps):
        drawn, left = [], []
        for group in (forget, control):
            picked = torch.randint(len(group), (len(group),), generator=generator)
            out = torch.ones(len(group), dtype=torch.bool)
            out[picked] = False
            drawn.append(group[picked])
            left.append(group[out])
        if min(len(part) for part in left) < 2:
            continue
        mean, std, direction = contrast(drawn[0], drawn[1])
        found.append(effect_size(*(((part - mean) / std) @ direction for part in left)))
    if not found:
        raise ValueError("too few prompts for a bootstrap to leave two of each kind out: give more")
    return torch.tensor(found, dtype=torch.float64)
