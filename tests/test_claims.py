"""Claims about lists, entities and models: false discovery rates against simulation, shares against known mixtures."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

from mech_unlearn.claims import NULLS, corrected_intervals, corrected_shares, discoveries, entity_claim
from mech_unlearn.core import LABELS, Verdict


def said(p, label="deleted", name="x"):
    values = dict.fromkeys(NULLS, p)
    return Verdict(fact_id=name, label=label, sentence="", tests=(), scores={}, grade="A", p_values=values)


def judged(p, name):
    """As a calibration says it: deleted where the other truths are ruled out."""
    return said(p, "deleted" if p <= 0.05 else "suppressed", name)


@pytest.mark.parametrize("method", ["bh", "by"])
def test_of_a_list_of_true_nulls_hardly_any_survives_though_one_in_twenty_was_called_deleted(method):
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(200):
        rows = [judged(p, str(i)) for i, p in enumerate(rng.uniform(size=200))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            false += bool(discoveries(rows, method=method))
    assert false / 200 <= 0.06


def test_what_a_calibration_on_few_groups_can_say_survives_where_nearly_all_are_deleted_and_not_where_few_are():
    least = 1 / 28
    many = [said(least, name=str(i)) for i in range(30)]
    assert len(discoveries(many, method="bh")) == 30
    mixed = many[:10] + [said(0.5, "suppressed", str(i)) for i in range(30)]
    with pytest.warns(UserWarning, match="none of 10 claims .* least p-value is 0.036"):
        assert discoveries(mixed, method="bh") == ()
    untestable = [replace(v, flags=("not_testable",)) for v in mixed[10:]]
    assert len(discoveries(many[:10] + untestable, method="bh")) == 10


def test_the_dependent_rule_is_the_stricter_one_and_other_labels_claim_nothing():
    rows = [said(p, name=str(i)) for i, p in enumerate((0.001, 0.01, 0.02, 0.04))]
    assert set(discoveries(rows, method="by")) < set(discoveries(rows, method="bh"))
    assert discoveries([said(1e-9, "suppressed")]) == ()


def test_a_claim_has_to_rule_out_that_the_fact_is_intact_or_the_model_broken_too():
    for truth in NULLS:
        weak = replace(said(0.001), p_values=dict.fromkeys(NULLS, 0.001) | {truth: 0.4})
        with pytest.warns(UserWarning, match="least p-value is 0.400"):
            assert discoveries([weak]) == ()


def test_an_entity_is_claimed_by_its_least_certain_fact():
    assert entity_claim([said(0.01), said(0.03)]) == 0.03
    rng = np.random.default_rng(0)  # one fact is not deleted (uniform), the others are: the claim keeps its level
    level = [entity_claim([said(rng.uniform()), said(1e-4), said(1e-4)]) <= 0.05 for _ in range(2000)]
    assert np.mean(level) <= 0.06


def test_a_provisional_verdict_has_no_p_value_to_correct():
    bare = Verdict(fact_id="a", label="deleted", sentence="", tests=(), scores={}, grade="A")
    for call in (lambda: discoveries([bare]), lambda: entity_claim([bare])):
        with pytest.raises(ValueError, match="judged without a calibration"):
            call()
    with pytest.raises(ValueError, match="at least one"):
        entity_claim([])
    with pytest.raises(ValueError, match="between 0 and 1"):
        discoveries([], q=1.5)


def test_shares_are_freed_from_the_errors_that_were_measured():
    confusion = {
        "deleted": {"deleted": 0.8, "suppressed": 0.05, "undetermined": 0.15},
        "suppressed": {"suppressed": 0.9, "deleted": 0.02, "undetermined": 0.08},
        "intact": {"intact": 1.0},
    }
    truth = {"deleted": 0.5, "suppressed": 0.3, "intact": 0.2}
    shares = {label: sum(truth[t] * confusion[t].get(label, 0.0) for t in truth) for label in LABELS}
    got = corrected_shares(shares, confusion)
    assert got == pytest.approx(truth, abs=1e-6) and sum(got.values()) == pytest.approx(1.0)
    assert corrected_shares({"deleted": 1.0}, confusion)["deleted"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="sum to 1"):
        corrected_shares({"deleted": 0.4}, confusion)


def test_the_interval_of_a_share_covers_it_widens_with_few_groups_and_is_a_point_without_errors():
    rng = np.random.default_rng(0)
    rate = {"deleted": (0.8, 0.05, 0.15), "suppressed": (0.02, 0.9, 0.08)}
    named = ("deleted", "suppressed", "undetermined")

    def counts(truth, n):
        return dict(zip(named, rng.multinomial(n, rate[truth]).tolist()))

    hits, widths = 0, {40: [], 10: []}
    for groups in widths:
        for _ in range(40):
            known = {str(g): {truth: counts(truth, 30) for truth in rate} for g in range(groups)}
            labels = {str(g): counts("deleted" if rng.uniform() < 0.6 else "suppressed", 6) for g in range(groups)}
            low, high = corrected_intervals(labels, known)["deleted"]
            hits += low <= 0.6 <= high
            widths[groups].append(high - low)
    assert hits >= 0.85 * 80
    assert np.mean(widths[10]) > np.mean(widths[40])
    sure = {"a": {"deleted": {"deleted": 5}, "suppressed": {"suppressed": 5}}}
    assert corrected_intervals({"x": {"deleted": 4}}, sure)["deleted"] == pytest.approx((1.0, 1.0))
