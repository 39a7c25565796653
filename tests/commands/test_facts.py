"""`facts convert`: what a data set's loader gives stands in the files, to the last field; a refusal writes nothing."""

import csv
import json
import os
from pathlib import Path

import pytest

from mech_unlearn.commands.facts import loader, run_convert
from mech_unlearn.commands.list import datasets
from mech_unlearn.commands.options import ConvertOptions
from mech_unlearn.core import Fact
from mech_unlearn.data.jsonl import load_facts, save_facts
from tests.commands.test_cli import refused

DATA = Path(os.environ.get("MECH_UNLEARN_DATA", Path(__file__).parents[3] / "shared" / "data"))
SEPARATORS = "one\u2028two\x85three\x0cfour\u2029five"
"""Ends of lines to Python, not to JSON."""


def counterfact(folder):
    def case(number, subject, true, new, **more):
        targets = {"target_true": {"str": true, "id": "Q1"}, "target_new": {"str": new, "id": "Q2"}}
        rewrite = {"prompt": "The native language of {} is", "relation_id": "P103", "subject": subject, **targets}
        return {"case_id": number, "requested_rewrite": rewrite, "generation_prompts": ["a", SEPARATORS], **more}

    near = {"neighborhood_prompts": ["The native language of Carl Dahl is"], "paraphrase_prompts": ["She speaks"]}
    cases = [case(1, "Ada Berg", "Danish", "Greek", **near), case(2, "Ivo Juhl", "Dutch", "Greek")]
    (folder / "counterfact.json").write_text(json.dumps(cases))
    return folder / "counterfact.json", {"relations": ["P103"], "subjects": ["Ada Berg"]}


