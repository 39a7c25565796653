"""What is odd about facts is found, each kind by its own name, and plain facts are not called odd."""

from dataclasses import replace

import pytest

from mech_unlearn.core import Fact
from mech_unlearn.data.checking import findings, misspelt
from mech_unlearn.data.jsonl import load_facts
from tests.tiny import tiny_facts

FACTS = tiny_facts(["Anna Lee", "Ben Hill"])
CITY = Fact(
    id="city", subject="Rome", relation="capital of", object="Italy", prompt="{} is the capital of",
    distractors=("Norway", "Peru"),
)  # fmt: skip


def told(facts, retain=()):
    return {(one.oddity, one.facts): one.told for one in findings(facts, retain)}


def test_plain_facts_are_not_odd():
    assert findings(FACTS) == () == findings(FACTS, tiny_facts(["Cara Moss"]))
    assert findings((CITY,)) == ()


@pytest.mark.parametrize(
    "facts, retain, oddity, ids, words",
    [
        ((FACTS[0],), (replace(FACTS[0], id="b"),), "kept and forgotten", (FACTS[0].id, "b"), "forgotten and kept"),
        ((FACTS[0],), (replace(FACTS[-1], id=FACTS[0].id),), "id twice", (FACTS[0].id,), "both files"),
        ((replace(CITY, extra={"paraphrase": ("a",)}),), (), "misspelt field", ("city",), "'paraphrases' is"),
        ((CITY,), (replace(CITY, id="b", subject="Romeville"),), "name in a name", ("city",), "'Romeville'"),
        ((CITY,), (replace(CITY, id="b", subject="New Rome"),), "name in a name", ("city",), "'New Rome'"),
        ((CITY,), (replace(CITY, id="b", subject="Roma", aliases=("Rome",)),), "name in a name", ("city",), "of both"),
        ((CITY, replace(CITY, id="b", object="Latium")), (), "two answers", ("city", "b"), "2 right answers"),
        ((replace(CITY, distractors=("Norway",)),), (), "distractors", ("city",), "fewer than two"),
        (
            (replace(CITY, distractors=("Norway", "Anna Lee")),), FACTS[:1], "distractors", ("city",),
            "'Anna Lee' is of another type: known as subject of",
        ),
        (
            (replace(CITY, distractors=("Norway", FACTS[0].object)),), FACTS[:1], "distractors", ("city",),
            f"{FACTS[0].object!r} is of another type: known as {FACTS[0].relation}",
        ),
    ],
)  # fmt: skip
def test_each_oddity_is_told_with_the_facts_that_it_is_about(facts, retain, oddity, ids, words):
    found = told(facts, retain)
    assert (oddity, ids) in found and words in found[oddity, ids]


def test_a_name_within_a_word_is_no_name_in_a_name():
    assert findings((CITY,), (replace(CITY, id="b", subject="Jerome Rommel"),)) == ()


def test_a_misspelt_field_is_told_from_a_key_of_ones_own_and_reading_a_file_warns(tmp_path):
    own = {"subject_id": 3, "source": "a", "paraphrase": "b", "Alias": "c", "held_out": ("d",)}
    odd = {"paraphrase": "paraphrases", "Alias": "aliases", "held_out": "heldout"}
    assert misspelt(replace(CITY, extra=own)) == odd
    line = '{"subject": "Rome", "relation": "r", "object": "Italy", "prompt": "{} in", "distractor": ["Peru"]}'
    (tmp_path / "facts.jsonl").write_text(f"# a comment, {{}}\n{line}\n# another\n")
    with pytest.warns(UserWarning, match=r"read by nothing: 'distractor' \('distractors' is\)"):
        (fact,) = load_facts(tmp_path / "facts.jsonl")
    assert fact.distractors == () and fact.extra["distractor"] == ("Peru",) and fact.id == "line2"
