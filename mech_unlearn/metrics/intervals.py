"""Means with intervals: a percentile bootstrap over clusters, because facts of one entity are not independent.

Two models are compared on the same rows: the difference of each row is resampled (`paired_difference`), so that what
makes a question hard for both cancels.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

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


def paired_difference(
    values: Float[Tensor, " row"] | Sequence[float],
    reference: Float[Tensor, " other"] | Sequence[float],
    unit: str,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Measurement:
    """Mean of `values` - `reference` over the rows that both have, with its 95 % paired bootstrap interval.

    Row i of both is the same question put to two models; a row that is NaN in either is left out of both. `n` counts
    pairs. Clusters and percentiles as in `mean_ci`. Source: Efron and Tibshirani 1993, chapter 8 (paired data).

    Raises:
        ValueError: another number of rows in the two, no pair left, or another number of clusters than of rows.
    """
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (values, reference))
    if len(a) != len(b):
        raise ValueError(f"{len(a)} rows against {len(b)}: a paired difference needs both models on the same rows")
    return mean_ci(a - b, unit, clusters, seed)


def statistic_ci(
    table: Float[Tensor, "row column"],
    statistic: Callable[[Float[Tensor, "draw column"]], Float[Tensor, " draw"]],
    unit: str,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Measurement:
    """A function of the columns' means with its 95 % percentile-bootstrap interval; all columns of a row are drawn
    together, so columns of two models on the same rows are paired.

    NaN marks a row that a column does not have; each mean is over the rows that have it. A draw that leaves a column
    empty, or whose statistic is no number, is left out of the percentiles. `n` counts rows with any value.

    Raises:
        ValueError: a column without a value, a statistic that is no finite number, or another number of clusters.
    """
    x = table.double()
    names = list(range(len(x))) if clusters is None else list(clusters)
    if len(names) != len(x):
        raise ValueError(f"{len(x)} rows but {len(names)} clusters")
    known = ~x.isnan()
    if len(x) == 0 or not known.any(0).all():
        raise ValueError(f"no value to average ({unit}): {len(x)} rows, and a column without any number")
    order: dict[Hashable, int] = {}
    index = torch.tensor([order.setdefault(name, len(order)) for name in names])
    empty = torch.zeros(len(order), x.shape[1], dtype=torch.float64)
    sums, counts = (empty.index_add(0, index, part) for part in (x.nan_to_num(), known.double()))
    value = statistic((sums.sum(0) / counts.sum(0))[None])[0].item()
    if not math.isfinite(value):
        raise ValueError(f"{unit}: {value} on the rows given, so it has no interval; the means leave it undefined")
    drawn = torch.randint(len(order), (DRAWS, len(order)), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(DRAWS, len(order), dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    found = statistic((weights @ sums) / (weights @ counts))
    found = found[found.isfinite()]
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Measurement(value=value, ci=(low, high), n=int(known.any(1).sum()), unit=unit)


def pairs_won(positive: Float[Tensor, "*any p"], negative: Float[Tensor, "*any n"]) -> Float[Tensor, "*any p n"]:
    """1 for each pair in which the positive has the higher score, 1/2 for a tie; float64. The mean is the AUC."""
    apart = positive.double()[..., :, None] - negative.double()[..., None, :]
    return (apart > 0).double() + (apart == 0).double() / 2


def resampled_aucs(
    positive: Float[Tensor, "model p"],
    negative: Float[Tensor, "model n"],
    generator: torch.Generator,
    draws: int = DRAWS,
) -> Float[Tensor, "draw model"]:
    """Areas under the ROC curve (row 0), and on bootstrap resamples within each side, the same rows for all models.

    Equal to scikit-learn's `roc_auc_score`, which is used wherever one AUC is wanted: it takes about a millisecond for
    each, so that the resamples of a locator over all layers would take minutes.
    """

    def weights(size: int) -> Float[Tensor, "draw size"]:
        drawn = torch.randint(size, (draws, size), generator=generator)
        counts = torch.zeros(draws, size).scatter_add_(1, drawn, torch.ones(draws, size))
        return torch.cat([torch.ones(1, size), counts]).double()

    a, b = weights(positive.shape[1]), weights(negative.shape[1])
    won = torch.stack([((a @ part) * b).sum(1) for part in pairs_won(positive, negative)], 1)
    return won / (a.sum(1) * b.sum(1))[:, None]


@dataclass(frozen=True, eq=False, kw_only=True)
class RowScores:
    """One score per row of one model, with what is needed to average it or to compare it with another model's."""

    values: Float[Tensor, " row"]
    unit: str
    """What was measured and in what variant; only scores of one unit are ever compared."""
    clusters: tuple[Hashable, ...] | None = None
    """What each row belongs to; rows of one cluster are drawn together."""
    texts: tuple[str, ...] = ()
    """What the model wrote, where the score is of generated text; else none."""

    def mean(self, seed: int = 0) -> Measurement:
        """The mean over rows; see `mean_ci`."""
        return mean_ci(self.values, self.unit, self.clusters, seed)

    def minus(self, reference: "RowScores", seed: int = 0) -> Measurement:
        """The mean of this minus another model's score on the same rows; see `paired_difference`.

        Raises:
            ValueError: scores of another unit, of another number of rows or of other clusters.
        """
        if self.unit != reference.unit:
            raise ValueError(f"{self.unit!r} minus {reference.unit!r}: scores of two kinds have no difference")
        if self.clusters != reference.clusters:
            raise ValueError(f"{self.unit}: the two models were not scored on the same rows (other clusters)")
        return paired_difference(self.values, reference.values, f"difference of {self.unit}", self.clusters, seed)
