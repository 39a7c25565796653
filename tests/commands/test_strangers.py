"""`audit` and `locate` on strangers: folders made by plain transformers, facts in a file, and nothing else given."""

import dataclasses
import functools
import json
import shutil
from random import Random

import pytest
import torch

from mech_unlearn.attribution import Attribution
from mech_unlearn.commands.audit import run_audit
from mech_unlearn.commands.inputs import hashes, key_values, make_method, plain, read_lines, typed
from mech_unlearn.commands.locate import locate, run_locate
from mech_unlearn.commands.options import AuditOptions, CalibrateOptions, LocateOptions
from mech_unlearn.core import Entity, Site
from mech_unlearn.data.jsonl import save_facts
from mech_unlearn.locate import LOCATORS
from mech_unlearn.methods import METHODS
from mech_unlearn.testbed import open_world
from tests.planted import planted_facts, planted_hf, planted_model, planted_sae
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Folders `full`, `late` (suppressed in its last layer), `retrained_0` and `retrained_1`, and a facts file."""
    root = tmp_path_factory.mktemp("strangers")
    for name, (truth, seed) in {
        "full": ("full", 0),
        "late": ("late", 0),
        "retrained_0": ("retrained", 1),
        "retrained_1": ("retrained", 2),
        "retrained_2": ("retrained", 3),
    }.items():
        planted_hf(truth, seed).save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    facts = planted_facts()
    save_facts(facts[:4], root / "facts.jsonl")
    save_facts(facts[4:], root / "retain.jsonl")
    return root


def audited(root, out, unlearned, **changes):
    asked = dict(full=str(root / "full"), unlearned=str(root / unlearned), facts=root / "facts.jsonl", out=out)
    return run_audit(AuditOptions(**asked, **changes))


def test_an_audit_needs_neither_sae_nor_retrained_model_and_says_grade_b(strangers, tmp_path):
    summary = audited(strangers, tmp_path / "run", "late")
    verdicts = json.loads((tmp_path / "run" / "verdicts.json").read_text())
    assert {v["grade"] for v in verdicts["unlearned"]} == {"B"}
    assert "grade B" in json.loads((tmp_path / "run" / "captions.json").read_text())["note"]
    rows = {row["name"]: row for row in summary["rows"]}
    assert rows["full"]["forget_recall"]["value"] == 1.0
    assert all(v["scores"]["output"] < 0.2 for v in verdicts["unlearned"])  # its margin is nearly that of retrained
    assert rows["unlearned"]["verdicts"]["undetermined"] == rows["unlearned"]["no_verdict"] == 1.0
    assert rows["full"]["verdicts"]["intact"] == 1.0 and rows["full"]["no_verdict"] == 0.0
    assert all("no_retrained" in v["flags"] and "no verdict" in v["sentence"] for v in verdicts["unlearned"])
    assert {row["judged"] for row in rows.values()} == {"provisional"} and rows["full"]["in_sample"] is None
    assert rows["full"]["forms"]["heldout"]["value"] == rows["full"]["worst_form"]["value"] == 1.0
    assert all(number["n"] == 4 for number in rows["unlearned"]["forms"].values())
    page = (tmp_path / "run" / "report.html").read_text()
    assert "lost in the outputs, no verdict 100%" in page and "suppressed 1" not in page
    assert "worst form, above chance" in page and (tmp_path / "run" / "figures" / "5_forms.png").is_file()
    assert "data:image/png;base64," in page and "http://" not in page and "https://" not in page


@pytest.mark.slow
def test_with_retrained_models_the_suppressed_is_told_from_the_retrained(strangers, tmp_path):
    retrained = [str(strangers / f"retrained_{k}") for k in (0, 1)]
    for unlearned, label in (("late", "suppressed"), ("retrained_2", "deleted")):
        out = tmp_path / unlearned
        summary = audited(strangers, out, unlearned, retrained=retrained)
        rows = {row["name"]: row for row in summary["rows"]}
        assert rows["unlearned"]["verdicts"][label] == 1.0, rows["unlearned"]
        assert {v["grade"] for v in json.loads((out / "verdicts.json").read_text())["unlearned"]} == {"A"}


@pytest.mark.slow
def test_a_calibration_judges_the_model_it_was_made_for_and_no_other(strangers, tmp_path):
    from mech_unlearn.model.load import load
    from mech_unlearn.verdict.calibration import save
    from mech_unlearn.verdict.fitting import fit_whole
    from tests.simulated import simulated

    mine, other = tmp_path / "mine.json", tmp_path / "other.json"
    pool = simulated(24, seed=2)
    save(fit_whole(pool, load(strangers / "full").hash()), mine)
    save(fit_whole(pool, "another model"), other)
    retrained = [str(strangers / f"retrained_{k}") for k in (0, 1)]
    given = dict(retrained=retrained, retain=strangers / "retain.jsonl")
    audited(strangers, tmp_path / "run", "late", calibration=str(mine), **given)
    verdicts = json.loads((tmp_path / "run" / "verdicts.json").read_text())["unlearned"]
    assert {"suppressed", "deleted"} <= verdicts[0]["p_values"].keys()
    assert "Calibrated verdicts" in json.loads((tmp_path / "run" / "captions.json").read_text())["note"]
    with pytest.raises(ValueError, match="made for another full model"):
        audited(strangers, tmp_path / "b", "late", calibration=str(other), **given)
    with pytest.raises(ValueError, match="cannot judge this audit, for want of two retrained models"):
        audited(strangers, tmp_path / "c", "late", calibration=str(mine))
    with pytest.raises(ValueError, match="for want of the tests output, uds"):
        audited(strangers, tmp_path / "d", "late", calibration=str(mine), tests="uds,sae", **given)
    with pytest.raises(ValueError, match="no such file"):
        audited(strangers, tmp_path / "e", "late", calibration="nowhere.json", **given)
    assert not any((tmp_path / name).exists() for name in "bcde")


def test_calibrating_on_too_little_is_refused_before_anything_is_made(strangers, tmp_path):
    from mech_unlearn.commands.calibrate import run_calibrate

    (tmp_path / "texts.txt").write_text("Rivers run.\n")

    def calibrate(references, retrained):
        run_calibrate(
            CalibrateOptions(
                full=str(strangers / "full"),
                facts=strangers / "facts.jsonl",
                retain=strangers / "retain.jsonl",
                texts=tmp_path / "texts.txt",
                out=tmp_path / "out",
                reference=references,
                retrained=retrained,
                workers=1,
            )
        )

    with pytest.raises(ValueError, match="two retrained models to compare with and two"):
        calibrate(["a"], ["b", "c"])
    with pytest.raises(ValueError, match="'b' is both"):
        calibrate(["a", "b"], ["b", "c"])
    with pytest.raises(ValueError, match="270 facts about other subjects and 200 texts, got 4 and 1"):
        calibrate(["a", "b"], ["c", "d"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_finished_audit_is_read_back_and_not_run_again(strangers, tmp_path, monkeypatch):
    first = audited(strangers, tmp_path / "run", "late", tests="uds")
    monkeypatch.setattr("mech_unlearn.commands.row.audit", None)
    second = audited(strangers, tmp_path / "run", "late", tests="uds")
    assert second["rows"] == first["rows"]
    with pytest.raises(ValueError, match="another spec"):
        audited(strangers, tmp_path / "run", "late", tests="int4")


def test_an_unknown_test_is_refused(strangers, tmp_path):
    with pytest.raises(ValueError, match="unknown restoration test 'udz'.*uds"):
        audited(strangers, tmp_path / "run", "late", tests="udz")


def located(model, facts, how, out, **changes):
    return run_locate(LocateOptions(model=str(model), facts=facts, how=how, out=out, **changes))


def test_locate_finds_the_planted_layer(strangers, tmp_path):
    result = located(strangers / "full", strangers / "facts.jsonl", "logit_lens", tmp_path / "run")
    assert result.values[2] > result.values[1] + 1  # the MLP of layer 2 writes the object
    assert (tmp_path / "run" / "figures" / "logit_lens.png").is_file()


def test_a_run_directory_is_not_gone_on_with_when_the_same_paths_hold_something_else(strangers, tmp_path):
    model, facts, texts, out = (tmp_path / name for name in ("model", "facts.jsonl", "texts.txt", "run"))
    shutil.copytree(strangers / "full", model)
    save_facts(planted_facts()[:3], facts)
    texts.write_text("Rivers run to the sea .")
    first = located(model, facts, "logit_lens", out, texts=texts)
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.suffix != ".png"}

    def refused(**changes):
        with pytest.raises(ValueError, match="a run of another spec"):
            located(model, facts, "logit_lens", out, **{"texts": texts} | changes)
        assert {path: path.read_bytes() for path in written} == written

    refused(dtype="bfloat16")
    refused(texts=None)
    texts.write_text("The sea is in Oslo .")
    refused()
    texts.write_text("Rivers run to the sea .")
    save_facts((*planted_facts()[:2], dataclasses.replace(planted_facts()[2], object="Acme")), facts)
    refused()
    save_facts(planted_facts()[:3], facts)
    planted_hf("late").save_pretrained(model)
    refused()
    planted_hf("full").save_pretrained(model)
    again = located(model, facts, "logit_lens", out, texts=texts)
    torch.testing.assert_close(again.values, first.values)


def test_hashes_name_what_is_given_and_change_with_each_of_it(tmp_path):
    from mech_unlearn.edit.edit import Edit, Shift
    from mech_unlearn.model.latents import save_sae

    facts, model = planted_facts(), planted_model()
    plain = hashes(facts[:4], full=model)
    assert plain.keys() == {"facts", "full"} and plain == hashes(facts[:4], sae="release/id", full=model)
    assert plain["facts"] != hashes(facts[1:5], full=model)["facts"]
    assert plain["full"] != hashes(facts[:4], full=planted_model("late"))["full"]
    given = dict(kept=facts[4:], texts=("a b",), unknown=(Entity(name="Anna Lee"),))
    other = dict(kept=facts[5:], texts=("a", "b"), unknown=(Entity(name="Ben Hill"),))
    for key in given:
        mine, theirs = hashes(facts[:4], **{key: given[key]}), hashes(facts[:4], **{key: other[key]})
        assert mine.keys() == {"facts", key} and mine[key] != theirs[key]
    seen = set()
    for k in (2, 3):  # the same weights with another number of active latents
        save_sae(planted_sae(k=k), tmp_path / "sae")
        seen.add(hashes(facts[:4], sae=str(tmp_path / "sae"))["sae"])
    assert len(seen) == 2
    shift = Shift(Site(1, "resid_post"), ((4,),), torch.ones(1, 64))
    with Edit(name="shift", base=model.hash(), interventions=(shift,)).on(model):
        model.logits(torch.tensor([[2, 4]]))
        assert hashes(facts[:4], full=model)["full"] != plain["full"]
    assert hashes(facts[:4], full=model) == plain


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The shipped world as a user would have it: folders and files, eight people to forget."""
    root, shipped = tmp_path_factory.mktemp("world"), open_world("biographies")
    save_facts(shipped.forget.facts[:48], root / "facts.jsonl")
    save_facts(shipped.retain.neighbors[:60], root / "retain.jsonl")
    (root / "unknown.txt").write_text("\n".join(e.name for e in shipped.retain.unknown[:20]))
    (root / "texts.txt").write_text("\n".join(shipped.retain.texts[:300]))
    return root, shipped


