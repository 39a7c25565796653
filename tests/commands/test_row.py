"""A row of the result table: means over the facts that can be tested, and over no others."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mech_unlearn.commands.row import _corrected, _mean, _seen, audit_row, layer_curve
from mech_unlearn.core import LABELS, Verdict
from mech_unlearn.report.tables import corrected_text
from mech_unlearn.restoration import Reference, Result, reference
from mech_unlearn.verdict.calibration import Calibration, Scaler
from mech_unlearn.verdict.verdict import Thresholds
from tests.planted import planted_case, planted_facts, planted_model
from tests.tiny import tiny_facts

NAN = float("nan")
THREE_OF_FOUR = torch.tensor([True, True, False, True])


def result(recoverability, **more):
    n = len(recoverability)
    return Result(
        test="uds", model_id="m", facts=planted_facts()[:n], recoverability=torch.tensor(recoverability),
        score_raw=torch.zeros(n), score_full=torch.zeros(n), score_retrained=torch.ones(1, n), null=torch.zeros(0, n),
        grade="A", n_paraphrases=1, seed=0, cost_fe=1.0, **more,
    )  # fmt: skip


def test_a_mean_leaves_out_facts_that_cannot_be_tested_and_those_without_a_number():
    found = _mean(result([0.2, 0.4, 1.0, NAN]), THREE_OF_FOUR, "recoverability", "share", 0)
    assert found is not None and found["value"] == pytest.approx(0.3) and (found["n"], found["unit"]) == (2, "share")
    assert found["ci"] == pytest.approx([0.2, 0.4])
    assert _mean(None, THREE_OF_FOUR, "recoverability", "share", 0) is None
    assert _mean(result([NAN, NAN, 1.0, NAN]), THREE_OF_FOUR, "recoverability", "share", 0) is None


def test_the_interval_of_a_mean_draws_subjects_and_not_facts():
    one = result([0.0, 1.0, 0.0, 1.0])
    one = replace(one, facts=tuple(replace(fact, group="all of one person") for fact in one.facts))
    found = _mean(one, torch.ones(4, dtype=torch.bool), "recoverability", "share", 0)
    assert found is not None and found["ci"] == [0.5, 0.5]


def test_a_layer_curve_is_the_ratio_of_mean_drops_over_testable_facts():
    drop = torch.tensor([[1.0, 2.0, 90.0, NAN], [1.0, 1.0, 90.0, 1.0], [3.0, 3.0, NAN, 3.0]])
    never = torch.tensor([[2.0, 4.0, 5.0, NAN], [0.05, 0.05, 9.0, 0.05], [2.0, 2.0, 1.0, 2.0]])
    one = result([0.0] * 4, curves={"drop": drop, "drop_R": never})
    assert layer_curve(one, THREE_OF_FOUR) == [pytest.approx(0.5), None, pytest.approx(1.5)]
    assert layer_curve(one, torch.zeros(4, dtype=torch.bool)) == [None, None, None]


def test_a_row_and_its_curve_speak_of_the_testable_facts_as_the_verdicts_do():
    ready = reference(planted_case(), ("output", "uds"))
    levels = replace(ready.ready["output"], testable=THREE_OF_FOUR)
    made = {"all": ready, "three": Reference(ready.case, ready.tests, {**ready.ready, "output": levels})}
    given = dict(method=None, truth=None, neighbors=(), texts=(), full_neighbor_recall=None, seed=0)
    cells = {
        key: audit_row(some, planted_model("early"), name="early", thresholds=Thresholds(), **given)
        for key, some in made.items()
    }
    assert [cell["row"]["uds"]["n"] for cell in cells.values()] == [4, 3]
    scores = [record["score_raw"] for record in cells["three"]["records"] if record["test"] == "uds"]
    assert cells["three"]["row"]["uds"]["value"] == pytest.approx((scores[0] + scores[1] + scores[3]) / 3)
    assert sum(cells["three"]["row"]["verdicts"].values()) == pytest.approx(1)
    none = Reference(
        ready.case, ready.tests, {**ready.ready, "output": replace(levels, testable=torch.zeros(4, dtype=torch.bool))}
    )
    empty = audit_row(none, planted_model("early"), name="early", thresholds=Thresholds(), **given)
    assert empty["row"]["uds"] is None and set(empty["curves"]["uds"]) == {None}


def verdicts(*labels, flags=()):
    return [
        Verdict(
            fact_id=str(i), label=label, sentence="s", tests=("output",), scores={}, p_values={}, grade="A", flags=flags
        )
        for i, label in enumerate(labels)
    ]


def calibrated(**provenance):
    """A calibration that knows nothing but how it was measured."""
    none, row = np.zeros((0, 1)), np.zeros(1)
    return Calibration(
        features=(), scaler=Scaler(row, row, row), kinds=(), weights=none, bias=np.zeros(0), scores={}, center=none,
        inverse=np.eye(1), far=1.0, spread={}, provenance=provenance,
    )  # fmt: skip


def test_shares_of_verdicts_are_freed_from_errors_that_were_measured_and_only_then():
    none = dict.fromkeys(LABELS, 0.0)
    confusion = {"suppressed": none | {"suppressed": 0.5, "undetermined": 0.5}, "deleted": none | {"deleted": 1.0}}
    found = verdicts("suppressed", "undetermined", "deleted", "deleted")
    counts = {"g": {"suppressed": {"suppressed": 5, "undetermined": 5}, "deleted": {"deleted": 10}}}
    known = calibrated(confusion=confusion, confusion_by_group=counts)
    facts = tiny_facts(("Anna", "Ben"))
    got = _corrected(found, facts, known, 0)["shares"]
    assert {truth: m["value"] for truth, m in got.items()} == pytest.approx({"suppressed": 0.5, "deleted": 0.5})
    assert all(m["n"] == 2 and m["ci"][0] <= m["value"] <= m["ci"][1] for m in got.values())
    assert got["deleted"]["ci"] == pytest.approx([0.0, 1.0])  # Anna's facts are suppressed, Ben's are deleted
    assert _corrected(found, facts, None, 0) is None and _corrected(found, facts, calibrated(full="a hash"), 0) is None
    assert _corrected(verdicts("deleted", flags=("not_testable",)), facts[:1], known, 0) is None


def test_shares_that_no_mixture_of_known_truths_gives_are_not_corrected_and_the_page_says_so():
    none = dict.fromkeys(LABELS, 0.0)
    confusion = {"suppressed": none | {"suppressed": 1.0}, "collapsed": none | {"collapsed": 0.8, "undetermined": 0.2}}
    counts = {"g": {"suppressed": {"suppressed": 10}, "collapsed": {"collapsed": 8, "undetermined": 2}}}
    known = calibrated(confusion=confusion, confusion_by_group=counts)
    got = _corrected(verdicts("suppressed", "undetermined"), tiny_facts(("Anna",)), known, 0)
    assert got["shares"] is None and got["unexplained"] > 0.3
    assert "no mixture of the known truths" in corrected_text(got)
    fine = _corrected(verdicts("suppressed", "suppressed"), tiny_facts(("Anna",)), known, 0)
    assert fine["unexplained"] < 1e-6 and "suppressed 1.00 [1.00, 1.00]" in corrected_text(fine)
    assert corrected_text(None) == ""


def test_a_row_counts_the_groups_that_its_calibration_was_measured_on_and_tells_not_from_unknown():
    facts = tiny_facts(("Anna", "Ben", "Cara"))
    known = calibrated(full="hash", fit_groups=["Anna"], calibrate_groups=["Cara", "Dan"])
    for calibration, full, seen, count in (
        (known, "hash", True, 2), (known, "another", False, 0), (calibrated(full="hash"), "hash", None, None),
        (None, "hash", None, None),
    ):  # fmt: skip
        assert _seen(calibration, full, facts) == {"in_sample": seen, "in_sample_groups": count}
    assert _seen(known, "hash", tiny_facts(("Ben",))) == {"in_sample": False, "in_sample_groups": 0}
