"""Claims about lists, entities and models: false discovery rates against simulation, shares against known mixtures."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

from mech_unlearn.core import LABELS, Fact, Verdict
from mech_unlearn.verdict.claims import NULLS, corrected_intervals, corrected_shares, discoveries, entity_claim


def said(p, label="deleted", name="x"):
    values = dict.fromkeys(NULLS, p)
    return Verdict(fact_id=name, label=label, sentence="", tests=(), scores={}, grade="A", p_values=values)


def judged(p, name):
    """As a calibration says it: deleted where the other truths are ruled out."""
    return said(p, "deleted" if p <= 0.05 else "suppressed", name)


def people(*sizes):
    """(Fact ids, facts): so many facts of each of the people 0, 1, ..."""
    facts = tuple(
        Fact(id=f"{who}.{i}", subject=str(who), relation="r", object="x", prompt="{} is")
        for who, size in enumerate(sizes)
        for i in range(size)
    )
    return [fact.id for fact in facts], facts


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["bh", "by"])
def test_of_a_list_of_true_nulls_hardly_any_survives_though_one_in_twenty_was_called_deleted(method):
    rng = np.random.default_rng(0)
    names, facts = people(*[1] * 200)
    false = 0
    for _ in range(200):
        rows = [judged(p, name) for name, p in zip(names, rng.uniform(size=200))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            false += bool(discoveries(rows, facts, method=method))
    assert false / 200 <= 0.06


def test_true_deletions_at_the_least_p_value_survive_benjamini_hochberg_and_not_yekutieli():
    """By hand: 1/36 <= .05 at every rank; by Yekutieli 1/36 x (1 + 1/2 + ... + 1/209) = .164, and of 40 people .119."""
    for sizes in ([1] * 209, [6] * 9 + [5] * 31):  # 209 facts, of as many people or of 40
        names, facts = people(*sizes)
        rows = [said(1 / 36, name=name) for name in names]
        assert len(rows) == 209
        assert discoveries(rows, facts) == tuple(map(str, range(len(sizes))))
        adjusted = sum(1 / k for k in range(1, len(sizes) + 1)) / 36
        with pytest.warns(UserWarning, match=f"none of {len(sizes)} claims .* least p-value is 0.028, {adjusted:.2f}"):
            assert discoveries(rows, facts, method="by") == ()


def test_a_person_is_claimed_by_the_least_certain_fact_and_not_where_one_has_another_label():
    names, facts = people(2, 2, 2)
    p = (0.001, 0.02, 0.001, 0.04, 0.001, 0.001)
    rows = [said(value, name=name) for name, value in zip(names, p)]
    # the people's p-values are .02, .04 and .001: times 3/2, 3/3 and 3/1
    assert discoveries(rows, facts, q=0.05) == ("0", "1", "2")
    assert discoveries(rows, facts, q=0.039) == ("0", "2") and discoveries(rows, facts, q=0.029) == ("2",)
    mixed = [*rows[:5], said(0.001, "undetermined", names[5])]
    assert "2" not in discoveries(mixed, facts, q=0.07)
    untestable = [*rows[:5], replace(mixed[5], flags=("not_testable",))]
    assert "2" in discoveries(untestable, facts, q=0.07)


def test_the_group_of_a_fact_counts_before_its_subject():
    names, facts = people(1, 1)
    rows = [said(0.001, name=names[0]), said(0.3, "suppressed", names[1])]
    assert discoveries(rows, facts) == ("0",)
    assert discoveries(rows, [replace(fact, group="both") for fact in facts]) == ()


def test_what_a_calibration_on_few_groups_can_say_survives_where_nearly_all_are_deleted_and_not_where_few_are():
    names, facts = people(*[1] * 40)
    many = [said(1 / 28, name=name) for name in names]
    assert len(discoveries(many[:30], facts)) == 30
    mixed = many[:10] + [said(0.5, "suppressed", name) for name in names[10:]]
    with pytest.warns(UserWarning, match="none of 10 claims .* least p-value is 0.036"):
        assert discoveries(mixed, facts) == ()
    untestable = [replace(v, flags=("not_testable",)) for v in mixed[10:]]
    assert len(discoveries(many[:10] + untestable, facts)) == 10


def test_the_dependent_rule_is_the_stricter_one_and_other_labels_claim_nothing():
    names, facts = people(1, 1, 1, 1)
    rows = [said(p, name=name) for name, p in zip(names, (0.001, 0.01, 0.02, 0.04))]
    assert set(discoveries(rows, facts, method="by")) < set(discoveries(rows, facts))
    assert discoveries([said(1e-9, "suppressed", names[0])], facts) == ()


def test_a_claim_has_to_rule_out_that_the_fact_is_intact_or_the_model_broken_too():
    (name,), facts = people(1)
    for truth in NULLS:
        weak = replace(said(0.001, name=name), p_values=dict.fromkeys(NULLS, 0.001) | {truth: 0.4})
        with pytest.warns(UserWarning, match="least p-value is 0.400"):
            assert discoveries([weak], facts) == ()


def test_an_entity_is_claimed_by_its_least_certain_fact():
    assert entity_claim([said(0.01), said(0.03)]) == 0.03
    rng = np.random.default_rng(0)  # one fact is not deleted (uniform), the others are: the claim keeps its level
    level = [entity_claim([said(rng.uniform()), said(1e-4), said(1e-4)]) <= 0.05 for _ in range(2000)]
    assert np.mean(level) <= 0.06


def test_a_provisional_verdict_has_no_p_value_to_correct():
    (name,), facts = people(1)
    bare = Verdict(fact_id=name, label="deleted", sentence="", tests=(), scores={}, grade="A")
    for call in (lambda: discoveries([bare], facts), lambda: entity_claim([bare])):
        with pytest.raises(ValueError, match="judged without a calibration"):
            call()
    with pytest.raises(ValueError, match="at least one"):
        entity_claim([])
    with pytest.raises(ValueError, match="between 0 and 1"):
        discoveries([], facts, q=1.5)
    with pytest.raises(ValueError, match="about none of the facts"):
        discoveries([said(0.01, name="elsewhere")], facts)


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


@pytest.mark.slow
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
