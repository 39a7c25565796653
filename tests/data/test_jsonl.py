"""Facts on disk: what is written is read back, and a bad line is named with file, number and reason."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_unlearn.core import fact_to_json
from mech_unlearn.data.jsonl import fact_from_json, load_facts, save_facts

GOOD = {"id": "a", "subject": "Anna Lee", "relation": "born", "object": "Paris", "prompt": "{} was born in"}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_fact_survives_the_way_to_disk_and_back(tmp_path):
    rich = GOOD | {
        "aliases": ["A. Lee"],
        "paraphrases": ["The birthplace of {} is"],
        "heldout": ["Home of {} is"],
        "distractors": ["Rome"],
        "kind": "person",
        "group": "g1",
        "note": {"source": "mine"},
    }
    facts = load_facts(write(tmp_path / "in.jsonl", rich, "", GOOD | {"id": "b"}))
    save_facts(facts, tmp_path / "out.jsonl")
    assert load_facts(tmp_path / "out.jsonl") == facts
    assert facts[0].extra["note"] == {"source": "mine"}
    assert facts[0].templates == ("{} was born in", "The birthplace of {} is")


def test_the_line_number_stands_for_a_missing_id(tmp_path):
    nameless = {key: value for key, value in GOOD.items() if key != "id"}
    assert load_facts(write(tmp_path / "f.jsonl", GOOD, nameless))[1].id == "line2"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{not json", "Expecting property name"),
        ("[1, 2]", "expected a JSON object"),
        (GOOD | {"prompt": "was born in"}, "exactly one {}"),
        (GOOD | {"prompt": "{} and {} were born in"}, "exactly one {}"),
        (GOOD | {"paraphrases": ["no slot"]}, "exactly one {}"),
        (GOOD | {"paraphrases": "not a list"}, "'paraphrases' must be a list of strings"),
        (GOOD | {"object": "Anna Lee"}, "object equals subject"),
        (GOOD | {"object": " "}, "'object' must be a non-empty string"),
        (GOOD | {"object": 7}, "'object' must be a non-empty string"),
        (GOOD | {"distractors": ["Paris"]}, "among its own distractors"),
        (GOOD | {"group": 3}, "'group' must be a string"),
        ({"subject": "Anna Lee"}, "missing field 'relation'"),
        (GOOD, "stands twice"),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_reason(tmp_path, bad, reason):
    path = write(tmp_path / "facts.jsonl", GOOD, bad)
    with pytest.raises(ValueError) as error:
        load_facts(path)
    assert f"{path}:2: " in str(error.value) and reason in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "does not exist"), ("", "holds no facts"), ("\n\n", "holds no")]
)
def test_a_missing_or_empty_file_is_refused(tmp_path, content, reason):
    path = tmp_path / "facts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        load_facts(path)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "facts.jsonl").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_facts(tmp_path / "facts.jsonl")


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.lists(st.text(max_size=4), max_size=3)
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*GOOD, "aliases", "paraphrases", "heldout", "distractors", "kind", "x"]), values)
)
def test_any_row_is_either_parsed_whole_or_refused_with_a_reason(changes):
    row = GOOD | changes
    try:
        fact = fact_from_json(row, "line1")
    except ValueError as error:
        assert str(error)
    else:
        assert fact_from_json(fact_to_json(fact), "other") == fact
        assert all(getattr(fact, key) == row[key] for key in ("subject", "relation", "object", "prompt"))
