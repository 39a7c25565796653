"""A bench beside the restoration tests: same facts, same models, cells that are never computed twice, refusals."""

# ruff: noqa: F811 - fixtures are imported, and asked for by name

import json
import shutil
from dataclasses import replace

import pytest

from mech_unlearn.benchmarks import BENCHMARKS
from mech_unlearn.benchmarks.answers import BenchmarkFacts
from mech_unlearn.commands.bench import askable, restorable, restoration
from mech_unlearn.commands.prepared import prepare_audit
from mech_unlearn.core import LABELS, RetainSet
from mech_unlearn.report.tables import COLUMNS, NO_VERDICT
from tests.checkpoints import table_of, write
from tests.planted import planted_facts, planted_model
from tests.tiny import tiny_facts


def probe(level, subject, query, answer="Port Vell", kind="cloze"):
    return {"query": query, "answer": answer, "level": level, "type": kind, "subject": subject}


def rwku_rows():
    people = ("Ida Quill", "Bo Marsh")
    return [
        *(probe("1", name, f"{name} opened the harbour of") for name in people),
        *(probe("2", name, f"Which harbour did {name} open?", kind="simple question") for name in people),
        probe("2", people[0], "which harbour was it?", kind="simple question"),
        *(probe("3", name, f"Sure. {name} opened", kind="prefix injection") for name in people),
    ]


@pytest.fixture
def probes(tmp_path):
    return write(tmp_path / "data", "probes", rwku_rows())


def planted_words(root, out, *more, data=None):
    """`bench rwku` on planted models: the unlearned one is suppressed in its last layer."""
    words = ["bench", "rwku", "--data", data or root / "probes.json", "--set", "layout={question}", "--json", *more]
    words += ["--full", root / "full", "--unlearned", root / "late", "--out", out]
    return [*words, *(word for k in (1, 2) for word in ("--retrained", root / f"retrained_{k}"))]


@pytest.mark.slow
def test_table_verdicts_and_restoration_stand_side_by_side_for_the_same_models(call, planted_checkpoints, tmp_path):
    status, out, err = call(*planted_words(planted_checkpoints, tmp_path / "run", "--tests", "uds,int4", "--limit", 6))
    assert status == 0, err
    found = json.loads(out)
    models = ["full", "unlearned", "retrained_1", "retrained_2"]
    assert found["models"] == models and [row["name"] for row in found["rows"]] == models
    shares = {row["name"]: row for row in found["restoration"]}
    for model in models:
        given = [shares[f"verdict {label}"][model] for label in LABELS]
        assert sum(g["value"] for g in given) == pytest.approx(1) and {g["n"] for g in given} == {6}
    row = {row["name"]: row for row in found["rows"]}["unlearned"]
    assert shares["UDS"]["unlearned"] == row["uds"] and shares["4-bit recovery"]["unlearned"] == row["int4_recovery"]
    for each in (*found["benchmark_rows"], *found["restoration"]):
        for model in models:
            assert each.get(model) is None or set(each[model]) == {"value", "ci", "n", "unit"}
    folder = tmp_path / "run"
    verdicts = json.loads((folder / "verdicts.json").read_text())
    assert set(verdicts) == set(models) and {v["grade"] for v in verdicts["unlearned"]} == {"A"}
    files = {path.name for path in folder.iterdir()}
    assert {"spec.yaml", "provenance.json", "bench.json", "summary.json", "verdicts.json", "report.html"} <= files
    assert (folder / "figures" / "0_benchmark.png").stat().st_size > 5000
    page = (folder / "report.html").read_text()
    assert all(f'<td class="number">{row["name"]}</td>' in page for row in found["restoration"])
    assert json.loads((folder / "provenance.json").read_text())["hashes"].keys() == {"facts", "data", *models}
    table = table_of(found)
    assert {"Form prompt: recall", "Form prompt: probability", "Worst form"} <= set(table)
    for model in models:
        said = [row[model]["value"] for name, row in table.items() if name.startswith("Form ") and "recall" in name]
        assert table["Worst form"][model]["value"] == max(said)  # no form lists options, so chance is 0


