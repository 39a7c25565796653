"""Means with intervals: a percentile bootstrap over clusters, because facts of one entity are not independent."""

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Measurement

DRAWS = 2000
"""Bootstrap resamples. Source: Efron and Tibshirani 1993, section 13.3 (1,000 or more for percentile intervals)."""


def mean_ci(
    values: Float[Tensor, " value"] | Sequence[float],
    unit: str,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Measurement:
    """The mean with its 95 % percentile-bootstrap interval; `n` counts the values. NaN values are left out.

    Whole clusters are drawn with replacement; without `clusters` each value is its own. The mean of a resample is the
    sum over the drawn clusters divided by the number of their values. The seed is the function's own; the caller's
    random state is not touched.

    Raises:
        ValueError: no value left, or another number of clusters than of values.
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    names = list(range(len(x))) if clusters is None else list(clusters)
    if len(names) != len(x):
        raise ValueError(f"{len(x)} values but {len(names)} clusters")
    kept = [i for i, ok in enumerate((~x.isnan()).tolist()) if ok]
    if not kept:
        raise ValueError(f"no value to average ({unit}): {len(x)} given, none of them a number")
    order: dict[Hashable, int] = {}
    index = torch.tensor([order.setdefault(names[i], len(order)) for i in kept])
    sums = torch.zeros(len(order), dtype=torch.float64).index_add(0, index, x[kept])
    counts = torch.bincount(index, minlength=len(order)).double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(order), (DRAWS, len(order)), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Measurement(value=x[kept].mean().item(), ci=(low, high), n=len(kept), unit=unit)
