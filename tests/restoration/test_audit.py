"""The whole audit on planted truth: every model gets the verdict that its construction deserves."""

import json

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.edit.edit import Edit, Shift, clone
from mech_unlearn.restoration import CORE, Relearn, audit, reference
from mech_unlearn.verdict.verdict import judge
from tests.planted import FORGOTTEN, fresh_planted_model, planted_case, planted_model

TESTED = tuple(name for name in CORE if name != "int8")  # the same code as int4
FIELDS = set(
    json.loads(
        '["test", "version", "model_id", "fact_id", "group", "relation", "layer", "alpha", "score_raw", "score_F", '
        '"score_R_mean", "score_R_sd", "kappa", "rho", "p_null", "n_paraphrases", "grade", "flags", "cost_fe", "seed"]'
    )
)


@pytest.fixture(scope="module")
def audited():
    retrained = tuple(planted_model("retrained", k) for k in (1, 2))
    case = planted_case(retrained=retrained, relearn=Relearn(steps=(1,)), draws=2)
    ref = reference(case, TESTED)
    models = {t: planted_model(t) for t in ("early", "late")}
    models |= {"full": case.full, "retrained": case.retrained[0]}
    return case, ref, {name: audit(ref, model, name) for name, model in models.items()}


@pytest.mark.parametrize(
    ("name", "label"), (("full", "intact"), ("retrained", "deleted"), ("early", "suppressed"), ("late", "suppressed"))
)
def test_the_verdict_is_the_truth(audited, name, label):
    assert judge(audited[2][name]).shares()[label] == 1.0


def test_each_suppressor_is_seen_by_one_test_and_missed_by_the_other(audited):
    early, late = audited[2]["early"], audited[2]["late"]
    assert (early["sae"].recoverability > 0.9).all() and (early["uds"].recoverability < 0.1).all()
    assert (late["sae"].recoverability < 0.1).all() and (late["uds"].recoverability > 0.5).all()


def test_outputs_alone_cannot_tell_suppressed_from_deleted(audited):
    kappas = {name: results["output"].kappa.mean().item() for name, results in audited[2].items()}
    assert kappas["full"] == pytest.approx(1.0)
    assert all(abs(kappas[name]) < 0.1 for name in ("early", "retrained"))


def test_every_record_is_json_and_has_the_promised_fields(audited):
    for results in audited[2].values():
        assert set(results) == set(TESTED)
        for test, result in results.items():
            records = json.loads(json.dumps(result.records(), allow_nan=False))
            assert [r["fact_id"] for r in records] == [fact.id for fact in audited[0].facts]
            assert all(set(r) >= FIELDS and r["test"] == test and r["grade"] == "A" for r in records)


def test_auditing_again_gives_the_same_numbers_and_leaves_random_state_and_weights_alone(audited):
    _, ref, results = audited
    late = planted_model("late")
    state, weights = torch.get_rng_state(), {name: w.clone() for name, w in late.held.items()}
    again = audit(ref, late, "late")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(w, late.held[name]) for name, w in weights.items())
    for test, result in again.items():
        assert torch.equal(result.recoverability.nan_to_num(), results["late"][test].recoverability.nan_to_num())


def test_without_retrained_models_the_grade_is_b_and_what_the_outputs_lost_gets_no_verdict_whatever_its_truth():
    case = planted_case(retrained=(), relearn=Relearn(steps=(1,)), draws=2)
    ref = reference(case, ["output", "uds", "sae", "int4"])
    for truth in ("full", "early", "late", "retrained"):
        verdicts = judge(audit(ref, planted_model(truth, 5), truth))
        known = truth == "full"
        assert [v.label for v in verdicts] == ["intact" if known else "undetermined"] * FORGOTTEN, truth
        assert all(("no_retrained" in v.flags) != known and v.grade == "B" for v in verdicts)
        assert all(v.scores["uds_recovered"] is not None and v.scores["sae"] is not None for v in verdicts)


def test_an_unknown_test_and_a_model_of_another_shape_are_refused(tiny_model, audited):
    with pytest.raises(KeyError, match="choose from output"):
        reference(audited[0], ["uvs"])
    with pytest.raises(ValueError, match="d_model"):
        audit(audited[1], tiny_model)


def test_a_model_of_the_case_that_was_edited_is_refused_and_a_copy_of_it_is_not():
    """Its own numbers were taken when the reference was made: an edited full model would pass for intact."""
    full, retrained = fresh_planted_model(), tuple(fresh_planted_model("retrained", k) for k in (1, 2))
    ref = reference(planted_case(full=full, retrained=retrained), ["output"])
    wipe = -full.held["lm_head.weight"].detach()
    edits = (
        Edit(name="wipe", base=full.hash(), deltas={"lm_head.weight": wipe}),
        Edit(name="s", base=full.hash(), interventions=(Shift(Site(3, "resid_post"), ((5,),), torch.ones(1, 64)),)),
    )
    before = audit(ref, full)["output"].kappa
    for model in (full, retrained[0]):
        for edit in edits:
            with edit.on(model):
                model.logits(torch.tensor([[2, 5]]))  # an intervention that nobody reached is an error of its own
                with pytest.raises(ValueError, match="audit a copy"):
                    audit(ref, model)
    with clone(full) as copy, edits[0].on(copy):
        assert (audit(ref, copy)["output"].kappa < 0.9).all()
    assert torch.equal(audit(ref, full)["output"].kappa, before)


def test_a_test_that_the_case_does_not_allow_ends_the_work_or_is_told_and_left_out():
    case = planted_case(sae=None)  # without unknown names
    wanted = ("output", "relearn_syntax", "uds")
    with pytest.raises(ValueError, match="unknown"):
        reference(case, wanted)
    told = {}
    ref = reference(case, wanted, told.__setitem__)
    assert list(ref.ready) == ["output", "uds"]
    assert list(told) == ["relearn_syntax"] and "unknown" in told["relearn_syntax"]
