"""How a verdict is measured: folds that share nothing, families left out, AUC and rates against closed forms."""

import numpy as np
import pytest

from mech_unlearn.verdict import evaluation as meta
from mech_unlearn.verdict.features import Pool
from tests.simulated import simulated


@pytest.fixture(scope="module")
def pool():
    return simulated(24, facts=2)


@pytest.fixture
def fits(monkeypatch):
    """What each calibration was fitted and calibrated on."""
    seen = []
    plain = meta.fit

    def fit(pool, fitted, calibrated):
        seen.append((pool, set(fitted), set(calibrated)))
        return plain(pool, fitted, calibrated)

    monkeypatch.setattr(meta, "fit", fit)
    return seen


@pytest.mark.slow
def test_every_group_is_judged_once_by_a_calibration_that_saw_neither_it_nor_its_retrained_model(pool, fits):
    judged = meta.rotate(pool)
    assert sorted(judged.pool.cluster) == sorted(pool.cluster)
    parts = meta.folds(pool)
    assert len(fits) == len(parts) == 8
    base = {g: b for g, b, t in zip(pool.group, pool.base, pool.truth, strict=True) if t == "deleted"}
    for part, (_, fitted, calibrated) in zip(parts, fits, strict=True):
        assert not set(part) & (fitted | calibrated) and not fitted & calibrated
        assert set(part) | fitted | calibrated == set(pool.group)
        assert not {base[g] for g in part} & {base[g] for g in fitted | calibrated}


def test_with_too_few_retrained_models_the_folds_are_dealt_evenly(pool):
    few = Pool(pool.x, pool.kind, pool.family, pool.cluster, pool.group, ("one",) * len(pool), pool.spread)
    parts = meta.folds(few)
    assert len(parts) == meta.FOLDS and {len(part) for part in parts} == {3}
    assert sorted(name for part in parts for name in part) == sorted(set(pool.group))


@pytest.mark.slow
def test_a_family_left_out_is_in_no_calibration_that_judges_it(pool, fits):
    found = meta.leave_one_out(pool)
    assert set(found) == {f for f, t in zip(pool.family, pool.truth, strict=True) if t == "suppressed"}
    for k, (family, judged) in enumerate(sorted(found.items())):
        assert set(judged.pool.family) == {family}
        assert all(family not in part.family for part, *_ in fits[8 * k : 8 * (k + 1)])


def test_auc_counts_ties_by_half_and_is_the_share_of_pairs_in_order():
    positive, negative = np.array([3.0, 2.0, 1.0]), np.array([2.0, 0.0])
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert meta.auc(positive, negative) == pytest.approx(np.mean(pairs))
    assert meta.auc(negative, positive) == pytest.approx(1 - np.mean(pairs))
    assert np.isnan(meta.auc(positive, np.array([])))


def test_an_interval_over_groups_is_wider_than_one_over_rows_that_repeat_within_groups():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=10), 20)
    groups = [str(i) for i in np.repeat(np.arange(10), 20)]
    rows = [str(i) for i in range(200)]
    by_group = meta.clustered([values], [groups], np.mean, "mean")
    by_row = meta.clustered([values], [rows], np.mean, "mean")
    assert by_group.n == 10 and by_row.n == 200 and by_group.value == by_row.value
    assert by_group.ci[1] - by_group.ci[0] > 2 * (by_row.ci[1] - by_row.ci[0])


def test_both_sides_of_a_comparison_are_drawn_together():
    """A level that a group gives to both sides is no uncertainty of their difference."""
    level = np.random.default_rng(0).normal(0, 10, 12)
    names = [str(i) for i in range(12)]
    found = meta.clustered([level + 1, level], [names, names], lambda a, b: a.mean() - b.mean(), "difference")
    assert found.ci == pytest.approx((1.0, 1.0))


def test_steadiness_and_recovery_are_those_of_the_paper_and_know_no_sign():
    assert meta.steadiness(0.2, 0.3) == pytest.approx(0.8)
    assert meta.steadiness(0.3, 0.2) == pytest.approx(0.8)
    assert meta.recovery_likeness(0.4, 0.1) == pytest.approx(0.4)
    assert meta.recovery_likeness(0.1, 0.4) == pytest.approx(0.4)
    assert meta.recovery_likeness(-0.2, -0.2) == pytest.approx(1.0)


def test_the_threshold_parts_two_separate_sides_in_the_middle_and_calls_the_higher_one_knowing():
    bound = meta.threshold([0.9, 1.0], [0.1, 0.2])
    assert bound == pytest.approx(0.55)
    assert meta.threshold([0.1], [0.9]) in (-np.inf, np.inf)  # the wrong way round nothing is gained


def test_rates_count_facts_and_groups_exactly(pool):
    judged = meta.rotate(pool)
    labels = np.array(judged.label, dtype=object)
    truth, group = np.array(judged.pool.truth), np.array(judged.pool.group)
    labels[truth == "suppressed"] = "suppressed"
    wrong = np.flatnonzero((truth == "suppressed") & (group == "3"))[:5]
    labels[wrong] = "deleted"
    changed = meta.Judged(judged.pool, tuple(labels), judged.suspicion, judged.still_there, judged.unlike)
    found = meta.rates(changed, {"a": changed})
    n = int((truth == "suppressed").sum())
    assert found["false_deleted"]["value"] == pytest.approx(5 / n)
    assert found["false_deleted"]["groups_with_any"]["value"] == pytest.approx(1 / 24)
    low, high = found["false_deleted"]["groups_with_any"]["ci"]
    assert low == pytest.approx(1 - 0.975 ** (1 / 24)) and high < 0.25
    assert found["confusion"]["suppressed"]["deleted"] == pytest.approx(5 / n)
    assert found["confusion_by_group"]["3"]["suppressed"]["deleted"] == 5
    assert sum(c for g in found["confusion_by_group"].values() for t in g.values() for c in t.values()) == len(labels)


@pytest.mark.slow
def test_with_truths_dealt_at_random_nothing_is_told_apart(pool):
    judged = meta.rotate(meta.permuted(pool))
    found = meta.auc_between(judged.suspicion, judged.pool, "suppressed", "deleted")
    assert abs(found.value - 0.5) < 0.15
    true = meta.rotate(pool)
    assert meta.auc_between(true.suspicion, true.pool, "suppressed", "deleted").value > 0.95
