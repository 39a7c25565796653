"""Consensus: where several locators agree, on one picture.

Needs:    Attributions over the same two axes, for example (token, layer) or (layer, neuron).
Differs:  locators have different units, so each is replaced by its ranks: 0 for its smallest value, 1 for its largest,
          ties shared; cells that a locator did not measure are left out of the mean.
Fails:    ranks hide how much stronger the first place is than the second, and locators that share an assumption
          (gradients, noise) agree for that reason too.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import Attribution


def ranks(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Rank of each value among all, as a share in [0, 1]; ties share their mean rank, NaN stays NaN."""
    from scipy.stats import rankdata

    flat = values.flatten().double().numpy()
    place = rankdata(flat, nan_policy="omit")
    count = int((~values.isnan()).sum())
    return torch.from_numpy((place - 1) / max(1, count - 1)).float().view_as(values)


def consensus(results: Mapping[str, Attribution], weights: Mapping[str, float] | None = None) -> Attribution:
    """Mean rank of each cell over locators (1 = every locator's first place): axes of the results.

    Labels that only some results have are left out, so that token classes and layers are matched by name. `low` and
    `high` are the smallest and largest rank, not an interval.

    Args:
        results: name -> what that locator found.
        weights: name -> weight in the mean; 1 where not given.

    Raises:
        ValueError: fewer than two results, other axes, no label in common, or a weight for no result.
    """
    if len(results) < 2:
        raise ValueError(f"a consensus of {len(results)} locators: give two or more")
    first = next(iter(results.values()))
    for name, result in results.items():
        if result.axes != first.axes:
            raise ValueError(f"{name!r} has axes {result.axes}, {next(iter(results))!r} has {first.axes}")
    if unknown := set(weights or {}) - set(results):
        raise ValueError(f"weights name {sorted(unknown)}, which are no results")
    labels = {axis: _common(axis, [r.labels[axis] for r in results.values()]) for axis in first.axes}
    stacked = torch.stack([ranks(_cut(result, labels)) for result in results.values()])
    weight = torch.tensor([(weights or {}).get(name, 1.0) for name in results])
    weight = weight.view(-1, *[1] * len(first.axes)) * ~stacked.isnan()
    return Attribution(
        name="consensus",
        values=(stacked.nan_to_num() * weight).sum(0) / weight.sum(0),
        axes=first.axes,
        labels=labels,
        unit="mean rank (1 = every locator's first place)",
        n=min(result.n for result in results.values()),
        low=stacked.nan_to_num(nan=torch.inf).amin(0).nan_to_num(posinf=torch.nan),
        high=stacked.nan_to_num(nan=-torch.inf).amax(0).nan_to_num(neginf=torch.nan),
        note=f"{len(results)} locators: {', '.join(results)}; low and high are the extreme ranks, not an interval",
    )


def _common(axis: str, labels: Sequence[tuple]) -> tuple:
    shared = tuple(label for label in labels[0] if all(label in other for other in labels))
    if not shared:
        raise ValueError(f"the results have no {axis} in common")
    return shared


def _cut(result: Attribution, labels: Mapping[str, tuple]) -> Tensor:
    """The values at some labels, in their order."""
    values = result.values
    for dim, axis in enumerate(result.axes):
        at = {label: i for i, label in enumerate(result.labels[axis])}
        values = values.index_select(dim, torch.tensor([at[label] for label in labels[axis]]))
    return values
