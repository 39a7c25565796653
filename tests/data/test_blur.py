"""BLUR: combined prompts in their halves, parts by task; what has not two halves is listed; bad rows are named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_unlearn.data.blur import TASK_PARTS, halves, load_blur

PLAIN = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=30)
BAD = st.sampled_from([None, 3, True, "", "  ", [], {}, ["a"], "\ud800"])
PAIR = "1. Which harbour did Ida Quill open? 2. Where was Cara Lund mayor?"
ANSWERS = {"Which harbour did Ida Quill open?": "Port Vell", "Where was Cara Lund mayor?": "Oban", "who?": "me"}


def write(folder, name, texts):
    file = folder / f"{name}.json"
    file.write_text(json.dumps([{"text": text} for text in texts]))
    return file


@pytest.fixture
def folder(tmp_path):
    for task, parts in TASK_PARTS.items():
        for part in parts:
            if part == "D_lo":
                write(tmp_path, "D_lo_for_all", ["far"])
            else:
                write(
                    tmp_path, f"{task}_{part}", [PAIR, "no halves"] if part.startswith("paired") else [f"{task} {part}"]
                )
    return tmp_path


@pytest.mark.parametrize("task", list(TASK_PARTS))
def test_a_task_has_its_parts_apart(folder, task):
    blur = load_blur(folder, task)
    assert blur.forget == ((f"{task} forget",) if "forget" in TASK_PARTS[task] else ())
    assert blur.retain_questions == ((f"{task} retain",) if "retain" in TASK_PARTS[task] else ())
    wanted = {"D_hi": (f"{task} D_hi",), "D_mid": (f"{task} D_mid",), "D_lo": ("far",)}
    assert blur.relearn == (wanted if "D_hi" in TASK_PARTS[task] else dict.fromkeys(wanted, ()))
    assert len(blur.combined) == 1 and [(left.row, left.text) for left in blur.left_out] == [(1, "no halves")]


def test_halves_are_the_two_questions_and_swapping_twice_gives_them_back():
    one, two = halves(PAIR)
    assert (one, two) == ("Which harbour did Ida Quill open?", "Where was Cara Lund mayor?")
    assert halves("1) a\n2) b 3.2 c") == ("a", "b 3.2 c")
    assert halves(f"1. {two} 2. {one}") == (two, one)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Which?", "does not begin with 1."),
        ("1. Which?", "no second question"),
        ("1. Is it 2? 2.5?", "no second question"),
        ("1. a 2. b 2. c", "2. stands twice"),
        ("1.  2. b", "empty|no second question"),
        ("1. a 2. ", "empty|no second question"),
    ],
)
def test_a_prompt_without_two_questions_says_why(text, reason):
    with pytest.raises(ValueError, match=reason):
        halves(text)


def test_answers_make_facts_of_the_halves_each_once(tmp_path):
    file = write(tmp_path, "mine", [PAIR, PAIR, "1. who? 2. Where was Cara Lund mayor?", "1. a? 2. b?"])
    blur = load_blur(file, answers=ANSWERS)
    forget, retain = blur.sets
    assert [(f.subject, f.object) for f in forget.facts] == [("Ida Quill", "Port Vell")]
    assert [(f.subject, f.object) for f in retain.neighbors] == [("Cara Lund", "Oban")]
    assert blur.combined[0].forget_answer == "Port Vell" and blur.combined[3].retain_answer is None
    assert blur.combined[0].swapped == "1. Where was Cara Lund mayor? 2. Which harbour did Ida Quill open?"
    assert [(left.file, left.row) for left in blur.left_out] == [("mine.json/forget", 2)]
    with pytest.raises(ValueError, match="facts need answers"):
        _ = load_blur(file).sets


@pytest.mark.parametrize(
    ("settings_", "reason"),
    [
        ({"task": "muse"}, "BLUR has no task 'muse'"),
        ({"task": "tofu", "parts": ("forget",)}, "task tofu has no part 'forget'"),
        ({"source": "nowhere"}, "no file, neither a folder nor a hub id"),
        ({"layout": "x"}, "must hold {question} once"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_reason(folder, settings_, reason):
    with pytest.raises(ValueError) as error:
        load_blur(**{"source": folder} | settings_)
    assert reason in str(error.value)


def test_one_file_holds_combined_prompts_only(folder):
    with pytest.raises(ValueError, match="is one file: it is read as paired_forget_retain"):
        load_blur(folder / "rwku_forget.json", "rwku", ("forget",))


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(PLAIN.filter(str.strip) | st.tuples(PLAIN, PLAIN).map("1. {0[0]} 2. {0[1]}".format), min_size=1),
    at=st.integers(0, 9),
    bad=BAD | PLAIN,
    remove=st.booleans(),
)
def test_a_row_is_parsed_or_named_by_file_row_and_field_and_none_is_lost(tmp_path_factory, texts, at, bad, remove):
    at %= len(texts)
    texts[at] = bad
    file = write(tmp_path_factory.mktemp("blur"), "pairs", texts)
    if remove:
        file.write_text(json.dumps([{} if i == at else {"text": text} for i, text in enumerate(texts)]))
    good = not remove and isinstance(bad, str) and bool(bad.strip()) and "\ud800" not in bad
    try:
        blur = load_blur(file)
    except ValueError as error:
        assert not good
        assert all(part in str(error) for part in ("pairs.json", f"row {at}:", "'text'")) and "\n" not in str(error)
    else:
        assert good and len(blur.combined) + len(blur.left_out) == len(texts)
        assert {pair.text for pair in blur.combined} | {left.text for left in blur.left_out} == set(texts)