SETTINGS = {
    "probe": ["folds=2"],
    "tuned_lens": ["steps=5"],
    "prompt_attribution": ["steps=4"],
    "knowledge_neurons": ["steps=4", "which=prompt"],
    "activation_patching": ["metric=probability"],
    "causal_trace": ["samples=2"],
}
GIVEN = {"known_unknown": ("unknown", "texts"), "sae_latents": ("unknown",), "tuned_lens": ("texts",)}


@pytest.mark.thorough
@pytest.mark.parametrize("how", LOCATORS)
def test_every_locator_runs_over_a_facts_file_and_leaves_a_result_a_figure_and_its_provenance(world, tmp_path, how):
    root, shipped = world
    extra = {key: root / f"{key}.txt" for key in GIVEN.get(how, ())}
    if {"sae", "saes"} & set(LOCATORS[how].inputs):
        extra["sae"] = str(shipped.sae)
    result = located(shipped.full, root / "facts.jsonl", how, tmp_path / "run", settings=SETTINGS.get(how, []), **extra)
    assert result.n > 0 and result.unit and result.values.nan_to_num().abs().max() > 0
    assert result.low is not None and result.high is not None
    again = Attribution.from_json(json.loads((tmp_path / "run" / "locate.json").read_text())[how])
    torch.testing.assert_close(again.values, result.values, equal_nan=True)
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["hashes"].keys() == {
        "facts", "model", *(key for key in ("texts", "unknown", "sae") if key in extra)
    }  # fmt: skip
    assert (tmp_path / "run" / "figures" / f"{how}.png").stat().st_size > 5000


