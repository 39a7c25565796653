"""Something wrong in one row of a good file, for every loader of triples: a ValueError names it, or it is counted."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from mech_unlearn.data.counterfact import load_counterfact
from mech_unlearn.data.popqa import load_popqa
from mech_unlearn.data.relations import load_relations
from mech_unlearn.data.source import Loaded
from mech_unlearn.data.trex import load_trex
from mech_unlearn.data.zsre import load_zsre

TREX = [
    {"relation": "P19", "subject": f"Person {i}", "object": f"Town {i}", "object_uri": "Q1", "evidence": ["A text."]}
    for i in range(6)
]
TREX_RELATIONS = {
    "P19": {"label": "birthplace", "type": "N-1", "patterns": ["[X] was born in [Y].", "[X] is from [Y]."]}
}
RELATION = {
    "name": "birthplace",
    "prompt_templates": ["{} was born in", "{} is from"],
    "prompt_templates_zs": ["The birthplace of {} is"],
    "properties": {"relation_type": "factual", "domain_name": "person", "range_name": "town", "symmetric": False},
    "samples": [{"subject": f"Person {i}", "object": f"Town {i}"} for i in range(6)],
}
COUNTERFACT = [
    {
        "case_id": i,
        "requested_rewrite": {
            "prompt": "{} was born in",
            "subject": f"Person {i}",
            "relation_id": "P19",
            "target_true": {"str": f"Town {i}", "id": "Q1"},
            "target_new": {"str": "Rome", "id": "Q2"},
        },
        "paraphrase_prompts": [f"It rained. Person {i} is from"],
        "neighborhood_prompts": [f"Neighbor {i} was born in"],
        "attribute_prompts": [f"Stranger {i} is from"],
        "generation_prompts": [],
    }
    for i in range(6)
]
MEMIT = [
    {
        "subject": f"Person {i}",
        "src": f"Where is Person {i} from?",
        "rephrase": f"Of what town is Person {i}?",
        "answers": [f"Town {i}"],
        "alt": "Rome",
        "loc": f"nq question: what is number {i}",
        "loc_ans": f"it is {i}",
    }
    for i in range(6)
]
KNOWEDIT = [
    {
        "subject": f"Person {i}",
        "prompt": f"Where is Person {i} from?",
        "ground_truth": [f"Town {i}"],
        "target_new": "Rome",
        "rephrase_prompt": f"Of what town is Person {i}?",
        "locality": {
            "Relation_Specificity": [{"prompt": f"The job of Person {i} is", "ground_truth": [["baker", "cook"]]}]
        },
        "portability": {},
    }
    for i in range(6)
]
POPQA = [
    {
        "id": i,
        "subj": f"Person {i}",
        "prop": "birthplace",
        "obj": f"Town {i}",
        "question": f"Where is Person {i} from?",
        "possible_answers": json.dumps([f"Town {i}"]),
        "s_pop": 30,
    }
    for i in range(6)
]
BAD = 3
FIRST = ["Person 0"]


def main_rows(loaded: Loaded, count_all: bool = False) -> int:
    """How many rows became a fact or were listed; held-out phrasings and neighborhood prompts are not rows."""
    facts = [*loaded.forget.facts, *loaded.retain.facts]
    listed = [item for item in loaded.left_out if not item.reason.startswith(("held-out", "neighborhood", "attribute"))]
    if count_all:
        return len(facts) + len(listed)
    return sum("/neighborhood" not in f.id and "/attribute" not in f.id for f in facts) + len(
        [item for item in listed if item.row != 0]
    )


def trex(folder: Path, rows: Any) -> tuple[Loaded, int, int]:
    (folder / "relations.json").write_text(json.dumps(TREX_RELATIONS))
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load_trex(folder, subjects=FIRST)
    return loaded, main_rows(loaded, True), len(rows)


def relations(folder: Path, rows: Any) -> tuple[Loaded, int, int]:
    (folder / "bad.json").write_text(json.dumps(RELATION | {"samples": rows}))
    loaded = load_relations(folder, subjects=FIRST)
    return loaded, main_rows(loaded, True), len(rows)


def counterfact(folder: Path, rows: Any) -> tuple[Loaded, int, int]:
    (folder / "bad.json").write_text(json.dumps(rows))
    loaded = load_counterfact(folder / "bad.json", subjects=FIRST)
    return loaded, main_rows(loaded), len(rows)


def memit(folder: Path, rows: Any) -> tuple[Loaded, int, int]:
    (folder / "bad.json").write_text(json.dumps(rows))
    loaded = load_zsre(folder / "bad.json", subjects=FIRST)
    beside = sum(row.get("loc") is not None or row.get("loc_ans") is not None for row in rows)
    return loaded, main_rows(loaded, True), len(rows) + beside


def knowedit(folder: Path, rows: Any) -> tuple[Loaded, int, int]:
    (folder / "bad.json").write_text(json.dumps(rows))
    loaded = load_zsre(folder / "bad.json", subjects=FIRST)
    beside = sum(len(probes) for row in rows for probes in (row.get("locality") or {}).values())
    return loaded, main_rows(loaded, True), len(rows) + beside


def popqa(folder: Path, rows: Any) -> tuple[Loaded, int, int]:
    (folder / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load_popqa(folder / "bad.jsonl", subjects=FIRST)
    return loaded, main_rows(loaded, True), len(rows)


Load = Callable[[Path, Any], tuple[Loaded, int, int]]
LOADERS: dict[str, tuple[Load, list[dict[str, Any]]]] = {
    "trex": (trex, TREX),
    "relations": (relations, RELATION["samples"]),
    "counterfact": (counterfact, COUNTERFACT),
    "memit": (memit, MEMIT),
    "knowedit": (knowedit, KNOWEDIT),
    "popqa": (popqa, POPQA),
}
TEXTS = st.text(max_size=12) | st.sampled_from(["{}", "", " ", "\ud800", "Person 0", "Town 0", "Rome", "[1]", "9" * 30])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.just(math.nan) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a parsed row."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, item in inner for path in paths(item, (*at, key)))]


@pytest.mark.slow
@settings(max_examples=900, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(LOADERS)), how=st.sampled_from(["text", "text", "junk", "delete"]))
def test_a_row_with_junk_in_it_is_refused_by_file_row_and_field_or_counted(tmp_path_factory, data, name, how):
    load, good = LOADERS[name]
    junk = data.draw(JUNK if how == "junk" else TEXTS)
    rows = copy.deepcopy(good)
    path = data.draw(st.sampled_from(paths(rows[BAD])))
    if not path:
        rows[BAD] = junk
    else:
        inner: Any = rows[BAD]
        for key in path[:-1]:
            inner = inner[key]
        if how == "delete":
            del inner[path[-1]]
        else:
            inner[path[-1]] = junk
    try:
        _, counted, expected = load(tmp_path_factory.mktemp("rows"), rows)
    except ValueError as error:
        event(f"{name} refused")
        message, row = str(error), f"samples.{BAD}" if name == "relations" else f"row {BAD}"
        assert ("bad.json" in message or "facts.jsonl" in message) and row in message and "\n" not in message
        assert not path or str(path[0]) in message or "stands twice" in message, message
    else:
        event(f"{name} read")
        assert counted == expected


@pytest.mark.parametrize("name", sorted(LOADERS))
def test_good_rows_are_all_facts_and_the_three_kinds_are_apart(tmp_path, name):
    load, rows = LOADERS[name]
    loaded, counted, expected = load(tmp_path, rows)
    assert counted == expected and loaded.left_out == ()
    assert [fact.subject for fact in loaded.forget.facts] == ["Person 0"]
    assert {f"Person {i}" for i in range(1, 6)} <= {fact.subject for fact in loaded.retain.neighbors}
    assert all(fact.relation == loaded.forget.facts[0].relation for fact in loaded.retain.neighbors)
    assert all(fact.subject == "Person 0" for fact in loaded.retain.same_subject)
    assert "left out" not in str(loaded) and str(loaded).startswith("1 facts to forget, ")


FILES = {
    "facts.jsonl": ("\n".join(map(json.dumps, TREX)), lambda file: load_trex(file.parent, subjects=FIRST)),
    "relation.json": (json.dumps(RELATION), lambda file: load_relations(file.parent, subjects=FIRST)),
    "counterfact.json": (json.dumps(COUNTERFACT), lambda file: load_counterfact(file, subjects=FIRST)),
    "memit.json": (json.dumps(MEMIT), lambda file: load_zsre(file, subjects=FIRST)),
    "knowedit.jsonl": ("\n".join(map(json.dumps, KNOWEDIT)), lambda file: load_zsre(file, subjects=FIRST)),
    "popqa.csv": (pd.DataFrame(POPQA).to_csv(index=False), lambda file: load_popqa(file, subjects=FIRST)),
    "popqa.tsv": (pd.DataFrame(POPQA).to_csv(index=False, sep="\t"), lambda file: load_popqa(file, subjects=FIRST)),
}


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(
    name=st.sampled_from(sorted(FILES)),
    at=st.floats(0, 1),
    cut=st.sampled_from([0, 0, 0, 1, 2, 30]),
    put=st.text("aé 7X", max_size=3).map(str.encode)
    | st.binary(max_size=6)
    | st.sampled_from([b'"', b",", b"\n", b"\t", b"\0", b"{", b"]", b'"""', b"\r", b"\\"]),
)
def test_a_file_with_bytes_changed_is_refused_by_name_or_read(tmp_path_factory, name, at, cut, put):
    text, load = FILES[name]
    raw = text.encode()
    place = int(at * len(raw))
    changed = raw[:place] + put + raw[place + cut :]
    assume(changed != raw)
    folder = tmp_path_factory.mktemp("bytes")
    if name == "facts.jsonl":
        (folder / "relations.json").write_text(json.dumps(TREX_RELATIONS))
    (folder / name).write_bytes(changed)
    try:
        loaded = load(folder / name)
    except ValueError as error:
        event(f"{name} refused")
        known = ("subject with a fact to forget", "no fact is left", "must have either 'src'")  # the change hit row 0
        assert name in str(error) or any(part in str(error) for part in known)
        assert "\n" not in str(error)
    else:
        event(f"{name} read")
        assert loaded.forget.facts
