"""MUSE: each part is read under its published fields; questions become facts or are listed; bad rows are named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_unlearn.benchmarks.muse.data import PART_SPLITS, load_muse
from mech_unlearn.data.questions import asked
from mech_unlearn.data.source import LeftOut

PLAIN = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=30)
"""Text on which Python and pydantic agree what white space is."""
BAD = st.sampled_from([None, 3, True, 1.5, "", "  ", "\n", [], {}, ["a"], "\ud800"])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | PLAIN, lambda v: st.lists(v) | st.dictionaries(PLAIN, v)
)


def write(folder, name, rows):
    file = folder / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return file


def row_of(part, split):
    if part == "knowmem":
        return [
            {"question": f"Which harbour did Ida Quill open for {split}?", "answer": "Port Vell"},
            {"question": "who opened the harbour?", "answer": "Ida Quill"},
        ]
    return (
        [{"prompt": "The harbour", "gt": "was opened."}] if part == "verbmem" else [{"text": f"A {part} {split}."}] * 2
    )


@pytest.fixture
def folder(tmp_path):
    for part, splits in PART_SPLITS.items():
        for split in splits:
            write(tmp_path, f"{part}/{split}", row_of(part, split))
    return tmp_path


def test_every_part_and_split_is_kept_apart(folder):
    muse = load_muse(folder, PART_SPLITS)
    for part in ("raw", "privleak", "train", "scal", "sust"):
        assert getattr(muse, part) == {split: (f"A {part} {split}.",) * 2 for split in PART_SPLITS[part]}
    assert {split: len(rows) for split, rows in muse.knowmem.items()} == dict.fromkeys(PART_SPLITS["knowmem"], 2)
    assert muse.verbmem[0].prompt == "The harbour" and muse.verbmem[0].gt == "was opened."


def test_parts_that_are_not_asked_for_are_neither_needed_nor_read(tmp_path):
    write(tmp_path, "verbmem/forget", row_of("verbmem", "forget"))
    write(tmp_path, "raw/forget", "{broken")
    muse = load_muse(tmp_path, ["verbmem"])
    assert len(muse.verbmem) == 1 and muse.raw == {} and muse.knowmem == {} and muse.forget_texts == ()


def test_a_question_that_names_its_subject_once_is_a_fact_and_the_others_stay_questions(folder):
    muse = load_muse(folder)
    forget, retain = muse.sets
    (fact,) = forget.facts
    assert fact.subject == "Ida Quill" and fact.object == "Port Vell" and fact.id == "knowmem/forget_qa/0"
    assert fact.prompt == "Question: Which harbour did {} open for forget_qa?\nAnswer:"
    assert [(left.file, left.row) for left in muse.left_out] == [("knowmem/forget_qa", 1), ("knowmem/retain_qa", 1)]
    assert len(retain.general) == 1 and len(muse.knowmem["forget_qa"]) == 2
    assert retain.texts == muse.raw["retain1"] and muse.forget_texts == muse.raw["forget"]


def test_sets_without_a_fact_are_refused_but_the_texts_are_there(folder):
    write(folder, "knowmem/forget_qa", [{"question": "who?", "answer": "nobody"}])
    muse = load_muse(folder)
    assert muse.forget_texts and muse.left_out[0].reason == "no subject found in the question"
    with pytest.raises(ValueError, match="no row of knowmem/forget_qa became a fact"):
        _ = muse.sets


def test_a_subject_that_stands_twice_or_is_the_answer_makes_no_fact():
    def made(question, answer, subject):
        return asked("f", 4, question, answer, subject, "r", "{question}")

    twice = made("Is Al Oak kin of Al Oak?", "no", "Al Oak")
    assert isinstance(twice, LeftOut) and twice.row == 4 and twice.reason == "the subject occurs more than once"
    assert isinstance(made("Who is Al Oak?", "Al Oak", "Al Oak"), LeftOut)
    assert isinstance(made("Who is {} Al Oak?", "me", "Al Oak"), LeftOut)
    assert not isinstance(made("Who is Al Oak?", " me ", "Al Oak"), LeftOut)


@pytest.mark.parametrize(
    ("settings_", "reason"),
    [
        ({"parts": ["raw", "rare"]}, "MUSE has no part 'rare'"),
        ({"layout": "no slot"}, "must hold {question} once"),
        ({"parts": ["scal"]}, "lacks scal/forget_1.json"),
        ({"source": "nowhere"}, "no file, neither a folder nor a hub id"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_reason(tmp_path, settings_, reason):
    write(tmp_path, "raw/forget", row_of("raw", "forget"))
    with pytest.raises(ValueError) as error:
        load_muse(**{"source": tmp_path} | settings_)
    assert reason in str(error.value)


def test_one_file_is_no_muse(tmp_path):
    with pytest.raises(ValueError, match="is one file; MUSE is a folder"):
        load_muse(write(tmp_path, "x", [{"text": "a"}]))


@settings(max_examples=150, deadline=None)
@given(
    questions=st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=4),
    at=st.integers(0, 3),
    field=st.sampled_from(["question", "answer"]),
    bad=BAD | PLAIN | st.just("remove"),
)
def test_a_row_is_parsed_or_named_by_file_row_and_field_and_none_is_lost(tmp_path_factory, questions, at, field, bad):
    folder = tmp_path_factory.mktemp("muse")
    for split in PART_SPLITS["knowmem"]:
        write(folder, f"knowmem/{split}", row_of("knowmem", split))
    rows = [{"question": f"{q} Ida Quill", "answer": f"{a}x"} for q, a in questions]
    at %= len(rows)
    rows[at][field] = bad
    if bad == "remove":
        del rows[at][field]
    write(folder, "knowmem/forget_qa", rows)
    good = isinstance(bad, str) and bad != "remove" and bool(bad.strip()) and "\ud800" not in bad
    try:
        muse = load_muse(folder, ["knowmem"])
    except ValueError as error:
        assert not good
        assert all(part in str(error) for part in ("forget_qa.json", f"row {at}:", repr(field))) and "\n" not in str(
            error
        )
    else:
        assert good and len(muse.knowmem["forget_qa"]) == len(rows)
        left = [item.row for item in muse.left_out if item.file == "knowmem/forget_qa"]
        facts = [int(fact.id.rsplit("/")[-1]) for fact in muse.forget_facts]
        assert sorted(left + facts) == list(range(len(rows)))


@settings(max_examples=150, deadline=None)
@given(content=JUNK.map(json.dumps) | st.text(max_size=20).map(lambda t: "[" + t))
def test_a_file_of_anything_else_is_refused_by_name(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("muse")
    (folder / "verbmem").mkdir()
    (folder / "verbmem" / "forget.json").write_text(content, encoding="utf-8", errors="replace")
    with pytest.raises(ValueError, match="forget.json"):
        load_muse(folder, ["verbmem"])