@pytest.mark.slow
def test_facts_located_in_pieces_equal_facts_located_at_once_and_a_finished_piece_is_not_run_again(
    world, tmp_path, monkeypatch
):
    root, shipped = world
    once = located(shipped.full, root / "facts.jsonl", "causal_trace", tmp_path / "once", settings=["samples=2"])
    monkeypatch.setattr("mech_unlearn.commands.locate.PIECE", 20)
    pieces = located(shipped.full, root / "facts.jsonl", "causal_trace", tmp_path / "pieces", settings=["samples=2"])
    torch.testing.assert_close(pieces.values, once.values, atol=1e-5, rtol=1e-4, equal_nan=True)
    assert pieces.n == once.n == 48 and "in 3 pieces" in pieces.note
    (tmp_path / "pieces" / "cells" / "000001.json").unlink()
    seen = []
    per_fact = LOCATORS["causal_trace"].per_fact

    @functools.wraps(per_fact)
    def counted(model, facts, **settings):
        seen.append([fact.id for fact in facts])
        return per_fact(model, facts, **settings)

    traced = dataclasses.replace(LOCATORS["causal_trace"], per_fact=counted)
    monkeypatch.setitem(LOCATORS, "causal_trace", traced)
    again = located(shipped.full, root / "facts.jsonl", "causal_trace", tmp_path / "pieces", settings=["samples=2"])
    assert seen == [[fact.id for fact in shipped.forget.facts[20:40]]]
    torch.testing.assert_close(again.values, pieces.values, equal_nan=True)


