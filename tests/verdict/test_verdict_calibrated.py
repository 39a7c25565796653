"""Verdicts by calibration: labels from p-values, what is unlike the pool, what is refused, what a reader is told."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import Measurement
from mech_unlearn.testbed import open_world
from mech_unlearn.verdict.calibration import SHIPPED, load, save, shipped
from mech_unlearn.verdict.features import FEATURES, READS, RECOVERY
from mech_unlearn.verdict.fitting import fit, fit_whole
from mech_unlearn.verdict.verdict import SPOKEN, Health, judge
from tests.simulated import parts, simulated
from tests.verdict.test_verdict import FACTS, output, result

TESTS = tuple(READS.values())

NAN = float("nan")


@pytest.fixture(scope="module")
def calibration():
    pool = simulated(seed=3)
    return fit(pool, *parts(pool)[:2])


def healthy(lost=0.0, drift=0.0):
    def share(value):
        return Measurement(value=value, ci=(value, value), n=10, unit="share")

    return Health(neighbor_recall=share(1 - lost), full_neighbor_recall=share(1.0), general_kl=share(drift))


def results(kappa=(0.0, 0.0), recall=(0.0, 0.0), testable=(1.0, 1.0), **recoverabilities):
    """Results of every test that a calibration reads; those not named find nothing."""
    made = {"output": output(kappa, recall, testable)}
    made["output"].columns["heldout_margin"] = torch.tensor(kappa)  # score_retrained is 0 and score_full 1
    return made | {name: result(name, recoverabilities.get(name, (0.0, 0.0))) for name in TESTS}


def test_the_only_truth_that_is_left_is_the_verdict_and_the_sentence_says_what_was_ruled_out(calibration):
    known = dict.fromkeys(("uds", "uds_subject", "logit_lens", "probe"), (1.0, 1.0))
    cases = {
        "deleted": (results(), healthy()),
        "suppressed": (results(uds=(1.0, 1.0)), healthy()),
        "intact": (results((1.0, 1.0), (1.0, 1.0), **known), healthy()),
        "collapsed": (results(), healthy(1.0, 4.0)),
    }
    for label, (found, health) in cases.items():
        for verdict in judge(found, health, calibration=calibration):
            assert verdict.label == label
            assert set(verdict.p_values) == {"intact", "suppressed", "deleted", "collapsed"}
            assert verdict.p_values[label] > 0.05 >= max(p for t, p in verdict.p_values.items() if t != label)
            assert verdict.sentence.startswith(label.capitalize())
            assert all(other in verdict.sentence for other in set(cases) - {label})


def test_a_suppressor_seen_by_one_test_alone_is_named_with_that_test(calibration):
    for name in ("uds", "uds_subject", "sae"):
        verdict = judge(results(**{name: (1.0, 1.0)}), healthy(), calibration=calibration)[0]
        assert verdict.label == "suppressed" and verdict.tests == (name,) and "1.00" in verdict.sentence


def test_between_the_known_truths_nothing_is_decided(calibration):
    verdict = judge(results(uds=(0.5, 0.5)), healthy(), calibration=calibration)[0]
    assert verdict.label == "undetermined" and verdict.sentence.startswith("Undetermined")


def test_what_is_unlike_every_model_of_the_pool_is_said_to_be_so_instead_of_guessed(calibration):
    odd = results((-9.0, -9.0), **dict.fromkeys(TESTS, (9.0, 9.0)))
    for verdict in judge(odd, healthy(), calibration=calibration):
        assert verdict.label == "undetermined" and "unlike_pool" in verdict.flags and "unlike" in verdict.sentence


def test_a_fact_that_cannot_be_tested_stays_undetermined(calibration):
    verdicts = judge(results(testable=(0.0, 1.0)), healthy(), calibration=calibration)
    assert [v.label for v in verdicts] == ["undetermined", "deleted"]
    assert "not_testable" in verdicts[0].flags


def test_what_cannot_be_tested_says_nothing_of_the_other_facts_of_its_group(calibration):
    for value in (0.0, 1.0):
        found = results(testable=(0.0, 1.0), uds=(value, 0.0))
        same = judge(found, healthy(), calibration=calibration)[1]
        assert same.label == "deleted"
        assert same.p_values == judge(results(testable=(0.0, 1.0)), healthy(), calibration=calibration)[1].p_values


def test_health_that_was_not_measured_is_refused_and_drift_without_end_is_no_health(calibration):
    with pytest.raises(ValueError, match="health, which was not measured"):
        judge(results(), calibration=calibration)
    assert judge(results(), healthy(1.0, NAN), calibration=calibration)[0].label == "collapsed"


def test_where_no_test_spoke_nothing_is_deleted(calibration):
    for silent in (("uds", "uds_subject"), ("writeback", "sae")):
        found = results(**dict.fromkeys(silent, (NAN, NAN)))
        verdict = judge(found, healthy(), calibration=calibration)[0]
        assert verdict.label == "undetermined"


def test_behind_an_intervention_nothing_is_deleted_by_calibration_either(calibration):
    assert [v.label for v in judge(results(), healthy(), held_back=True, calibration=calibration)] == ["suppressed"] * 2
    odd = results((9.0, 9.0), (1.0, 1.0), **dict.fromkeys(TESTS, (9.0, 9.0)))  # the outputs still give it
    verdicts = judge(odd, healthy(), held_back=True, calibration=calibration)
    assert [v.label for v in verdicts] == ["undetermined"] * 2


def test_a_missing_test_is_refused_by_its_name(calibration):
    some = results()
    del some["writeback"]
    with pytest.raises(ValueError, match="'writeback', which was not run"):
        judge(some, healthy(), calibration=calibration)
    assert judge(some, healthy())[0].label == "deleted"  # thresholds do without


def test_results_without_retrained_models_are_refused(calibration):
    without = {name: replace(r, grade="B") for name, r in results().items()}
    with pytest.raises(ValueError, match="rests on retrained models"):
        judge(without, healthy(), calibration=calibration)
    assert {v.label for v in judge(without, healthy())} == {"undetermined"}


def reading(calibration, *left_out):
    """The same calibration without reading some recoverabilities."""
    return replace(calibration, provenance={**calibration.provenance, "left_out": list(left_out)})


def cited(verdict):
    """The recoverabilities that a verdict names, in its list or in its sentence."""
    return {name for name in TESTS if name in verdict.tests or SPOKEN[name] in verdict.sentence}


@pytest.mark.thorough
@pytest.mark.parametrize("left_out", [(), *((name,) for name in RECOVERY), ("uds_recovered", "probe"), RECOVERY[1:]])
def test_a_verdict_cites_only_tests_that_its_calibration_reads_however_much_the_others_found(calibration, left_out):
    made, rng = reading(calibration, *left_out), torch.Generator().manual_seed(0)
    seen = set()
    cases = [{name: (1.0, 1.0)} for name in TESTS] + [dict.fromkeys(TESTS, (v, v)) for v in (0.0, 0.5, 1.0)]
    cases += [dict(zip(TESTS, torch.rand(len(RECOVERY), 2, generator=rng).tolist())) for _ in range(20)]
    for found in cases:
        for kappa in (0.0, 1.0):
            for verdict in judge(results((kappa,) * 2, (kappa,) * 2, **found), healthy(), calibration=made):
                seen |= cited(verdict)
                assert not cited(verdict) & {READS[name] for name in left_out}, verdict
                assert verdict.scores.keys() == {"output", *RECOVERY}  # what was measured is still there
    assert seen == set(TESTS) - {READS[name] for name in left_out}  # and each that it reads is cited somewhere


def test_the_calibration_that_ships_never_cites_what_it_does_not_read():
    made = load(SHIPPED / "biographies.json")
    assert made.left_out == ("uds_recovered", "probe")
    for name in TESTS:
        for verdict in judge(results(**{name: (0.9, 0.9)}), healthy(), calibration=made):
            assert not cited(verdict) & {READS[left] for left in made.left_out}


def test_a_verdict_on_people_and_a_model_that_the_calibration_was_measured_on_is_marked_and_else_the_same():
    made = fit_whole(simulated(30, seed=1), "a hash")
    plain = judge(results(), healthy(), calibration=made)
    groups = {*made.provenance["fit_groups"], *made.provenance["calibrate_groups"]}
    ours = replace(made, provenance={**made.provenance, "calibrate_groups": ["Anna Lee"]})
    assert "Anna Lee" not in groups and {fact.group or fact.subject for fact in FACTS} == {"Anna Lee"}
    for calibration, full, marked in (
        (ours, "a hash", True), (ours, "another", False), (ours, None, False), (made, "a hash", False),
    ):  # fmt: skip
        verdicts = judge(results(), healthy(), calibration=calibration, full=full)
        assert ["in_sample" in v.flags for v in verdicts] == [marked] * 2
        assert [(v.label, v.sentence, v.p_values) for v in verdicts] == [
            (v.label, v.sentence, v.p_values) for v in plain
        ]
    assert ours.in_sample("a hash", ["Anna Lee", "Ben Hill"]) == (True, False)
    assert ours.in_sample(None, ["Anna Lee"]) is None
    assert reading(replace(made, provenance={})).in_sample("a hash", ["Anna Lee"]) is None


def test_the_calibration_that_ships_knows_the_people_that_it_was_measured_on():
    made, world = load(SHIPPED / "biographies.json"), open_world("biographies")
    people = sorted({fact.group or fact.subject for fact in world.forget.facts})
    others = sorted({fact.group or fact.subject for fact in world.retain.neighbors})
    assert made.in_sample(made.provenance["full"], people) == (True,) * 40
    assert not any(made.in_sample(made.provenance["full"], others))
    assert not any(made.in_sample("another full model", people))


def test_a_description_claims_one_place_one_world_and_what_is_shown_for_people():
    told = load(SHIPPED / "biographies.json").describe()
    assert "blocks in one place" in told and "passed for a deletion" in told
    assert "of the world biographies only" in told and "0.025 [0.001, 0.132] of 40 groups" in told


def test_a_calibration_is_for_one_full_model_and_describes_itself(tmp_path):
    made = fit_whole(simulated(30, seed=1), "a hash", note="here")
    assert made.provenance["full"] == "a hash" and made.provenance["note"] == "here"
    assert not set(made.provenance["fit_groups"]) & set(made.provenance["calibrate_groups"])
    assert "p <= 0.05" in made.describe() and "suppressed/late a" in made.describe()
    assert shipped("a hash") is None
    save(made, tmp_path / "c.json")


def test_every_feature_that_a_calibrated_verdict_reads_comes_from_a_test_or_from_health():
    assert set(FEATURES) == {"output", "heldout", *RECOVERY, "strongest", "group", "neighbor_loss", "general_kl"}
    assert len(FACTS) == 2