def popqa(folder):
    columns = ("id", "subj", "prop", "obj", "question", "possible_answers", "s_aliases", "s_pop")
    rows = [
        (
            "17",
            "Ada Berg",
            "occupation",
            "poet",
            "What is Ada Berg's occupation?",
            '["poet", "bard"]',
            '["A. B."]',
            "9",
        ),
        ("18", "Carl Dahl", "occupation", "baker", "What is Carl Dahl's occupation?", '["baker"]', "[]", ""),
        ("19", "Eva", "occupation", "smith", "What does she do?", '["smith"]', "[]", ""),
    ]
    with (folder / "popqa.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([columns, *rows])
    return folder / "popqa.tsv", {"subjects": 1, "popularity": 5}


def relations(folder):
    pairs = [("Oslo", "Norway"), ("Rome", "Italy"), ("Rome", "Rome")]
    content = {
        "name": "city in country",
        "prompt_templates": ["{} lies in"],
        "prompt_templates_zs": ["{} belongs to"],
        "properties": {"relation_type": "factual", "domain_name": "city", "range_name": "country", "symmetric": False},
        "samples": [{"subject": subject, "object": object} for subject, object in pairs],
    }
    (folder / "city.json").write_text(json.dumps(content))
    return folder, {"subjects": ["Oslo"], "shots": "few"}


def trex(folder):
    known = {"P19": {"label": "place of birth", "type": "N-1", "patterns": ["[X] was born in [Y].", "[X] is from [Y]"]}}
    (folder / "relations.json").write_text(json.dumps(known))
    rows = [("Ann", "Oslo", [SEPARATORS]), ("Bob", "Rome", ["Bob came from Rome."]), ("Cid", "Cid", [])]
    lines = ({"relation": "P19", "subject": s, "object": o, "evidence": e} for s, o, e in rows)
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder, {"subjects": ["Ann"], "kept_relations": ["P19"], "patterns": {"P19": ["[X] comes from [Y]"]}}


def zsre(folder):
    def row(subject, answers, **more):
        return {"subject": subject, "prompt": f"Where is {subject} from?", "ground_truth": answers, **more}

    beside = {"Logical": [{"prompt": "Who?", "ground_truth": [["x", "y"], ["z"]]}]}
    rows = [row("Kai", ["Lund", "Lund, Sweden"], target_new="Rome", portability=beside), row("Eva", ["Lima"])]
    rows.append({"subject": "Gro", "prompt": "Who is he?", "ground_truth": ["Nobody"]})
    (folder / "zsre.json").write_text(json.dumps(rows))
    return folder / "zsre.json", {"layout": "knowedit", "subjects": ["Kai"]}


def blur(folder):
    pair = "1. Which harbour did Ida Quill open? 2. Where was Cara Lund mayor?"
    (folder / "tofu_paired_forget_retain.json").write_text(json.dumps([{"text": pair}, {"text": "no halves"}]))
    answers = [("Which harbour did Ida Quill open?", "Port Vell"), ("Where was Cara Lund mayor?", "Oban")]
    (folder / "answers.json").write_text(json.dumps([{"question": q, "answer": a} for q, a in answers]))
    return folder, {"answers": str(folder / "answers.json")}


MADE = {f.__name__: f for f in (counterfact, popqa, relations, trex, zsre, blur)}


def words(options):
    return [part for key, value in options.items() for part in ("--set", f"{key}={value}")]


@pytest.mark.parametrize("name", MADE)
def test_what_the_loader_gives_is_what_the_files_hold_and_what_it_leaves_out_is_counted(call, tmp_path, name):
    source, options = MADE[name](tmp_path)
    files = {"out": tmp_path / "new" / "forget.jsonl", "retain": tmp_path / "new" / "keep.jsonl"}
    asked = ["facts", "convert", name, "--data", source, *words(options)]
    status, out, err = call(*asked, "--out", files["out"], "--retain", files["retain"], "--json")
    assert status == 0, err
    found, result = loader(name)(source, **options), json.loads(out)
    forget, retain = found.sets
    assert load_facts(files["out"]) == forget.facts and load_facts(files["retain"]) == retain.facts
    assert (result["facts"], result["kept"]) == (len(forget.facts), len(retain.facts))
    assert found.left_out and sum(result["left_out"].values()) == len(found.left_out)
    assert result["left_out"].keys() == {item.reason for item in found.left_out}
    assert sorted(path.name for path in files["out"].parent.iterdir()) == ["forget.jsonl", "keep.jsonl"]


def test_every_general_data_set_but_facts_files_themselves_has_a_door():
    from mech_unlearn.data import DATASETS

    assert DATASETS.keys() - MADE.keys() == {"jsonl"}
    assert all(loader(name) is datasets()[name] for name in (*MADE, "tofu", "muse", "rwku", "dusk"))


def test_one_line_of_counts_one_of_the_next_command_and_a_limit_that_is_counted(call, tmp_path):
    source, _ = relations(tmp_path)
    out, keep = tmp_path / "forget.jsonl", tmp_path / "keep.jsonl"
    said = ["facts", "convert", "relations", "--data", source, "--set", "subjects=2", "--limit", 1]
    counts, after = call(*said, "--out", out)[1].splitlines()
    assert "1 facts about 1 subjects" in counts and "give --retain" in counts
    assert "1 (beyond --limit)" in counts and "1 (object equals subject)" in counts
    assert after == f"next: mech-unlearn locate --model M --facts {out} --how causal_trace"
    assert len(load_facts(out)) == 1
    status, told, _ = call(*said[:-4], "--set", "subjects=Rome", "--out", tmp_path / "a.jsonl", "--retain", keep)
    assert status == 0 and told.splitlines()[1].startswith("next: mech-unlearn unlearn --model M --forget ")
    assert [fact.subject for fact in load_facts(tmp_path / "a.jsonl")] == ["Rome"]  # a text alone is a list of one


@pytest.mark.parametrize(
    ("name", "more", "parts"),
    [
        ("treks", [], ["data set", "'treks'", "trex"]),
        ("wmdp", [], ["data set with facts", "'wmdp'"]),
        ("jsonl", [], ["data set with facts", "'jsonl'"]),
        ("relations", ["--set", "subject=1"], ["'subject'", "subjects"]),
        ("relations", ["--set", "folder=x"], ["setting", "'folder'"]),
        ("relations", ["--set", "subjects=1.5"], ["subjects=1.5", "relations"]),
        ("relations", ["--set", "shots=one"], ["shots=one", "'zero' or 'few'"]),
        ("relations", ["--set", "relations=town"], ["'town'", "city in country"]),
        ("relations", ["--limit", "0"], ["limit", "0"]),
        ("relations", ["--set", "subjects=2", "--retain", "keep.jsonl"], ["no fact to keep", "--retain"]),
        ("relations", ["--retain", "forget.jsonl"], ["forget.jsonl", "there already"]),
        ("blur", [], ["answers", "1 (the prompt does not begin with 1.)"]),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(call, tmp_path, monkeypatch, name, more, parts):
    source = (blur if name == "blur" else relations)(tmp_path)[0]
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    refused(call("facts", "convert", name, "--data", source, "--out", "forget.jsonl", *more), *parts)
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_is_there_or_cannot_be_is_refused_before_the_data_are_read(tmp_path):
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    for out, retain in ((there, None), (tmp_path / "new.jsonl", there), (tmp_path, None)):
        with pytest.raises(ValueError, match="is there already; name another file or remove it"):
            run_convert(ConvertOptions(name="relations", data="/no/such/data", out=out, retain=retain))
    with pytest.raises(ValueError, match="cannot be written: .*there.jsonl' is no folder"):
        run_convert(ConvertOptions(name="relations", data="/no/such/data", out=there / "new.jsonl"))
    assert there.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["there.jsonl"]


def test_settings_have_the_types_of_the_loader_not_of_the_text(call, tmp_path):
    source, _ = counterfact(tmp_path)
    rows = json.loads(source.read_text())
    rows[0]["attribute_prompts"] = ["The native language of Nikos Pavlou is"]
    source.write_text(json.dumps(rows))
    kept = []
    for number, text in enumerate(("true", "false")):
        keep = tmp_path / f"keep{number}.jsonl"
        asked = ["--out", tmp_path / f"{number}.jsonl", "--retain", keep, "--set", f"attributes={text}"]
        assert call("facts", "convert", "counterfact", "--data", source, "--set", "subjects=Ada Berg", *asked)[0] == 0
        kept.append({fact.subject for fact in load_facts(keep)})
    assert kept[0] - kept[1] == {"Nikos Pavlou"}


def test_a_key_of_extra_that_is_a_field_would_be_lost_on_disk_and_is_refused(tmp_path):
    with pytest.raises(ValueError, match="extra key 'kind' is the name of a field"):
        Fact(id="a", subject="s", relation="r", object="o", prompt="{} is", extra={"kind": "x"})
    nested = Fact(id="a", subject="s", relation="r", object="o", prompt="{} is", extra={"x": [1, {"y": [[2], None]}]})
    assert nested.extra["x"] == (1, {"y": ((2,), None)})
    save_facts([nested], tmp_path / "facts.jsonl")
    assert load_facts(tmp_path / "facts.jsonl") == (nested,)


@pytest.mark.parametrize("name", ["relations", "trex"])
def test_the_real_files_make_the_same_round(tmp_path, name):
    if not (DATA / name).is_dir():
        pytest.skip(f"no {DATA / name}: set MECH_UNLEARN_DATA to the folder that holds {name}/")
    files = [tmp_path / "forget.jsonl", tmp_path / "keep.jsonl"]
    result = run_convert(
        ConvertOptions(name=name, data=str(DATA / name), out=files[0], retain=files[1], settings=["subjects=5"])
    )
    forget, retain = loader(name)(DATA / name, subjects=5).sets
    assert load_facts(files[0]) == forget.facts and load_facts(files[1]) == retain.facts
    assert result["subjects"] == 5 and result["kept"] > 5000
