"""T-REx: every triple is a fact or listed, prompts end in the object, and what is kept does not name what goes."""

import gzip
import json
from collections import Counter

import pytest

from mech_unlearn.data.trex import fits, load_trex, prompt_of
from tests.paths import SHARED_DATA

DATA = SHARED_DATA / "trex"
present = pytest.mark.skipif(
    not (DATA / "facts.jsonl.gz").is_file(),
    reason=f"no {DATA}: set MECH_UNLEARN_DATA to the folder that holds trex/",
)
RELATIONS = {
    "P19": {
        "label": "place of birth",
        "type": "N-1",
        "patterns": ["[X] was born in [Y].", "[Y] is where [X] was born.", "[X] is native to [Y] ."],
    },
    "P106": {
        "label": "occupation",
        "type": "N-M",
        "patterns": ["[X] works as [Y].", "[X]'s job is that of a [Y].", "[X]'s job is that of an [Y]."],
    },
    "P31": {"label": "instance of", "type": "N-M", "patterns": ["The [Y]-like [X]"]},
}


def row(relation, subject, object, evidence=()):
    return {"relation": relation, "subject": subject, "object": object, "evidence": list(evidence), "more": 1}


ROWS = [
    row("P19", "Ann", "Oslo", ["Ann came from Oslo."]),
    row("P106", "Ann", "actor"),
    row("P106", "Ann", "painter"),
    row("P19", "Bob", "Rome", ["Bob met Ann in Rome.", "Bob was a child of Rome.", "Annapolis is far from Bob."]),
    row("P19", "Cid", "Bern"),
    row("P106", "Bob", "baker"),
    row("P106", "Cid", "Ann"),
    row("P31", "Bob", "human"),
    row("P19", "Rome", "Rome"),
    row("P19", "Bob", "Rome"),
    row("P9", "Bob", "Rome"),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "relations.json").write_text(json.dumps(RELATIONS))
    with gzip.open(tmp_path / "facts.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, ROWS)))
    return tmp_path


def test_rows_become_facts_of_four_kinds_and_every_other_row_is_listed_with_its_reason(folder):
    found = load_trex(folder, relations=["P19"], subjects=["Ann"])
    forget, retain = found.sets
    assert [(f.subject, f.relation, f.object) for f in forget.facts] == [("Ann", "place of birth", "Oslo")]
    assert [(f.subject, f.object) for f in retain.neighbors] == [("Bob", "Rome"), ("Cid", "Bern")]
    assert [(f.subject, f.object) for f in retain.same_subject] == [("Ann", "actor"), ("Ann", "painter")]
    assert [(f.subject, f.object) for f in retain.general] == [("Bob", "baker")]
    assert {item.row: item.reason for item in found.left_out} == {
        6: "its object is a forgotten subject",
        7: "relation P31 (instance of) has no pattern that ends in its object",
        8: "object equals subject",
        9: "the same fact stands in an earlier row of facts",
        10: "relation 'P9' is not in relations.json",
    }
    assert len(forget.facts) + len(retain.facts) + len(found.left_out) == len(ROWS)


def test_patterns_that_end_in_the_object_are_prompts_and_the_last_is_held_out(folder):
    fact = load_trex(folder, subjects=["Ann"]).forget.facts[0]
    assert (fact.prompt, fact.paraphrases, fact.heldout) == ("{} was born in", (), ("{} is native to",))
    seen = load_trex(folder, subjects=["Ann"], heldout=0).forget.facts[0]
    assert seen.paraphrases == ("{} is native to",) and seen.heldout == ()
    assert fact.extra["evidence"] == ("Ann came from Oslo.",) and fact.extra["relation_id"] == "P19"


def test_the_article_before_the_object_fits_it(folder):
    actor, painter = load_trex(folder, subjects=["Ann"], relations=["occupation"], heldout=0).forget.facts
    assert actor.paraphrases == ("{}'s job is that of an",) and painter.paraphrases == ("{}'s job is that of a",)
    assert fits("{} is a", False) and not fits("{} is an", False) and fits("{} saw a banana", True)


@pytest.mark.parametrize(
    ("pattern", "prompt"),
    [
        ("[X] is part of [Y] .", "{} is part of"),
        ("[X], from [Y],", "{}, from"),
        ("[X] label : [Y].", "{} label :"),
        ("[Y] owns [X].", None),
        ("[X] is a [Y] player.", None),
        ("[X] is [Y], not [Y]", None),
        ("[X] {} [Y]", None),
    ],
)
def test_a_pattern_is_a_prompt_only_if_it_ends_in_the_object(pattern, prompt):
    assert prompt_of(pattern) == prompt


def test_a_relation_without_a_usable_pattern_can_be_given_one(folder):
    found = load_trex(folder, subjects=["Bob"], patterns={"P31": ["[X] is a [Y]."]})
    assert ("instance of", "{} is a") in {(fact.relation, fact.prompt) for fact in found.forget.facts}
    with pytest.raises(ValueError, match="unknown relation 'P0'"):
        load_trex(folder, patterns={"P0": ["[X] is a [Y]."]})


def test_distractors_are_objects_of_the_relation_but_no_true_one(folder):
    found = load_trex(folder, subjects=["Ann"], distractors=9)
    for fact in found.forget.facts:
        right = {other.object for other in found.forget.facts if other.relation == fact.relation}
        pool = {r["object"] for r in ROWS if RELATIONS.get(r["relation"], {}).get("label") == fact.relation}
        assert set(fact.distractors) == pool - right - {"Ann", "Rome"} | ({"Rome"} & (pool - right))
    assert not any(fact.distractors for fact in load_trex(folder, subjects=["Ann"], distractors=0).forget.facts)


def test_texts_are_evidence_of_what_is_kept_and_name_no_forgotten_subject(folder):
    assert load_trex(folder, subjects=["Ann"]).retain.texts == (
        "Bob was a child of Rome.",
        "Annapolis is far from Bob.",
    )
    assert "Bob met Ann in Rome." in load_trex(folder, subjects=["Cid"]).retain.texts


def test_only_the_relations_asked_for_are_read(folder):
    found = load_trex(folder, relations=["P19"], subjects=["Ann"], kept_relations=())
    assert {fact.relation for fact in found.retain.facts} == {"place of birth"} and len(found.left_out) == 2
    found = load_trex(folder, relations=["P19"], subjects=["Ann"], kept_relations=["occupation"])
    assert {fact.relation for fact in found.retain.facts} == {"place of birth", "occupation"}


def test_lamas_own_folder_gives_the_same_facts(folder, tmp_path_factory):
    lama = tmp_path_factory.mktemp("lama")
    (lama / "TREx").mkdir()
    lines = [
        {
            "relation": key,
            "label": entry["label"],
            "template": entry["patterns"][0],
            "type": entry["type"],
            "description": "",
        }
        for key, entry in RELATIONS.items()
    ]
    (lama / "relations.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for key in RELATIONS:
        rows = [
            {
                "uuid": "x",
                "predicate_id": key,
                "sub_label": r["subject"],
                "obj_label": r["object"],
                "evidences": [
                    {
                        "sub_surface": "x",
                        "obj_surface": r["object"],
                        "masked_sentence": text.replace(r["object"], "[MASK]"),
                    }
                    for text in r["evidence"]
                ],
            }
            for r in ROWS
            if r["relation"] == key
        ]
        (lama / f"TREx/{key}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ours, theirs = (load_trex(f, relations=["P19"], subjects=["Ann"]) for f in (folder, lama))
    for a, b in ((ours.forget.facts, theirs.forget.facts), (ours.retain.facts, theirs.retain.facts)):
        assert [(f.subject, f.relation, f.object, f.prompt, f.distractors) for f in a] == [
            (f.subject, f.relation, f.object, f.prompt, f.distractors) for f in b
        ]
    assert ours.retain.texts == theirs.retain.texts and theirs.forget.facts[0].id == "TREx/P19/0"
    assert len(theirs.left_out) == len(ours.left_out) - 1  # no row of P9
    (lama / "TREx/P19.jsonl").write_text('{"predicate_id": "P19", "sub_label": "Ann"}')
    with pytest.raises(ValueError, match=r"P19.jsonl, row 0: field 'obj_label' must be given"):
        load_trex(lama)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"relations": ["P7"]}, "unknown relation 'P7'; choose from P19 (place of birth)"),
        ({"subjects": ["Anna"]}, "no subject with a fact to forget 'Anna' in the data; near it: Ann"),
        ({"subjects": "Ann"}, "a number or a list of one name or more, got 'Ann'"),
        ({"subjects": 9}, "from 1 to the 3 that have a fact to forget, got 9"),
        ({"subjects": 0}, "from 1 to the 3 that have a fact to forget, got 0"),
        ({"heldout": -1}, "heldout must be 0 or more"),
        ({"distractors": -1}, "distractors must be 0 or more"),
        ({"folder": "nowhere"}, "neither a folder nor a hub id"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_reason(folder, settings, reason):
    with pytest.raises(ValueError) as error:
        load_trex(**{"folder": folder, "subjects": ["Ann"]} | settings)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([], "expected an object of one relation or more, found list"),
        ({"P1": 3}, "relation 'P1': expected a JSON object, found int"),
        ({"P1": {"patterns": []}}, "relation 'P1': field 'label' must be given"),
        ({"P1": {"label": "a", "patterns": [3]}}, "relation 'P1': field 'patterns.0' must be a string, found 3"),
    ],
)
def test_a_bad_entry_of_the_relations_is_named(folder, entries, reason):
    (folder / "relations.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="relations.json") as error:
        load_trex(folder)
    assert reason in str(error.value)


@pytest.fixture(scope="module")
def shipped():
    return load_trex(DATA, relations=["P19", "P106"], subjects=40)


@present
def test_all_22881_shipped_triples_are_facts_or_listed(shipped):
    kept = len(shipped.forget.facts) + len(shipped.retain.facts)
    reasons = Counter(item.reason.split(" ")[0] for item in shipped.left_out)
    assert kept + len(shipped.left_out) == 22_881 and kept >= 20_900
    assert reasons["relation"] == 922 + 976  # P31 and P527 have no pattern
    assert {item.row for item in shipped.left_out}.isdisjoint(int(f.id.split("/")[1]) for f in shipped.retain.facts)


@present
def test_the_kinds_of_shipped_facts_are_disjoint_and_as_asked(shipped):
    forget, retain = shipped.sets
    gone = {fact.subject for fact in forget.facts}
    assert len(gone) == 40 and {fact.relation for fact in forget.facts} <= {"place of birth", "occupation"}
    assert {fact.relation for fact in retain.neighbors} <= {fact.relation for fact in forget.facts}
    assert not {fact.relation for fact in retain.general} & {fact.relation for fact in forget.facts}
    assert {fact.subject for fact in retain.same_subject} <= gone
    assert not gone & {fact.subject for fact in (*retain.neighbors, *retain.general)}
    assert not gone & {fact.object for fact in (*retain.neighbors, *retain.general)}
    ids = [fact.id for fact in (*forget.facts, *retain.facts)]
    assert len(set(ids)) == len(ids) and len(retain.texts) > 40_000


def test_the_same_seed_draws_the_same_subjects_and_another_seed_others(folder):
    many = [row("P19", f"Person {i}", f"Town {i % 30}") for i in range(200)]
    for rows in (many, many[::-1]):  # the draw does not depend on the order of the file
        (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        first, again, other = (load_trex(folder, subjects=9, seed=seed) for seed in (0, 0, 1))
        assert first == again and first.sets != other.sets
        drawn = {fact.subject: fact.distractors for fact in first.forget.facts}
        assert len(drawn) == 9 and {f.subject for f in first.forget.facts} != {f.subject for f in other.forget.facts}
        if rows is many:
            before = drawn
    assert drawn == before
    assert {f.subject for f in first.forget.facts} != {f.subject for f in other.forget.facts}