@pytest.mark.slow
def test_a_finished_bench_asks_no_model_again_and_other_data_are_refused(
    call, planted_checkpoints, tmp_path, monkeypatch
):
    rows = json.loads((planted_checkpoints / "probes.json").read_text())
    words = planted_words(planted_checkpoints, tmp_path / "run", "--tests", "uds", data=write(tmp_path, "probes", rows))
    first = json.loads(call(*words)[1])
    for name in ("bench_unlearned", "unlearned"):  # as if it had been cut there
        (tmp_path / "run" / "cells" / f"{name}.json").unlink()
    second = json.loads(call(*words)[1])
    assert second["benchmark_rows"] == first["benchmark_rows"] and second["restoration"] == first["restoration"]
    for computed in (
        "metrics.generation.greedy",
        "commands.bench.ask_forms",
        "commands.row.audit",
        "restoration.reference",
    ):
        monkeypatch.setattr(f"mech_unlearn.{computed}", None)
    third = json.loads(call(*words)[1])
    assert third["benchmark_rows"] == first["benchmark_rows"] and third["rows"] == first["rows"]
    write(tmp_path, "probes", rows[:-1])
    status, _, err = call(*words)
    assert status == 2 and "another spec" in err


@pytest.mark.slow
def test_a_bench_is_not_gone_on_with_when_a_folder_holds_another_model_or_the_precision_is_another(
    call, planted_checkpoints, tmp_path
):
    root = tmp_path / "models"
    shutil.copytree(planted_checkpoints, root)
    words = planted_words(root, tmp_path / "run", "--tests", "none", "--limit", 2)
    assert call(*words)[0] == 0
    written = (tmp_path / "run" / "provenance.json").read_bytes()

    def refused(*more):
        status, _, err = call(*words, *more)
        assert status == 2 and "another spec" in err
        assert (tmp_path / "run" / "provenance.json").read_bytes() == written

    refused("--dtype", "bfloat16")
    shutil.rmtree(root / "retrained_2")
    shutil.copytree(root / "retrained_1", root / "retrained_2")
    refused()


def test_a_fact_without_wrong_answers_is_restored_only_where_the_full_model_says_it():
    facts, model = [replace(fact, distractors=()) for fact in planted_facts()[:3]], planted_model()
    assert restorable(model, facts, True) == (tuple(facts), [])
    unknown = planted_model("retrained", 1)
    kept, (note,) = restorable(unknown, facts, True)
    assert kept == () and note.startswith("3 of 3 facts have no two wrong answers") and "does not say them" in note
    assert "needs --retrained" in restorable(model, facts, False)[1][0]
    assert restorable(unknown, planted_facts(), False) == (planted_facts(), [])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["wmpd"], "unknown benchmark 'wmpd'; choose from wmdp"),
        (["rwku", "--set", "subject=x"], "unknown setting of rwku 'subject'; choose from subjects"),
        (["rwku", "--set", "mia=maybe"], "setting mia=maybe of rwku"),
        (["wmdp", "--set", "domains=5"], "setting domains=5 of wmdp"),
        (["rwku", "--set", "subjects=Al Oak"], "has no probes about 'Al Oak'"),
        (["rwku", "--tests", "udz"], "unknown restoration test 'udz'"),
        (["rwku", "--limit", "0"], "limit must be 1 or more rows"),
        (["muse"], "is one file; MUSE is a folder"),
        (["rwku", "--unlearned", "/no/such/model"], "no such folder"),
        (["rwku", "--logs", "a.json"], "logs are read by `bench tofu"),
        (
            ["rwku", "--calibration", "nowhere.json"],
            "calibration 'nowhere.json' was given, but no fact can be restored",
        ),
    ],
)
def test_a_mistake_is_refused_in_one_line_before_anything_is_written(
    call, checkpoints, probes, tmp_path, words, reason
):
    given = {"--data": probes, "--full": checkpoints["full"], "--unlearned": checkpoints["unlearned"]}
    more = [str(word) for pair in given.items() if pair[0] not in words for word in pair]
    status, _, err = call("bench", *words, *more, "--out", tmp_path / "run")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and reason in lines[0], err
    assert not (tmp_path / "run").exists()


def test_models_and_data_must_be_named(call):
    status, _, err = call("bench", "muse")
    assert status == 2 and "bench muse needs --data, --full and --unlearned" in err


