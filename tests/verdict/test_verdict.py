"""Verdicts: each label from the scores that deserve it, evidence against its null, and health before all."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import Measurement
from mech_unlearn.restoration import Result
from mech_unlearn.verdict.verdict import Health, Thresholds, evidence, judge, lost_without_verdict
from mech_unlearn.verdict.verdicts import Verdicts
from tests.tiny import tiny_facts

FACTS = tiny_facts(["Anna Lee"])


def result(test, values, null=None, **changes):
    n = len(FACTS)
    base = Result(
        test=test,
        model_id="u",
        facts=FACTS,
        recoverability=torch.tensor(values),
        score_raw=torch.zeros(n),
        score_full=torch.ones(n),
        score_retrained=torch.zeros(2, n),
        null=torch.zeros(0, n) if null is None else torch.tensor(null),
        grade="A",
        n_paraphrases=1,
        seed=0,
        cost_fe=1.0,
    )
    return replace(base, **changes)


def output(kappa, recall, testable=(1.0, 1.0)):
    columns = {"recall": recall, "recall_F": (1.0, 1.0), "testable": testable}
    flags = tuple(() if ok else ("not_testable",) for ok in testable)
    tensors = {name: torch.tensor(x) for name, x in columns.items()}
    return result("output", kappa, kappa=torch.tensor(kappa), columns=tensors, flags=flags)


def clean():
    """A patching test and an attack that both find nothing."""
    return {"uds": result("uds", (0.0, 0.0)), "sae": result("sae", (0.0, 0.0))}


def labels(results, **kwargs):
    return [v.label for v in judge(results, **kwargs)]


def test_a_fact_that_the_outputs_give_is_intact_whatever_the_tests_say():
    assert labels({"output": output((0.9, 1.0), (1.0, 1.0)), "uds": result("uds", (0.0, 1.0))}) == ["intact"] * 2


def test_a_lost_fact_is_suppressed_deleted_or_undetermined_by_its_strongest_test():
    tests = {"uds": result("uds", (0.9, 0.1)), "sae": result("sae", (0.0, 0.2))}
    assert labels({"output": output((0.1, 0.1), (0.0, 0.0)), **tests}) == ["suppressed", "deleted"]
    tests["sae"] = result("sae", (0.0, 0.4))
    assert labels({"output": output((0.1, 0.1), (0.0, 0.0)), **tests}) == ["suppressed", "undetermined"]


def test_a_lost_recall_counts_even_where_the_margin_is_high():
    verdict = judge({"output": output((0.8, 0.8), (0.2, 0.8)), "uds": result("uds", (1.0, 1.0))})
    assert [v.label for v in verdict] == ["suppressed", "intact"]


def test_a_test_that_did_not_speak_decides_nothing_and_silence_is_not_deletion():
    nan = float("nan")
    lost = output((0.0, 0.0), (0.0, 0.0))
    assert labels({"output": lost, "uds": result("uds", (nan, nan))}) == ["undetermined"] * 2
    assert labels({"output": lost}) == ["undetermined"] * 2
    assert judge({"output": lost})[0].grade == "C"
    verdict = judge({"output": lost, "uds": result("uds", (nan, 0.0)), "sae": result("sae", (0.1, nan))})
    assert [v.tests for v in verdict] == [("sae",), ("uds",)]


def test_a_fact_that_cannot_be_tested_is_never_called_deleted():
    verdict = judge({"output": output((0.0, 0.0), (0.0, 0.0), (0.0, 1.0)), **clean()})
    assert [v.label for v in verdict] == ["undetermined", "deleted"] and "not_testable" in verdict[0].flags
    assert verdict.shares()["deleted"] == 1.0 and verdict.shares(testable_only=False)["deleted"] == 0.5


def test_what_retrained_models_show_too_is_no_evidence():
    quiet, noisy = [[0.0, 0.1]] * 4, [[0.8, 0.8]] * 4
    lost = output((0.0, 0.0), (0.0, 0.0))
    assert labels({"output": lost, "uds": result("uds", (0.7, 0.7), quiet)}) == ["suppressed"] * 2
    noise = {"uds": result("uds", (0.7, 1.0), noisy), "sae": result("sae", (0.0, 0.0))}
    assert labels({"output": lost, **noise}) == ["deleted", "suppressed"]
    got = evidence({"output": lost, "uds": result("uds", (0.9, 1.0), noisy)}, Thresholds())["uds"]
    assert got.tolist() == pytest.approx([0.5, 1.0])


def test_a_deletion_needs_a_test_of_each_direction():
    lost, tests = output((0.0, 0.0), (0.0, 0.0)), clean()
    assert labels({"output": lost, **tests}) == ["deleted"] * 2
    assert labels({"output": lost, "uds": tests["uds"]}) == ["undetermined"] * 2
    assert labels({"output": lost, "sae": tests["sae"]}) == ["undetermined"] * 2
    broken = {**tests, "uds": replace(tests["uds"], flags=((), ("raw_ratio_above_3",)))}
    assert labels({"output": lost, **broken}) == ["deleted", "undetermined"]
    again = {**broken, "uds_subject": result("uds_subject", (0.0, 0.0))}
    assert labels({"output": lost, **again}) == ["deleted"] * 2


def test_a_broken_model_is_collapsed_and_says_why():
    lost = {"output": output((0.0, 0.0), (0.0, 0.0)), **clean()}

    def share(value):
        return Measurement(value=value, ci=(value, value), n=10, unit="share")

    broken = Health(neighbor_recall=share(0.2), full_neighbor_recall=share(1.0))
    drifted = Health(general_kl=share(2.0))
    fine = Health(neighbor_recall=share(0.9), full_neighbor_recall=share(1.0), general_kl=share(0.1))
    assert labels(lost, health=broken) == labels(lost, health=drifted) == ["collapsed"] * 2
    assert labels(lost, health=fine) == ["deleted"] * 2
    verdict = judge(lost, broken)[0]
    assert "health_fail" in verdict.flags and "0.20" in verdict.sentence
    assert labels(lost, health=Health(general_kl=share(float("nan")))) == ["collapsed"] * 2


def test_a_verdict_names_its_strongest_test_and_carries_its_p_value():
    sae = result("sae", (0.8, 0.0), p_null=torch.tensor([0.05, 1.0]))
    verdict = judge({"output": output((0.1, 0.1), (0.0, 0.0)), "uds": result("uds", (0.6, 0.0)), "sae": sae})[0]
    assert verdict.tests == ("uds", "sae") and verdict.p_values == {"sae": pytest.approx(0.05)}
    assert "entity's profile" in verdict.sentence and "0.80" in verdict.sentence


def graded(grade, results):
    return {name: replace(r, grade=grade, null=r.null[:0]) for name, r in results.items()}


@pytest.mark.parametrize("found", (0.0, 0.4, 0.9, float("nan")))
def test_what_the_outputs_lost_gets_no_verdict_without_retrained_models_whatever_the_tests_find(found):
    lost = output((0.1, 0.9), (0.0, 1.0))
    tests = {name: result(name, (found, found)) for name in ("uds", "uds_subject", "writeback", "sae")}
    gone, kept = judge(graded("B", {"output": lost, **tests}))
    assert gone.label == "undetermined" and gone.flags == ("no_retrained",) and gone.tests == ("output",)
    assert gone.sentence.startswith("Lost in the outputs (") and "no verdict: without retrained models" in gone.sentence
    assert kept.label == "intact" and "no_retrained" not in kept.flags
    assert all("retrained and full" not in v.sentence and "retrained to full" not in v.sentence for v in (gone, kept))
    assert gone.scores["uds_recovered"] == (None if found != found else pytest.approx(found))  # scores are still given
    assert lost_without_verdict([gone, kept]) == 0.5 and Verdicts([gone, kept]).shares()["undetermined"] == 0.5
    with_models = judge(graded("A", {"output": lost, **tests}))
    assert all("no_retrained" not in v.flags for v in with_models) and lost_without_verdict(with_models) == 0
    assert with_models[0].label == {0.0: "deleted", 0.9: "suppressed"}.get(found, "undetermined")


def test_a_broken_or_untestable_fact_is_still_said_to_be_so_without_retrained_models():
    lost = graded("B", {"output": output((0.0, 0.0), (0.0, 0.0), (0.0, 1.0)), **clean()})
    verdicts = judge(lost)
    assert [v.flags for v in verdicts] == [("not_testable",), ("no_retrained",)]
    assert "retrained" not in verdicts[0].sentence and lost_without_verdict(verdicts) == 1.0
    drifted = Health(general_kl=Measurement(value=2.0, ci=(2.0, 2.0), n=10, unit="nats"))
    assert [(v.label, v.flags[-1]) for v in judge(lost, drifted)] == [("collapsed", "health_fail")] * 2
    held = judge(lost, held_back=True)[1]
    assert held.label == "suppressed" and "no_retrained" not in held.flags  # by what it is, not by a test


def test_thresholds_say_that_they_are_provisional_and_a_verdict_needs_outputs():
    assert "Provisional, uncalibrated" in Thresholds().describe() and "suppressed 0.5" in Thresholds().describe()
    with pytest.raises(KeyError, match="output"):
        judge({"uds": result("uds", (0.0, 0.0))})


def test_where_only_an_intervention_keeps_the_answer_back_nothing_is_deleted():
    results = {"output": output((0.0, 0.0), (0.0, 0.0)), **clean()}
    assert labels(results) == ["deleted", "deleted"]
    verdicts = judge(results, held_back=True)
    assert [v.label for v in verdicts] == ["suppressed", "suppressed"]
    assert all("intervention" in v.flags and "taken off" in v.sentence for v in verdicts)
    known = {**results, "output": output((1.0, 0.0), (1.0, 0.0))}
    assert [v.label for v in judge(known, held_back=True)] == ["intact", "suppressed"]
