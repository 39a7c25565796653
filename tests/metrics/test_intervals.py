"""Bootstrap intervals: closed forms, clusters, coverage, and refusals."""

import pytest
import torch

from mech_unlearn.metrics import mean_ci
from mech_unlearn.metrics.intervals import pairs_won, resampled_aucs


def test_a_constant_has_no_width_and_the_mean_is_the_mean():
    same = mean_ci([0.25] * 20, "x")
    assert (same.value, same.ci, same.n, same.unit) == (0.25, (0.25, 0.25), 20, "x")
    assert mean_ci([1.0, 2.0, 6.0], "x").value == pytest.approx(3.0)


def test_the_interval_of_independent_values_is_that_of_the_normal_approximation():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = mean_ci(x, "x").ci
    assert (high - low) / 2 == pytest.approx(1.96 * x.std().item() / 20, rel=0.1)


def test_values_that_agree_within_clusters_widen_the_interval():
    x = torch.randn(30, generator=torch.Generator().manual_seed(1)).repeat_interleave(10)
    clusters = [i // 10 for i in range(300)]
    loose, tight = mean_ci(x, "x", clusters), mean_ci(x, "x")
    assert loose.value == pytest.approx(tight.value)
    ratio = (loose.ci[1] - loose.ci[0]) / (tight.ci[1] - tight.ci[0])
    assert ratio == pytest.approx(10**0.5, rel=0.15)


def test_95_percent_intervals_cover_the_truth_about_95_times_in_100():
    generator = torch.Generator().manual_seed(2)
    inside = 0
    for seed in range(100):
        low, high = mean_ci(torch.randn(60, generator=generator), "x", seed=seed).ci
        inside += low <= 0 <= high
    assert 88 <= inside <= 100


def test_nan_is_left_out_and_the_callers_random_state_is_untouched():
    state = torch.get_rng_state()
    got = mean_ci(torch.tensor([1.0, float("nan"), 3.0]), "x")
    assert (got.value, got.n) == (2.0, 2) and torch.equal(state, torch.get_rng_state())
    assert got == mean_ci(torch.tensor([1.0, float("nan"), 3.0]), "x")


def test_nothing_to_average_and_wrong_clusters_are_refused():
    with pytest.raises(ValueError, match="no value"):
        mean_ci([float("nan")], "x")
    with pytest.raises(ValueError, match="clusters"):
        mean_ci([1.0, 2.0], "x", ["a"])


@pytest.mark.parametrize("ties", (True, False))
def test_the_aucs_are_those_of_scikit_learn_on_the_values_and_on_each_resample(ties):
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    draw = torch.randint if ties else None
    a, b = (
        draw(0, 5, (2, n), generator=generator).float() if draw else torch.randn(2, n, generator=generator)
        for n in (20, 30)
    )
    labels = [1] * 20 + [0] * 30
    got = resampled_aucs(a, b, torch.Generator().manual_seed(3), draws=50)
    assert got.shape == (51, 2)
    again = torch.Generator().manual_seed(3)
    rows, others = (torch.randint(n, (50, n), generator=again) for n in (20, 30))
    for model in range(2):
        want = [roc_auc_score(labels, torch.cat([a[model], b[model]]))]
        want += [roc_auc_score(labels, torch.cat([a[model, p], b[model, n]])) for p, n in zip(rows, others)]
        assert got[:, model].tolist() == pytest.approx(want, abs=1e-12)
    flipped = resampled_aucs(b, a, torch.Generator().manual_seed(3), draws=1)[0]
    assert flipped.tolist() == pytest.approx((1 - got[0]).tolist())


def test_a_pair_is_won_lost_or_shared():
    assert pairs_won(torch.tensor([2.0, 1.0]), torch.tensor([1.0])).tolist() == [[1.0], [0.5]]
    assert pairs_won(torch.ones(3), torch.ones(2)).mean() == 0.5
