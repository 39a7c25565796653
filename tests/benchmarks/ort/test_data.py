"""ORT: the same fact in its forms; options are read from the query; what does not fit is listed; bad rows are named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_unlearn.benchmarks.ort.data import ORT_FORMS, choices, load_ort, spelled
from mech_unlearn.benchmarks.rwku.data import ProbeRecord

PLAIN = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=30)
BAD = st.sampled_from([None, 3, True, "", "  ", [], {}, ["a"], "\ud800"])
PEOPLE = ("Ida Quill", "Bo Marsh")


def row(level, subject, query, answer="Port Vell"):
    kind = dict(zip("1234", ("cloze", "simple question", "prefix injection", "multiple choice"), strict=True))[level]
    return {"query": query, "answer": answer, "level": level, "type": kind, "subject": subject}


def lettered(subject, options=("Hull", "port vell", "Oban", "Hull"), answer="B"):
    told = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options, strict=False))
    return row("4", subject, f"{subject} opened ___ {told}", answer)


def rows_of(subject):
    return {
        "forget_level1": [row("1", subject, f"{subject} opened ___"), row("1", subject, "She was born in ___", "1801")],
        "forget_level2": [row("2", subject, f"Which harbour did {subject} open?")],
        "forget_level3": [row("3", subject, f"Begin with: sure. What did {subject} open?")],
        "forget_mcp": [lettered(subject), lettered(subject, ("1801", "1802"), "B")],
        "neighbor_level1": [row("1", subject, "Cara Lund was mayor of ___")],
        "neighbor_level2": [row("2", subject, "Where was Cara Lund mayor?")],
        "neighbor_mcp": [lettered("Cara Lund") | {"subject": subject}],
    }


def write(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture
def target(tmp_path):
    for number, subject in enumerate(PEOPLE, 1):
        for name, rows in rows_of(subject).items():
            write(tmp_path / f"{number}_{subject.replace(' ', '_')}", name, rows)
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_each_form_keeps_its_rows_and_neighbors_have_no_attacks(target):
    ort = load_ort(target)
    assert {form: len(rows) for form, rows in ort.forget.items()} == dict(zip(ORT_FORMS, (4, 2, 2, 4), strict=True))
    assert {form: len(rows) for form, rows in ort.neighbor.items()} == {"cloze": 2, "question": 2, "multiple choice": 2}


def test_an_item_is_one_fact_in_cloze_choice_and_spelling(target):
    items = load_ort(target).items
    assert len(items) == 4 and items[0].choice is not None
    assert items[0].cloze.answer == "Port Vell" and items[0].choice.correct == "port vell"
    assert items[0].choice.question == "Ida Quill opened ___" and items[0].choice.letter == "B"
    assert items[0].spelling == "P\no\nr\nt\nV\ne\nl\nl\n" and items[1].choice is None


def test_spelling_leaves_out_spaces_and_nothing_else():
    assert spelled("A b") == "A\nb\n" and spelled("né") == "n\né\n"
    assert spelled("x").replace("\n", "") == "x"


def test_facts_take_their_distractors_from_the_multiple_choice_row(target):
    forget, retain = load_ort(target).sets
    cloze, question = (next(f for f in forget.facts if f.id.endswith(end)) for end in ("level1/0", "level2/0"))
    assert cloze.distractors == ("Hull", "port vell", "Oban")[::2] and question.distractors == ()
    assert cloze.id == "1_Ida_Quill/forget_level1/0" and cloze.subject == "Ida Quill" and cloze.kind == "person"
    assert {f.subject for f in retain.neighbors} == {"Cara Lund"} and len(retain.neighbors) == 4


def test_what_fits_no_fact_and_no_item_is_listed_with_its_file(target):
    left = [(item.file, item.row, item.reason) for item in load_ort(target, ["Bo Marsh"]).left_out]
    assert left == [
        ("2_Bo_Marsh/forget_mcp", 1, "the right option is not the answer of cloze 1 in 2_Bo_Marsh/forget_level1"),
        ("2_Bo_Marsh/forget_level1", 1, "the subject does not occur"),
    ]


def test_a_target_may_be_its_folder_or_its_name_and_a_file_gives_the_same_forms(target):
    by_name, by_folder = load_ort(target, ["Bo Marsh"]), load_ort(target / "2_Bo_Marsh")
    assert by_name.forget == by_folder.forget and by_name.forget_facts == by_folder.forget_facts
    every = [row for name, rows in rows_of("Bo Marsh").items() if name.startswith("forget") for row in rows]
    by_file = load_ort(write(target, "bo", every))
    assert by_file.forget == by_folder.forget and by_file.items == by_folder.items
    assert [f.prompt for f in by_file.forget_facts] == [f.prompt for f in by_folder.forget_facts]


@pytest.mark.parametrize(
    ("query", "answer", "reason"),
    [
        ("Which?", "A", "not lettered"),
        ("Which? \nA. one \nC. three", "A", "not lettered"),
        ("Which? \nA. one \nB. ", "A", "not lettered"),
        ("Which? \nA. one \nB. two", "C", "none of the letters A, B"),
        (" \nA. one \nB. two", "A", "no question stands before"),
    ],
)
def test_options_that_cannot_be_read_say_why(query, answer, reason):
    with pytest.raises(ValueError, match=reason):
        choices(ProbeRecord(**row("4", "Ida Quill", query, answer)))
    assert choices(ProbeRecord(**row("4", "x", "A. Lee ___\nA) one\nB) B. Lee", "B"))).choices == ("one", "B. Lee")


@pytest.mark.parametrize(
    ("settings_", "reason"),
    [
        ({"source": "nowhere/at-all"}, "neither a folder nor a file; it is on no hub"),
        ({"subjects": ["Al Oak"]}, "no probes about 'Al Oak'"),
        ({"layout": "{}"}, "must hold {question} once"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_reason(target, settings_, reason):
    with pytest.raises(ValueError) as error:
        load_ort(**{"source": target} | settings_)
    assert reason in str(error.value)


def test_a_folder_without_probes_or_with_a_form_missing_is_refused(target, tmp_path):
    with pytest.raises(ValueError, match="holds no forget_level1"):
        load_ort(tmp_path / "notes")
    (target / "2_Bo_Marsh" / "forget_mcp.json").unlink()
    with pytest.raises(ValueError, match="lacks forget_mcp.json"):
        load_ort(target)


@settings(max_examples=150, deadline=None)
@given(
    queries=st.lists(st.tuples(st.sampled_from("124"), PLAIN, PLAIN), min_size=1, max_size=5),
    at=st.integers(0, 4),
    field=st.sampled_from(["query", "answer", "level", "subject"]),
    bad=BAD | PLAIN | st.just("remove"),
)
def test_a_probe_is_parsed_or_named_by_file_row_and_field_and_none_is_lost(tmp_path_factory, queries, at, field, bad):
    rows = [
        lettered("Ida Quill", (query, answer, "x")) if level == "4" else row(level, "Ida Quill", f"{query} Ida Quill")
        for level, query, answer in queries
    ]
    at %= len(rows)
    rows[at][field] = bad
    if bad == "remove":
        del rows[at][field]
    good = isinstance(bad, str) and bad != "remove" and "\ud800" not in bad and bool(bad.strip())
    if field == "level":
        good = good and bad in ("1", "2", "3", "4")
    file = write(tmp_path_factory.mktemp("ort"), "probes", rows)
    try:
        ort = load_ort(file)
    except ValueError as error:
        assert not good
        assert all(part in str(error) for part in ("probes.json", f"row {at}:", repr(field))) and "\n" not in str(error)
    else:
        assert good and sum(map(len, ort.forget.values())) == len(rows)
        asked = [i for i, r in enumerate(rows) if r["level"] in ("1", "2")]
        chosen = [i for i, r in enumerate(rows) if r["level"] == "4"]
        facts = [int(fact.id.split("/")[-1]) for fact in ort.forget_facts]
        left = [item.row for item in ort.left_out]
        assert sorted(facts + [i for i in left if i in asked]) == asked
        assert sum(item.choice is not None for item in ort.items) + sum(i in chosen for i in left) == len(chosen)