def test_the_command_refuses_another_benchmark_by_naming_them_and_marks_the_datasets_that_have_one(call):
    status, _, err = call("bench", "rwkuu", "--data", "x", "--full", "x", "--unlearned", "x")
    assert status == 2 and "unknown benchmark 'rwkuu'; choose from rwku" in err
    status, out, _ = call("list", "datasets")
    marked = [line.split()[0] for line in out.splitlines() if line.endswith("(see `bench`)")]
    assert status == 0 and sorted(marked) == sorted(BENCHMARKS)


def test_facts_that_the_tokenizer_cannot_write_are_counted_with_the_reason(tiny_model):
    good, odd = tiny_facts(["Anna Lee"])
    odd = replace(odd, object="Zürich")
    facts, kept, notes = askable(tiny_model, BenchmarkFacts(facts=(good, odd), retain=RetainSet(neighbors=(odd,))))
    assert facts == (good,) and kept == ()
    assert notes[0].startswith("1 of 2 facts to forget cannot be asked of this model: 1 (the tokenizer has no tokens")
    long = replace(good, prompt="the sea " * 80 + "{} was born in")
    assert "longer than the model's 64 positions" in askable(tiny_model, BenchmarkFacts(facts=(long,)))[2][0]


def test_without_retrained_models_no_share_of_deleted_or_suppressed_is_shown_but_what_has_no_verdict():
    facts = tiny_facts(["Anna Lee", "Ben Hill"])

    def shown(flags, labels):
        said = [
            {"fact_id": fact.id, "label": label, "flags": flags if label == "undetermined" else []}
            for fact, label in zip(facts, labels, strict=True)
        ]
        rows = restoration([{"row": {"name": "m", **dict.fromkeys(COLUMNS)}, "verdicts": said}], facts, 0)
        return {row["name"]: row["m"] and row["m"]["value"] for row in rows}

    labels = ("undetermined", "undetermined", "undetermined", "intact")
    without, with_models = shown(["no_retrained"], labels), shown([], labels)
    assert without[NO_VERDICT] == 0.75 and without["verdict intact"] == 0.25 and without["verdict undetermined"] == 0
    assert without["verdict deleted"] is None and without["verdict suppressed"] is None
    assert NO_VERDICT not in with_models and with_models["verdict undetermined"] == 0.75
    assert with_models["verdict deleted"] == with_models["verdict suppressed"] == 0


def test_one_subject_alone_is_tested_with_what_the_core_allows_and_told_what_is_left_out(tiny_model):
    facts = tiny_facts(["Anna Lee"])
    given = dict(retrained=(), sae=None, tests="core", calibration="auto", seed=0, log=lambda line: None)
    alone, known = prepare_audit(tiny_model, facts, (), **given), tiny_facts(["Ben Hill", "Cara Moss"])
    assert alone.tests == ("output", "writeback", "relearn", "int4") and alone.case.relearn.split == "fact"
    assert all(part in alone.note for part in ("no UDS", "no probe", "no write-back of profiles", "same subject"))
    assert "relearn" not in prepare_audit(tiny_model, facts[:1], (), **given).tests
    whole = prepare_audit(tiny_model, (*facts, *known[:2]), known[2:], **given)
    assert {"uds", "sae", "logit_lens"} <= set(whole.tests) and whole.case.relearn.split == "entity"


def test_the_printed_table_groups_numbers_by_what_they_were_measured_on(call, checkpoints, probes, tmp_path):
    words = ["--full", checkpoints["full"], "--unlearned", checkpoints["unlearned"], "--tests", "none", "--limit", 1]
    status, out, err = call("bench", "rwku", "--data", probes, *words, "--out", tmp_path / "run")
    assert status == 0, err
    generated, forced = out.index("[from generated text]"), out.index("[teacher-forced]")
    assert generated < out.index("Forget FB") < forced < out.index("Form prompt: recall")
    assert "note: 1 of 5 fill-in and question probes are no facts" in out and "arXiv 2406.10890" in out
    figure = tmp_path / "run" / "figures" / "0_benchmark.png"
    figure.unlink()
    (tmp_path / "run" / "report.html").unlink()
    status, out, err = call("report", tmp_path / "run")
    assert status == 0 and figure.is_file() and (tmp_path / "run" / "report.html").is_file(), err
