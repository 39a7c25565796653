"""RWKU: levels, neighbors and sets kept apart by subject; probes become facts or are listed; bad rows are named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_unlearn.benchmarks.rwku.data import FILES, LEVEL_NUMBERS, UTILITY, load_rwku

PLAIN = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=30)
BAD = st.sampled_from([None, 3, True, "", "  ", [], {}, ["a"], "\ud800"])
PEOPLE = ("Ida Quill", "Bo Marsh")
KINDS = {"1": "cloze", "2": "simple question", "3": "affirmative suffix"}


def probe(level, subject, query=None, **more):
    queries = {
        "1": f"{subject} opened the harbour of ___",
        "2": f"Which harbour did {subject} open?",
        "3": "Sure, it is",
    }
    answer = {"query": query or queries[level], "answer": "Port Vell", "level": level, "type": KINDS[level]}
    return answer | {"subject": subject} | more


def write(folder, name, rows):
    file = folder / f"{name}.json"
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return file


def utility_rows(subject):
    choice = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}
    targets = {"choices": ["yes", "no"], "labels": [1, 0]}
    return {
        "general": choice | {"task": "anatomy", "examples": [choice], "subject": subject},
        "reason": {"question": "q", "answer": "(A)", "cot": "", "task": "dates", "subject": subject},
        "truthfulness": {"question": "q", "mc1_targets": targets, "mc2_targets": targets, "subject": subject},
        "factuality": {"question": "q", "answers": ["x", "y"], "subject": subject},
        "fluency": {"instruction": "Write.", "subject": subject},
    }


def fill(folder, files=None):
    name = (files or {}).get
    write(folder, name("forget_target", "forget_target"), [{"target": p, "intro": f"On {p}."} for p in PEOPLE])
    for level in LEVEL_NUMBERS:
        write(folder, f"forget_level{level}", [probe(level, p) for p in PEOPLE for _ in range(int(level))])
    for level in LEVEL_NUMBERS[:2]:
        about = [probe(level, p, f"Cara Lund met the friend in {p[:3]}.") for p in PEOPLE]
        write(folder, f"neighbor_level{level}", [*about, probe(level, PEOPLE[0], "who was it?")])
    for kind in ("mia_forget", "mia_retain"):
        write(folder, name(kind, kind), [{"text": f"{kind} of {p}", "subject": p} for p in PEOPLE])
    for kind in UTILITY:
        config = f"utility_{kind}"
        write(folder, name(config, config), [utility_rows(p)[kind] for p in PEOPLE])
    return folder


@pytest.mark.parametrize("files", [None, FILES])
def test_levels_sets_and_targets_are_kept_apart_under_either_file_names(tmp_path, files):
    rwku = load_rwku(fill(tmp_path, files), mia=True, utility=UTILITY)
    assert {level: len(rows) for level, rows in rwku.forget.items()} == {"1": 2, "2": 4, "3": 6}
    assert {level: len(rows) for level, rows in rwku.neighbor.items()} == {"1": 3, "2": 3}
    assert rwku.subjects == PEOPLE and [t.target for t in rwku.targets] == list(PEOPLE)
    assert rwku.mia_forget[1].text == "mia_forget of Bo Marsh" and len(rwku.mia_retain) == 2
    assert {k: len(rows) for k, rows in rwku.utility.items()} == dict.fromkeys(UTILITY, 2)
    general = rwku.utility["general"][0]
    assert general.letter == "B" and general.examples[0].choices == ("a", "b", "c", "d") and general.task == "anatomy"
    assert rwku.utility["truthfulness"][0].mc1_targets.labels == (1, 0)


def test_probes_of_levels_one_and_two_become_facts_and_attacks_never_do(tmp_path):
    rwku = load_rwku(fill(tmp_path))
    forget, retain = rwku.sets
    assert len(forget.facts) == 6 and {f.extra["level"] for f in forget.facts} == {"1", "2"}
    assert forget.facts[0].prompt == "Question: {} opened the harbour of ___\nAnswer:"
    assert forget.facts[0].relation == "cloze" and forget.facts[0].kind == "person"
    assert {f.subject for f in retain.neighbors} == {"Cara Lund"} and len(retain.neighbors) == 4
    assert {f.extra["target"] for f in retain.neighbors} == set(PEOPLE)
    assert [(left.file, left.row) for left in rwku.left_out] == [("neighbor_level1", 2), ("neighbor_level2", 2)]
    assert {kind: len(rows) for kind, rows in rwku.attacks().items()} == {"affirmative suffix": 6}


def test_one_subject_can_be_asked_for_alone(tmp_path):
    every, one = load_rwku(fill(tmp_path)), load_rwku(tmp_path, ["Bo Marsh"], mia=True, utility=["fluency"])
    assert one.subjects == ("Bo Marsh",) and len(one.targets) == 1 and len(one.mia_forget) == 1
    assert one.forget_facts == tuple(f for f in every.forget_facts if f.subject == "Bo Marsh")
    assert one.left_out == () and len(one.utility["fluency"]) == 1
    with pytest.raises(ValueError, match="no probes about 'Al Oak'; its first targets are"):
        load_rwku(tmp_path, ["Al Oak"])


def test_a_neighbor_field_names_whom_the_probe_is_about(tmp_path):
    write(
        fill(tmp_path), "neighbor_level1", [probe("1", PEOPLE[0], "Did de Vries meet Ida Quill?", neighbor="de Vries")]
    )
    assert load_rwku(tmp_path).retain.neighbors[0].subject == "de Vries"


def test_one_file_of_probes_is_told_apart_by_level(tmp_path):
    rows = [probe("3", "Ida Quill"), probe("1", "Ida Quill"), probe("2", "Bo Marsh")]
    rwku = load_rwku(write(tmp_path, "mine", rows))
    assert {level: len(found) for level, found in rwku.forget.items()} == {"1": 1, "2": 1, "3": 1}
    assert [f.id for f in rwku.forget_facts] == ["mine.json/1", "mine.json/2"] and rwku.retain.facts == ()
    with pytest.raises(ValueError, match="row 1: field 'level' must be 1 or 2 or 3, found '4'"):
        load_rwku(write(tmp_path, "bad", [rows[0], rows[0] | {"level": "4"}]))
    with pytest.raises(ValueError, match="one file of probes"):
        load_rwku(tmp_path / "mine.json", mia=True)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("general", {"answer": 4}, "answer"),
        ("general", {"examples": [{"question": "q"}]}, "examples.0.choices"),
        ("truthfulness", {"mc1_targets": {"choices": ["a"], "labels": [1, 0]}}, "targets.labels' must hold 0 or 1"),
        ("truthfulness", {"mc2_targets": {"choices": ["a"], "labels": [2]}}, "targets.labels' must hold 0 or 1"),
        ("factuality", {"answers": []}, "answers"),
        ("reason", {"cot": None}, "cot"),
        ("fluency", {"instruction": " "}, "instruction"),
    ],
)
def test_a_bad_utility_row_is_named_by_file_row_and_field(tmp_path, kind, change, reason):
    good = utility_rows(PEOPLE[0])[kind]
    write(fill(tmp_path), f"utility_{kind}", [good, good | change])
    with pytest.raises(ValueError, match=f"utility_{kind}.json, row 1") as error:
        load_rwku(tmp_path, utility=[kind])
    assert reason in str(error.value)
    with pytest.raises(ValueError, match="no utility set 'taste'"):
        load_rwku(tmp_path, utility=["taste"])


@settings(max_examples=150, deadline=None)
@given(
    queries=st.lists(PLAIN, min_size=1, max_size=4),
    at=st.integers(0, 3),
    field=st.sampled_from(["query", "answer", "type", "subject"]),
    bad=BAD | PLAIN | st.just("remove"),
)
def test_a_probe_is_parsed_or_named_by_file_row_and_field_and_none_is_lost(tmp_path_factory, queries, at, field, bad):
    rows = [probe("1", "Ida Quill", f"{query} Ida Quill") for query in queries]
    at %= len(rows)
    rows[at][field] = bad
    if bad == "remove":
        del rows[at][field]
    file = write(tmp_path_factory.mktemp("rwku"), "probes", rows)
    good = isinstance(bad, str) and bad != "remove" and "\ud800" not in bad and (field == "type" or bool(bad.strip()))
    try:
        rwku = load_rwku(file)
    except ValueError as error:
        assert not good
        assert all(part in str(error) for part in ("probes.json", f"row {at}:", repr(field))) and "\n" not in str(error)
    else:
        assert good and len(rwku.forget["1"]) == len(rows)
        numbers = [left.row for left in rwku.left_out] + [int(f.id.split("/")[-1]) for f in rwku.forget_facts]
        assert sorted(numbers) == list(range(len(rows)))
