"""Paired differences and functions of means: closed forms, scipy's bootstrap, clusters, and what is never compared."""

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from mech_unlearn.metrics.intervals import RowScores, mean_ci, paired_difference, statistic_ci


def noise(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_what_makes_a_row_hard_for_both_models_cancels():
    hard = 10 * noise(200)
    a, b = hard + 0.1 * noise(200, 1) + 0.5, hard + 0.1 * noise(200, 2)
    paired = paired_difference(a, b, "x")
    apart = mean_ci(a, "x").ci[1] - mean_ci(a, "x").ci[0]
    assert paired.value == pytest.approx((a - b).mean().item()) and paired.n == 200
    assert paired.ci[0] > 0.4 and paired.ci[1] - paired.ci[0] < apart / 20
    back = paired_difference(b, a, "x")
    assert back.value == pytest.approx(-paired.value) and back.ci[0] == pytest.approx(-paired.ci[1])


def test_the_interval_is_that_of_scipys_paired_percentile_bootstrap():
    a, b = noise(80, 1), noise(80, 2) + 0.3
    found = paired_difference(a, b, "x")
    other = bootstrap(
        (a.numpy(), b.numpy()),
        lambda x, y, axis=-1: (x - y).mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert found.ci == pytest.approx((other.low, other.high), abs=0.03)


def test_clusters_widen_a_difference_and_a_row_missing_in_one_model_is_left_out_of_both():
    base = noise(30).repeat_interleave(10)
    clusters = [i // 10 for i in range(300)]
    width = [m.ci[1] - m.ci[0] for m in (paired_difference(base, base * 0, "x", c) for c in (clusters, None))]
    assert width[0] / width[1] == pytest.approx(10**0.5, rel=0.15)
    got = paired_difference([1.0, float("nan"), 3.0, 4.0], [0.0, 5.0, float("nan"), 1.0], "x")
    assert (got.value, got.n) == (2.0, 2)
    with pytest.raises(ValueError, match="same rows"):
        paired_difference(torch.ones(1), torch.ones(2), "x")


def test_a_statistic_of_one_column_is_the_mean_and_its_interval_that_of_the_mean():
    x = noise(60).float()
    clusters = [i % 20 for i in range(60)]
    got, want = statistic_ci(x[:, None], lambda m: m[:, 0], "x", clusters), mean_ci(x, "x", clusters)
    assert got.value == pytest.approx(want.value) and got.ci == pytest.approx(want.ci, abs=1e-9) and got.n == want.n


def test_a_ratio_of_paired_means_is_resampled_by_rows_and_columns_may_lack_rows():
    a = noise(100).abs() + 1
    table = torch.stack([2 * a, a], 1)
    got = statistic_ci(table, lambda m: m[:, 0] / m[:, 1], "x")
    assert got.value == pytest.approx(2) and got.ci == pytest.approx((2, 2))
    table[::2, 1] = torch.nan
    loose = statistic_ci(table, lambda m: m[:, 0] / m[:, 1], "x")
    assert loose.value == pytest.approx((2 * a).mean().item() / a[1::2].mean().item()) and loose.n == 100
    slow = []
    for draw in range(400):
        rows = torch.randint(100, (100,), generator=torch.Generator().manual_seed(draw))
        slow.append((table[rows, 0].mean() / table[rows, 1].nanmean()).item())
    assert loose.ci == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.05)


def test_an_undefined_statistic_an_empty_column_and_wrong_clusters_are_refused():
    table = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    with pytest.raises(ValueError, match="undefined"):
        statistic_ci(table, lambda m: m[:, 0] / m[:, 1], "x")
    for bad in (table * torch.tensor([1.0, torch.nan]), table[:0]):
        with pytest.raises(ValueError, match="without any number"):
            statistic_ci(bad, lambda m: m[:, 0], "x")
    with pytest.raises(ValueError, match="clusters"):
        statistic_ci(table, lambda m: m[:, 0], "x", ["a"])


def test_scores_of_two_kinds_or_of_other_rows_are_never_compared():
    one, two = torch.tensor([0.5, 1.0]), torch.tensor([0.0, 1.0])
    text = RowScores(values=one, unit="ROUGE", clusters=("a", "b"))
    assert text.minus(RowScores(values=two, unit="ROUGE", clusters=("a", "b"))).value == 0.25
    assert text.minus(text).unit == "difference of ROUGE" and text.mean().value == 0.75
    with pytest.raises(ValueError, match="two kinds"):
        text.minus(RowScores(values=two, unit="probability", clusters=("a", "b")))
    with pytest.raises(ValueError, match="same rows"):
        text.minus(RowScores(values=two, unit="ROUGE", clusters=("a", "c")))