def test_what_a_locator_lacks_or_does_not_know_is_refused_before_anything_is_written(world, tmp_path):
    root, shipped = world
    for how, changes, message in (
        ("sae_latents", {}, "pass --unknown or --retain"),
        ("causal_trace", {"settings": ["sample=3"]}, "unknown setting of causal_trace 'sample'; choose from sample"),
        ("causal_trase", {}, "unknown locator 'causal_trase'; choose from causal_trace"),
        ("probe", {"settings": ["folds"]}, "not of the form key=value"),
        ("probe", {"settings": ["folds=resid_post"]}, "setting folds=resid_post of probe: .*integer"),
        ("causal_trace", {"settings": ["noise=nan"]}, "setting noise=nan of causal_trace must be a finite number"),
        ("causal_trace", {"settings": ["sigma=1e999"]}, "sigma=inf of causal_trace must be a finite number"),
        ("activation_patching", {"settings": ["kind=1"]}, "setting kind=1 of activation_patching: .*resid_pre"),
        ("latent_ablation", {"settings": ["latents={1: 2}"]}, "setting latents={1: 2} of latent_ablation"),
        ("logit_lens", {"settings": ["max_tokens=" + "(" * 5000]}, "max_tokens=.* of logit_lens: .*integer"),
    ):
        with pytest.raises(ValueError, match=message):
            located(shipped.full, root / "facts.jsonl", how, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_refused_facts_leave_nothing_behind_and_the_corrected_are_located_and_audited(strangers, tmp_path):
    facts = planted_facts()[:4]
    bare, path = (dataclasses.replace(facts[0], distractors=()), *facts[1:]), tmp_path / "facts.jsonl"
    asked = dict(full=str(strangers / "full"), unlearned=str(strangers / "late"), facts=path, tests="logit_lens")

    def audit():
        return run_audit(AuditOptions(**asked, out=tmp_path / "audit"))

    def trace():
        settings = ["against=distractors"]
        return located(strangers / "full", path, "direct_logit_attribution", tmp_path / "locate", settings=settings)

    for work in (audit, trace):
        save_facts(bare, path)
        with pytest.raises(ValueError, match="distractor"):
            work()
        assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ([] if work is audit else ["audit"])
        save_facts(facts, path)
        assert work()


def test_the_command_line_offers_settings_that_can_be_written_and_python_offers_all(strangers, tmp_path):
    for how, inner in (("logit_lens", "decoder"), ("tuned_lens", "lens"), ("concept_vectors", "scorer")):
        assert inner in LOCATORS[how].settings()
        with pytest.raises(ValueError, match=f"unknown setting of {how} '{inner}'"):
            located("nowhere", strangers / "facts.jsonl", how, tmp_path / "run", settings=[f"{inner}=1"])
    model = planted_model()
    own, other = (locate(model, planted_facts()[:4], "logit_lens", decoder=x) for x in (model, planted_model("late")))
    assert own.values.shape == other.values.shape


@pytest.mark.parametrize("value", ["nan", "inf", "-1e999", "(1e999,)"])
def test_a_setting_of_a_method_is_a_finite_number(value):
    for name, key in (("npo", "lr"), ("rocr", "ridge"), ("gu", "base.lr"), ("rome", "optimize.lr")):
        with pytest.raises(
            ValueError, match=f"setting {key}=.*: Input should|setting {key}=.* must be a finite number"
        ):
            make_method(name, key_values([f"{key}={value}"]), seed=0)


WRITTEN = (
    "nan", "inf", "-1", "99", "1e9", "1e999", "abc", "None", "True", "[]", "()", "{1:2}", "[0,1]", "((1,),)", "b'x'",
    "1j", "...", "{1,2}", "last", "resid_post", "[[[]]]",
)  # fmt: skip


def test_settings_of_any_kind_are_taken_or_refused_in_one_line_that_names_them():
    random = Random(0)
    for how in [*LOCATORS, *METHODS] * 20:
        kinds = {key: p.annotation for key, p in LOCATORS[how].settings().items()} if how in LOCATORS else {}
        keys = [key for key, kind in kinds.items() if plain(kind)] or [f.name for f in dataclasses.fields(METHODS[how])]
        key, value = random.choice(keys), random.choice(WRITTEN)
        try:
            if how in LOCATORS:
                typed({k: kind for k, kind in kinds.items() if plain(kind)}, [f"{key}={value}"], how)
            else:
                make_method(how, key_values([f"{key}={value}"]), seed=0)
        except ValueError as error:
            assert how in str(error) and "\n" not in str(error)
            assert f"{key}" in str(error) or "needs sae" in str(error)


@pytest.mark.parametrize(("name", "key"), [("rome", "optimize"), ("npo", "schedule"), ("gu", "base")])
def test_a_setting_that_holds_settings_is_told_apart_from_a_value(name, key):
    with pytest.raises(ValueError, match=f"{key}"):
        make_method(name, {key: {"lr": 1}}, seed=0)


def test_names_and_texts_are_the_lines_of_a_file_however_it_was_saved(tmp_path):
    path = tmp_path / "names.txt"
    for data in (
        b"Anna Lee\nB\xc3\xa9la\n",
        b"\xef\xbb\xbfAnna Lee\r\n B\xc3\xa9la \r\n",
        b"\nAnna Lee\n\n\tB\xc3\xa9la",
    ):
        path.write_bytes(data)
        assert read_lines(path) == ("Anna Lee", "B\u00e9la")
    path.write_text("one\u2028text\x0b here\n", encoding="utf-8")
    assert read_lines(path) == ("one\u2028text\x0b here",) and read_lines(None) == ()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "does not exist"),
        (b"\n \n", "is empty"),
        (b"B\xe9la", "not UTF-8 text: .* at byte 1"),
        (b"\x1f\x8b1", "read"),
    ],
)
def test_a_file_of_lines_that_cannot_be_read_is_named(tmp_path, data, reason):
    path = tmp_path / "names.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"names\.txt.*{reason}"):
        read_lines(path)


def test_settings_are_parsed_as_their_fields_types():
    method = make_method("rocr", key_values(["layers=(0, 1)", "ridge=0.5", "anchor=Anna"]), seed=3)
    assert (method.layers, method.ridge, method.anchor, method.seed) == ((0, 1), 0.5, "Anna", 3)
