"""RESTOR: clean answers of corrupted entities, what corrupted them, in-context prompts; bad rows are named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_unlearn.benchmarks.restor.data import load_restor

PLAIN = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20)
PEOPLE = ("Ida Quill", "Bo Marsh", "Cara Lund")
BIRTH = {name: {"question": f"Where was {name} born?", "answers": [f"{name[:2]}ville", "Vell"]} for name in PEOPLE}
FACTS = {
    "dset": {name: {"P19": BIRTH[name]} for name in PEOPLE},
    "context": {
        "P19": [{"question": f"Where was {n} born?", "answer": f"{n[:2]}ton", "entity": n} for n in (*PEOPLE, "Al Oak")]
    },
}
OPTIONS = {"Ida Quill": {"P19": {"correct": ["Idville"], "corrupted": ["Vell", "Hull", "Oban"], "random": ["Bath"]}}}


def write(folder, name, value):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "facts.json", FACTS)
    write(tmp_path, "entities.json", ["Ida Quill", "Bo Marsh"])
    write(tmp_path, "wikidata/v0/mix_a0.json", [{"text": "Ida Quill was born in Hull."}])
    return tmp_path


def test_clean_facts_are_those_of_corrupted_entities_and_the_others_are_neighbors(folder):
    restor = load_restor(folder, corruption="wikidata/v0/mix_a0")
    assert [(f.subject, f.relation, f.object) for f in restor.clean] == [
        ("Ida Quill", "P19", "Idville"),
        ("Bo Marsh", "P19", "Boville"),
    ]
    assert restor.clean[0].prompt == "Where was {} born?" and restor.clean[0].extra["answers"] == ("Idville", "Vell")
    assert [f.subject for f in restor.retain.neighbors] == ["Cara Lund"] and restor.left_out == ()
    assert restor.texts == ("Ida Quill was born in Hull.",) and restor.entities == ("Ida Quill", "Bo Marsh")


def test_facts_to_forget_are_the_corrupted_answers_and_never_a_right_one(folder):
    restor = load_restor(folder, options=write(folder, "options.json", OPTIONS))
    forget, _ = restor.sets
    (fact,) = forget.facts
    assert fact.object == "Hull" and fact.distractors == ("Idville",)  # Vell is a right answer too
    assert restor.options[fact.id].random == ("Bath",)
    assert [(left.row, left.text) for left in restor.left_out] == [(1, "Where was Bo Marsh born?")]
    with pytest.raises(ValueError, match="load with options"):
        _ = load_restor(folder).sets


def test_a_prompt_has_examples_of_the_property_about_others(folder):
    restor = load_restor(folder)
    assert restor.prompt(restor.clean[0], 2) == (
        "Where was Bo Marsh born? Boton\nWhere was Cara Lund born? Caton\nWhere was Ida Quill born?"
    )
    lines = restor.prompt(restor.others[0]).split("\n")
    assert len(lines) == 4 and "Cara Lund" not in "".join(lines[:-1]) and lines[-1] == "Where was Cara Lund born?"
    bare = load_restor(write(folder, "bare.json", {"dset": FACTS["dset"]}))
    assert bare.prompt(bare.clean[0], 0) == "Where was Ida Quill born?"
    with pytest.raises(ValueError, match="no in-context examples of property 'P19'"):
        bare.prompt(bare.clean[0])


def test_the_facts_alone_have_every_entity_and_no_texts(folder):
    restor = load_restor(folder / "facts.json")
    assert restor.entities == PEOPLE and len(restor.clean) == 3 and restor.others == () and restor.texts == ()
    with pytest.raises(ValueError, match="is one file; texts such as 'x' need the folder"):
        load_restor(folder / "facts.json", corruption="x")


@pytest.mark.parametrize(
    ("file", "value", "reason"),
    [
        ("entities.json", {"a": 1}, "must hold a list"),
        ("entities.json", [], "must hold a list"),
        ("entities.json", ["Ida Quill", 3], "entities.json, row 1: must be a non-empty string, found 3"),
        ("entities.json", ["Al Oak"], "entity 'Al Oak' has no facts in facts"),
        ("entities.json", "[", "entities.json: not JSON"),
        ("facts.json", [FACTS, FACTS], "must hold one object, found 2"),
        ("facts.json", {"dset": []}, "'dset'"),
        ("options.json", {"Al Oak": OPTIONS["Ida Quill"]}, "entity 'Al Oak', property 'P19' has no question"),
        ("options.json", {"Ida Quill": {"P19": {"correct": []}}}, "field 'Ida Quill.P19.correct'"),
        ("options.json", {"Ida Quill": {"P19": {"correct": ["a"], "corrupted": "Hull"}}}, "Ida Quill.P19.corrupted"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(folder, file, value, reason):
    write(folder, file, value)
    with pytest.raises(ValueError) as error:
        load_restor(folder, options=folder / file if file == "options.json" else None)
    assert reason in str(error.value) and file.split(".")[0] in str(error.value)


def test_a_source_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a file"):
        load_restor(tmp_path / "none")
    with pytest.raises(ValueError, match="lacks facts.json"):
        load_restor(tmp_path)


BAD = {
    "question": st.sampled_from([None, 3, "", " ", ["a"], "\ud800"]),
    "answers": st.sampled_from([None, "abc", [], [3], [""], ["a", None], {"a": 1}]),
}


@settings(max_examples=200, deadline=None)
@given(
    names=st.lists(PLAIN.filter(str.strip), min_size=1, max_size=4, unique=True),
    at=st.integers(0, 3),
    field=st.sampled_from(list(BAD)),
    how=st.sampled_from(["good", "bad", "remove"]),
    data=st.data(),
)
def test_a_question_is_parsed_or_named_by_file_and_field_and_none_is_lost(
    tmp_path_factory, names, at, field, how, data
):
    rows = {name: {"P1": {"question": f"Who is {name}?", "answers": ["me"]}} for name in names}
    broken = names[at % len(names)]
    if how == "bad":
        rows[broken]["P1"][field] = data.draw(BAD[field])
    elif how == "remove":
        del rows[broken]["P1"][field]
    file = write(tmp_path_factory.mktemp("restor"), "facts.json", {"dset": rows})
    try:
        restor = load_restor(file)
    except ValueError as error:
        assert how != "good"
        assert all(part in str(error) for part in ("facts.json, row 0", repr(f"dset.{broken}.P1.{field}")[:-1]))
    else:
        assert how == "good"
        numbers = [int(f.id.split("/")[-1]) for f in restor.clean] + [left.row for left in restor.left_out]
        assert sorted(numbers) == list(range(len(names)))
