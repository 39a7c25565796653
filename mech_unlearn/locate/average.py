"""From scores per fact to their mean with an interval that respects facts about one subject."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mech_unlearn.core import Attribution, Fact

INTERVAL = "95 % normal interval, cluster-robust over groups of facts"


def over_facts(result: Attribution, facts: Sequence[Fact]) -> Attribution:
    """Mean over the first axis (one entry per fact), leaving out NaN, with a 95 % interval.

    The interval is normal and its variance cluster-robust, (G / (G - 1)) / n^2 * sum over groups of the squared sum
    of residuals, because facts about one subject are not independent. Source: Liang and Zeger 1986, Biometrika 73,
    eq. 2, with the usual small-sample factor. NaN where only one group has a value.
    """
    values = result.values.double()
    known = ~values.isnan()
    count = known.sum(0)
    mean = values.nan_to_num().sum(0) / count
    residual = torch.where(known, values - mean, 0.0)
    names = [fact.group or fact.subject for fact in facts]
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    index = torch.tensor([order[name] for name in names])

    def by_group(x: Tensor) -> Tensor:
        return torch.zeros(len(order), *x.shape[1:], dtype=torch.float64).index_add(0, index, x.double())

    groups = (by_group(known) > 0).sum(0)
    variance = by_group(residual).square().sum(0) / count**2 * groups / (groups - 1)
    half = 1.96 * variance.masked_fill(groups < 2, float("nan")).sqrt()
    return Attribution(
        name=result.name,
        values=mean.float(),
        axes=result.axes[1:],
        labels={axis: result.labels[axis] for axis in result.axes[1:]},
        unit=result.unit,
        n=len(facts),
        low=(mean - half).float(),
        high=(mean + half).float(),
        note=f"{result.note}; {INTERVAL} ({len(order)} groups)",
    )
