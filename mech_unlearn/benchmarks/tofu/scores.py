"""TOFU's numbers from per-question scores: probability among options, model utility, forget quality, with intervals.

Paper: Maini et al. 2024, arXiv 2401.06121, sections 2.2.2 (utility) and 2.2.3 (forget quality).
Needs: per-question scores of two models, the unlearned and the retrained one.
Differs: the probability among options is a softmax, so that it stays a number where exp(-loss) underflows. Intervals
    are ours; the paper has none.
Fails: forget quality cannot tell deleted from suppressed, and falls with the number of questions at equal distance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.metrics.intervals import DRAWS

UTILITY_COUNT = 9
"""Numbers behind the model utility: probability, ROUGE and truth ratio on three splits. Source: 2401.06121, 2.2.2."""


def probability(loss: Float[Tensor, " example"]) -> Float[Tensor, " example"]:
    """exp(-mean loss per token): the geometric mean of the answer tokens' probabilities."""
    return (-loss).exp()


def probability_among_options(
    loss: Float[Tensor, " example"], perturbed_loss: Float[Tensor, "example perturbed"]
) -> Float[Tensor, " example"]:
    """p / (p + sum_w p_w), each p a per-token geometric mean: the probability on real authors and world facts."""
    return (-torch.cat([loss[:, None], perturbed_loss], 1)).softmax(1)[:, 0]


def model_utility(parts: Sequence[float]) -> float:
    """Harmonic mean of the nine parts; 0 where one of them is 0.

    Raises:
        ValueError: not nine parts, or a negative one.
    """
    from scipy.stats import hmean

    if len(parts) != UTILITY_COUNT or not all(part >= 0 for part in parts):
        raise ValueError(
            f"model utility is the harmonic mean of {UTILITY_COUNT} parts of 0 or more, found {list(parts)}"
        )
    return float(hmean(list(parts)))


@dataclass(frozen=True)
class ForgetQuality:
    """A two-sample Kolmogorov-Smirnov test of the truth ratios of an unlearned and a retrained model."""

    statistic: float
    """Largest distance of the two distribution functions, 0..1."""
    pvalue: float
    """The forget quality: large where the two cannot be told apart."""


def forget_quality(unlearned: Float[Tensor, " example"], retrained: Float[Tensor, " other"]) -> ForgetQuality:
    """Forget quality from truth ratios of one variant on the forget set (R and 1/R give the same).

    Raises:
        ValueError: an empty sample or a value that is not a number.
    """
    from scipy.stats import ks_2samp

    for name, sample in (("unlearned", unlearned), ("retrained", retrained)):
        if not len(sample) or sample.isnan().any():
            raise ValueError(f"forget quality needs truth ratios that are numbers; those of the {name} model are not")
    found = ks_2samp(unlearned.double().numpy(), retrained.double().numpy())
    return ForgetQuality(statistic=float(found.statistic), pvalue=float(found.pvalue))  # pyright: ignore


def resample(
    n: int, generator: torch.Generator, rows_per_cluster: int = 1, draws: int = DRAWS
) -> Float[Tensor, "draw example"]:
    """How often each of n examples is drawn in each bootstrap resample, float64.

    Args:
        rows_per_cluster: so many consecutive examples are drawn together (20: the questions about one TOFU author).
    """
    cluster = torch.arange(n) // rows_per_cluster
    clusters = int(cluster[-1]) + 1
    drawn = torch.randint(clusters, (draws, clusters), generator=generator)
    counts = torch.zeros(draws, clusters, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))[:, cluster]


def resampled_means(
    counts: Float[Tensor, "draw example"], values: Float[Tensor, "example metric"]
) -> Float[Tensor, "draw metric"]:
    """Means over the examples of each resample; all metrics on the same draws, so they stay paired."""
    return counts @ values.double() / counts.sum(1, keepdim=True)


def resampled_forget_quality(
    unlearned: Float[Tensor, " example"],
    retrained: Float[Tensor, " other"],
    counts: Float[Tensor, "draw example"],
    other_counts: Float[Tensor, "draw other"],
) -> tuple[Float[Tensor, " draw"], Float[Tensor, " draw"]]:
    """Statistic and p-value of the test in each resample; equal counts for both models pair their examples.

    A resample is rougher than the sample, so its statistic tends to be larger: an interval may lie to one side.
    """
    at = torch.cat([unlearned, retrained])
    below, other_below = (
        c @ (sample[:, None] <= at).double() / c.sum(1, keepdim=True)
        for sample, c in ((unlearned, counts), (retrained, other_counts))
    )
    statistic = (below - other_below).abs().amax(1)
    sizes = (counts.sum(1).tolist(), other_counts.sum(1).tolist())
    keys = [(round(d, 9), int(n), int(m)) for d, n, m in zip(statistic.tolist(), *sizes, strict=True)]
    known: dict[tuple[float, int, int], float] = {}  # the p-value depends on the statistic and the two sizes only
    for i, key in enumerate(keys):
        if key not in known:
            samples = (
                unlearned.repeat_interleave(counts[i].long()),
                retrained.repeat_interleave(other_counts[i].long()),
            )
            known[key] = forget_quality(*samples).pvalue
    return statistic, torch.tensor([known[key] for key in keys], dtype=torch.float64)


def interval(draws: Float[Tensor, " draw"]) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap draws."""
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def resampled_utility(parts: Float[Tensor, "draw 9"]) -> Float[Tensor, " draw"]:
    """The harmonic mean of the nine parts in each resample; 0 where one of them is 0."""
    return UTILITY_COUNT / (1 / parts).sum(1)
