"""Claims about lists, entities and models: false discovery rates against simulation, shares against known mixtures."""

import numpy as np
import pytest

from mech_unlearn.claims import corrected_shares, discoveries, entity_claim
from mech_unlearn.core import LABELS, Verdict


def said(p, label="deleted", name="x"):
    return Verdict(fact_id=name, label=label, sentence="", tests=(), scores={}, grade="A", p_values={"suppressed": p})


def test_of_a_list_of_true_nulls_hardly_any_survives_and_of_strong_claims_all():
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(200):
        false += bool(discoveries([said(p, name=str(i)) for i, p in enumerate(rng.uniform(size=30))]))
    assert false / 200 <= 0.05
    strong = [said(1e-5, name=str(i)) for i in range(30)]
    assert len(discoveries(strong)) == 30


def test_the_dependent_rule_is_the_stricter_one_and_other_labels_claim_nothing():
    rows = [said(p, name=str(i)) for i, p in enumerate((0.001, 0.01, 0.02, 0.04))]
    assert set(discoveries(rows, method="by")) < set(discoveries(rows, method="bh"))
    assert discoveries([said(1e-9, "suppressed")]) == ()


def test_an_entity_is_claimed_by_twice_the_mean_of_its_facts():
    assert entity_claim([said(0.01), said(0.03)]) == pytest.approx(0.04)
    assert entity_claim([said(0.9), said(0.8)]) == 1.0


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
