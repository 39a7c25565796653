"""`audit` and `locate` on strangers: folders made by plain transformers, facts in a file, and nothing else given."""

import json

import pytest
from conftest import tiny_tokenizer
from planted import planted_facts, planted_hf

from mech_unlearn.commands import run_audit, run_locate
from mech_unlearn.data.jsonl import save_facts
from mech_unlearn.inputs import make_method

COMMON = dict(device="cpu", dtype="float32", seed=0)


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
    given = dict(retrained=[], retain=None, sae=None, tests="core") | changes
    return run_audit(str(root / "full"), str(root / unlearned), root / "facts.jsonl", out, **given, **COMMON)


def test_an_audit_needs_neither_sae_nor_retrained_model_and_says_grade_b(strangers, tmp_path):
    summary = audited(strangers, tmp_path / "run", "late")
    verdicts = json.loads((tmp_path / "run" / "verdicts.json").read_text())
    assert {v["grade"] for v in verdicts["unlearned"]} == {"B"}
    assert "grade B" in json.loads((tmp_path / "run" / "captions.json").read_text())["note"]
    rows = {row["name"]: row for row in summary["rows"]}
    assert rows["full"]["forget_recall"]["value"] == 1.0
    assert all(v["scores"]["output"] < 0.2 for v in verdicts["unlearned"])  # its margin is nearly that of retrained
    assert rows["unlearned"]["verdicts"]["suppressed"] == 1.0
    assert rows["full"]["verdicts"]["deleted"] == rows["unlearned"]["verdicts"]["deleted"] == 0.0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "data:image/png;base64," in page and "http://" not in page and "https://" not in page


def test_with_retrained_models_the_suppressed_is_told_from_the_retrained(strangers, tmp_path):
    retrained = [str(strangers / f"retrained_{k}") for k in (0, 1)]
    for unlearned, label in (("late", "suppressed"), ("retrained_2", "deleted")):
        out = tmp_path / unlearned
        summary = audited(strangers, out, unlearned, retrained=retrained)
        rows = {row["name"]: row for row in summary["rows"]}
        assert rows["unlearned"]["verdicts"][label] == 1.0, rows["unlearned"]
        assert {v["grade"] for v in json.loads((out / "verdicts.json").read_text())["unlearned"]} == {"A"}


def test_a_finished_audit_is_read_back_and_not_run_again(strangers, tmp_path, monkeypatch):
    first = audited(strangers, tmp_path / "run", "late", tests="uds")
    monkeypatch.setattr("mech_unlearn.rows.audit", None)
    second = audited(strangers, tmp_path / "run", "late", tests="uds")
    assert second["rows"] == first["rows"]
    with pytest.raises(ValueError, match="another spec"):
        audited(strangers, tmp_path / "run", "late", tests="int4")


def test_an_unknown_test_is_refused(strangers, tmp_path):
    with pytest.raises(ValueError, match="unknown restoration test 'udz'.*uds"):
        audited(strangers, tmp_path / "run", "late", tests="udz")


@pytest.mark.parametrize("how", ["logit_lens", "causal_trace"])
def test_locate_finds_the_planted_layer(strangers, tmp_path, how):
    result = run_locate(
        str(strangers / "full"), strangers / "facts.jsonl", how, tmp_path / how, unknown=None, sae=None, **COMMON
    )
    by_layer = result.values if how == "logit_lens" else result.values.nan_to_num(0).amax(0)
    if how == "logit_lens":
        assert by_layer[2] > by_layer[1] + 1  # the MLP of layer 2 writes the object
    assert (tmp_path / how / "figures" / f"{how}.png").is_file()


def test_settings_are_parsed_as_their_fields_types():
    method = make_method("rocr", ["layers=(0, 1)", "ridge=0.5", "anchor=Anna"], seed=3)
    assert (method.layers, method.ridge, method.anchor, method.seed) == ((0, 1), 0.5, "Anna", 3)
