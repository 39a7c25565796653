"""Facts on disk: what is written is read back, and a bad line is named with file, number and reason."""

import gzip
import json
import warnings
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_unlearn.core import fact_to_json
from mech_unlearn.data import DATASETS
from mech_unlearn.data.counterfact import CounterFactRow
from mech_unlearn.data.jsonl import FOREIGN, fact_from_json, load_facts, save_facts
from mech_unlearn.data.popqa import PopqaRow
from mech_unlearn.data.relations import RelationFile
from mech_unlearn.data.trex import LamaRow
from mech_unlearn.data.zsre import MemitRow
from tests.damage import assert_result_or_one_line, damaged

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


def test_all_bad_facts_are_listed_at_once_and_many_are_counted(tmp_path):
    bad = [GOOD | {"id": "b", "prompt": "no slot"}, "{not json", GOOD | {"id": "c", "object": 7}]
    path = write(tmp_path / "f.jsonl", GOOD, *bad)
    with pytest.raises(ValueError) as error:
        load_facts(path)
    assert [f"{path}:{line}: " in str(error.value) for line in (1, 2, 3, 4)] == [False, True, True, True]
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="and 30 more"):
        load_facts(write(tmp_path / "many.jsonl", *["nothing"] * 50))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode()),
        ("array.json", json.dumps([GOOD]).encode()),
        ("array over lines.json", json.dumps([GOOD], indent=1).encode()),
        ("object over lines.json", json.dumps(GOOD, indent=1).encode()),
        ("windows.jsonl", json.dumps(GOOD).encode() + b"\r\n\r\n"),
        ("packed.jsonl.gz", gzip.compress(json.dumps(GOOD).encode(), mtime=0)),
        ("table.csv", b"id,subject,relation,object,prompt,kind\na,Anna Lee,born,Paris,{} was born in,\n"),
        ("table.tsv", b"id\tsubject\trelation\tobject\tprompt\na\tAnna Lee\tborn\tParis\t{} was born in\n"),
    ],
)
def test_the_forms_that_people_have_give_the_same_fact(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert load_facts(tmp_path / name) == (fact_from_json(GOOD, "unused"),)


def test_a_bad_row_of_an_array_or_a_table_is_named_and_a_broken_array_is_one_error(tmp_path):
    array = write(tmp_path / "f.json", json.dumps([GOOD, GOOD | {"id": "b", "object": ""}]))
    with pytest.raises(ValueError, match=r"f\.json, row 1: field 'object'"):
        load_facts(array)
    with pytest.raises(ValueError, match=r"f\.csv, row 0: missing field 'prompt'"):
        load_facts(write(tmp_path / "f.csv", "subject,relation,object", "Anna Lee,born,Paris"))
    with pytest.raises(ValueError, match=r"^\S+cut\.json: not JSON: [^;]*$"):
        load_facts(write(tmp_path / "cut.json", json.dumps([GOOD], indent=1)[:-1]))


@pytest.mark.parametrize("character", "\u2028\u2029\x85\x0c\x0b\x1c\r\t")
def test_a_character_that_ends_lines_elsewhere_survives_the_way_to_disk_and_back(tmp_path, character):
    fact = fact_from_json(GOOD | {"note": f"a{character}b", "kind": f"a{character}b"}, "unused")
    save_facts([fact], tmp_path / "f.jsonl")
    assert load_facts(tmp_path / "f.jsonl") == (fact,)


@pytest.mark.parametrize("space", [" ", "\n", "\t", "\u00a0", "\u2028"])
@pytest.mark.parametrize("field", ["id", "subject", "object", "kind", "aliases", "distractors"])
def test_white_space_around_names_is_taken_off_with_a_note(tmp_path, field, space):
    plain = {"aliases": ["A. Lee"], "distractors": ["Rome"], "kind": "person"} | GOOD
    for touched in (f"{space}{{}}", f"{{}}{space}"):
        value = plain[field]
        put = [touched.format(item) for item in value] if isinstance(value, list) else touched.format(value)
        with pytest.warns(UserWarning, match=f"f.jsonl: white space around {field} was taken off"):
            facts = load_facts(write(tmp_path / "f.jsonl", plain | {field: put}))
        assert facts == (fact_from_json(plain, "unused"),)


def test_spaces_around_a_phrasing_are_taken_off_and_line_breaks_belong_to_it(tmp_path):
    with pytest.warns(UserWarning, match="heldout, prompt"):
        (fact,) = load_facts(write(tmp_path / "f.jsonl", GOOD | {"prompt": " {} is in ", "heldout": ["Home of {} \t"]}))
    assert (fact.prompt, fact.heldout) == ("{} is in", ("Home of {}",))
    (fact,) = load_facts(write(tmp_path / "f.jsonl", GOOD | {"prompt": "{} was born where?\n"}))
    assert fact.prompt == "{} was born where?\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (json.dumps(GOOD)[:-1] + ', "object": "Rome"}', "key 'object' stands twice"),
        (json.dumps(GOOD | {"object": "A \ud800"}), "'object' must be text without lone surrogates"),
        (json.dumps(GOOD | {"prompt": "{} \ud800"}), "prompt must be text without lone surrogates"),
        (json.dumps(GOOD | {"note": ["\udfff"]}), "extra key must be text without lone surrogates"),
        (json.dumps(GOOD | {"\udfff": 1}), "extra key must be text without lone surrogates"),
        (json.dumps(GOOD)[:-1] + ', "x": ' + "[" * 70 + "]" * 70 + "}", "nests deeper"),
        (json.dumps(GOOD)[:-1] + ', "x": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deep"),
        (json.dumps(GOOD)[:-1] + ', "x": ' + '{"a":' * 900 + "1" + "}" * 900 + "}", "nest"),
    ],
)
def test_what_json_allows_and_no_fact_can_mean_is_refused(tmp_path, line, reason):
    path = write(tmp_path / "f.jsonl", line)
    with pytest.raises(ValueError) as error:
        load_facts(path)
    assert str(error.value).startswith(f"{path}:1: ") and reason in str(error.value) and "\n" not in str(error.value)


ROWS = {
    "counterfact": CounterFactRow,
    "zsre": MemitRow,
    "popqa": PopqaRow,
    "relations": RelationFile,
    "trex": LamaRow,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_rows_of_another_data_set_are_named_with_the_command_that_converts_them(tmp_path, name):
    assert name in DATASETS and FOREIGN[name] <= {f.alias or key for key, f in ROWS[name].model_fields.items()}
    row = dict.fromkeys(FOREIGN[name], "x")
    for text in (json.dumps(row), json.dumps([row]), json.dumps([row], indent=1), json.dumps(row, indent=1)):
        data = tmp_path if name in ("relations", "trex") else tmp_path / "theirs.json"
        with pytest.raises(ValueError, match=f"not facts: `mech-unlearn facts convert {name} --data {data} --out"):
            load_facts(write(tmp_path / "theirs.json", text))


def test_a_file_of_facts_damaged_anywhere_gives_facts_or_one_line_that_names_it(tmp_path):
    random, path = Random(0), tmp_path / "facts.jsonl"
    whole = write(path, GOOD | {"distractors": ["Rome"], "x": [{"y": 1.5}]}, GOOD | {"id": "b"}).read_bytes()
    for _ in range(500):
        path.write_bytes(damaged(whole, random))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_result_or_one_line(lambda: load_facts(path), path)


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
