"""PopQA: every question is a fact or listed; no right answer is a distractor; only known subjects may be drawn."""

import csv
import io
import json

import pytest

from mech_unlearn.data.popqa import load_popqa

COLUMNS = ("id", "subj", "prop", "obj", "s_aliases", "o_aliases", "s_pop", "o_pop", "question", "possible_answers")


def row(number, subj, prop, obj, question, answers=(), pop="100", aliases="[]"):
    return dict(
        zip(
            COLUMNS,
            (str(number), subj, prop, obj, aliases, "[]", pop, "", question, json.dumps([obj, *answers])),
            strict=True,
        )
    )


ROWS = [
    row(1, "Ada Berg", "occupation", "poet", "What is Ada Berg's occupation?", ["writer"], "5000", '["A. Berg", ""]'),
    row(2, "Ada Berg", "religion", "Shinto", "What is the religion of Ada Berg?", pop="5000"),
    row(3, "Carl Dahl", "occupation", "writer", "What is Carl Dahl's occupation?"),
    row(4, "Eva", "occupation", "baker", "What is Eva's occupation?", pop=""),
    row(5, "Lima", "capital of", "Peru", 'Lima is the "capital" of\twhat?'),
    row(6, "Gro Hals", "religion", "Islam", "What does she believe?"),
    row(7, "Ivo", "author", "Ada Berg", "Who wrote Ivo?"),
]


def write(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, delimiter="\t" if path.suffix == ".tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue())
    return path


@pytest.mark.parametrize("ending", ["tsv", "csv", "json"])
def test_questions_become_facts_of_four_kinds_and_every_other_row_is_listed(tmp_path, ending):
    file = tmp_path / f"popqa.{ending}"
    if ending == "json":  # as the hub gives them: numbers are numbers
        file.write_text(
            json.dumps([r | {"id": int(r["id"]), "s_pop": int(r["s_pop"] or 0), "o_pop": None} for r in ROWS])
        )
    else:
        write(file, ROWS)
    found = load_popqa(file, relations=["occupation"], subjects=["Ada Berg"])
    forget, retain = found.sets
    (fact,) = forget.facts
    assert fact.prompt == "Question: What is {}'s occupation?\nAnswer:" and fact.object == "poet"
    assert fact.aliases == ("A. Berg",) and fact.extra["s_pop"] == 5000 and fact.extra["o_pop"] is None
    assert fact.extra["answers"] == ("poet", "writer") and fact.distractors == ("baker",)  # writer is right too
    assert [(f.subject, f.object, set(f.distractors)) for f in retain.neighbors] == [
        ("Carl Dahl", "writer", {"poet", "baker"}),
        ("Eva", "baker", {"poet", "writer"}),
    ]
    assert [(f.subject, f.object) for f in retain.same_subject] == [("Ada Berg", "Shinto")]
    assert [f.prompt for f in retain.general] == ['Question: {} is the "capital" of\twhat?\nAnswer:']
    assert [(item.row, item.reason) for item in found.left_out] == [
        (5, "the subject does not occur"),
        (6, "its object is a forgotten subject"),
    ]


def test_only_subjects_with_enough_page_views_are_drawn(tmp_path):
    file = write(tmp_path / "popqa.tsv", ROWS)
    assert {f.subject for f in load_popqa(file, subjects=1, popularity=5000).forget.facts} == {"Ada Berg"}
    with pytest.raises(ValueError, match="from 1 to the 1 that have a fact to forget, got 2"):
        load_popqa(file, subjects=2, popularity=101)
    with pytest.raises(ValueError, match="no subject with a fact to forget 'Eva'"):
        load_popqa(file, subjects=["Eva"], popularity=1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"possible_answers": "poet"}, "row 1: field 'possible_answers' must be a list of strings, or its JSON text"),
        ({"possible_answers": "[1]"}, "row 1: field 'possible_answers' must be a list of strings"),
        ({"s_aliases": '{"a": 1}'}, "row 1: field 's_aliases' must be a list of strings"),
        ({"s_pop": "many"}, "row 1: field 's_pop' must be a whole number, 0 or more, found 'many'"),
        ({"s_pop": "-1"}, "row 1: field 's_pop' must be a whole number"),
        ({"obj": " "}, "row 1: field 'obj' must be a non-empty string"),
    ],
)
def test_a_bad_row_is_named_with_file_row_and_field(tmp_path, change, reason):
    with pytest.raises(ValueError, match="popqa.tsv") as error:
        load_popqa(write(tmp_path / "popqa.tsv", [ROWS[0], ROWS[1] | change]))
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_missing_column_is_named(tmp_path):
    (tmp_path / "popqa.csv").write_text("subj,prop,obj,question\nAda,job,poet,What is Ada?\n")
    with pytest.raises(ValueError, match=r"popqa.csv, row 0: field 'possible_answers' must be given"):
        load_popqa(tmp_path, name="popqa")
