"""zsRE in both layouts: questions, rephrasings and locality questions become facts of the kind they are."""

import copy
import json
from collections import Counter

import pytest

from mech_unlearn.data.zsre import NATURAL, load_zsre

MEMIT = [
    {
        "subject": "Ada Berg",
        "src": "What school did Ada Berg attend?",
        "pred": "Yale",
        "rephrase": "Ada Berg went to what school?",
        "alt": "Delft",
        "answers": ["Lund", "Lund University"],
        "loc": "nq question: who painted the old mill",
        "loc_ans": "Ruisdael",
        "cond": "Yale >> Delft || What school did Ada Berg attend?",
    },
    {
        "subject": "Carl Dahl",
        "src": "What school did Carl Dahl attend?",
        "rephrase": "What school did he attend?",
        "alt": "Lund",
        "answers": ["Ghent"],
        "loc": "nq question: when did Ada Berg sail north",
        "loc_ans": "1911",
    },
    {
        "subject": "Eva Fonn",
        "src": "Where is Eva Fonn from?",
        "rephrase": "",
        "alt": "",
        "answers": ["Lima"],
        "loc": "nq question: who painted the old mill?",
        "loc_ans": "Ruisdael",
    },
    {"subject": "Gro", "src": "Who is he?", "answers": ["Nobody"], "loc": "nq question: what", "loc_ans": " "},
    {"subject": "Ivo", "src": "What school did Ivo attend?", "answers": []},
    {"subject": "Ada Berg", "src": "Where is Ada Berg from?", "answers": ["Oslo"], "alt": "Rome"},
]
KNOWEDIT = [
    {
        "subject": "Kai Lund",
        "prompt": "Which band is Kai Lund in?",
        "target_new": "Blue Hats",
        "ground_truth": ["Red Hats"],
        "rephrase_prompt": "What is the band of Kai Lund?",
        "cond": "x >> Blue Hats || y",
        "locality": {
            "Relation_Specificity": [
                {"prompt": "The birthplace of Kai Lund is", "ground_truth": ["Bern"]},
                {"prompt": "Kai Lund occupation", "ground_truth": [["singer", "vocalist"]]},
                {"prompt": ["His height is"], "ground_truth": "190"},
            ],
            "Forgetfulness": [{"prompt": "A band of Kai Lund is", "ground_truth": [["Red Hats"]]}],
        },
        "portability": {"Reasoning": [{"prompt": "Who leads the band of Kai Lund?", "ground_truth": "Mia Nord"}]},
    },
    {
        "subject": "Olga Pihl",
        "prompt": "Which band is Olga Pihl in?",
        "target_new": "Red Hats",
        "ground_truth": "Green Hats",
        "locality": {"Relation_Specificity": [{"prompt": "The birthplace of Olga Pihl is", "ground_truth": "Turin"}]},
    },
    {"subject": "Per", "prompt": "The capital of Per is", "target_new": "b", "ground_truth": [["c"]], "locality": None},
]


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def test_memits_rows_become_facts_of_four_kinds_and_everything_else_is_listed(tmp_path):
    file = write(tmp_path / "zsre.json", MEMIT)
    found = load_zsre(file, relations=["What school did {} attend?"], subjects=["Ada Berg"])
    forget, retain = found.sets
    (fact,) = forget.facts
    assert fact.prompt == "Question: What school did {} attend?\nAnswer:" and fact.object == "Lund"
    assert fact.heldout == ("Question: {} went to what school?\nAnswer:",) and fact.distractors == ("Delft", "Ghent")
    assert fact.extra["answers"] == ("Lund", "Lund University") and fact.extra["pred"] == "Yale"
    assert [(f.subject, f.object, f.distractors) for f in retain.neighbors] == [("Carl Dahl", "Ghent", ("Lund",))]
    assert [(f.subject, f.object) for f in retain.same_subject] == [("Ada Berg", "Oslo")]
    assert [(f.subject, f.relation, f.object) for f in retain.general] == [
        ("Eva Fonn", "Where is {} from?", "Lima"),
        ("who painted the old mill", NATURAL, "Ruisdael"),
    ]
    assert retain.general[1].prompt == "Question: {}?\nAnswer:" and retain.general[1].kind == "question"
    assert Counter((item.row, item.reason) for item in found.left_out) == {
        (1, "held-out phrasing: the subject does not occur"): 1,
        (1, "it names a forgotten subject"): 1,
        (2, "the same fact stands in an earlier row of zsre"): 1,
        (3, "the subject does not occur"): 1,
        (3, "locality question without text or answer"): 1,
        (4, "no true answer"): 1,
    }


def test_knowedits_locality_is_about_the_same_subject_and_what_asks_for_the_edit_is_left_out(tmp_path):
    found = load_zsre(write(tmp_path / "KnowEdit.json", KNOWEDIT), subjects=["Kai Lund"])
    forget, retain = found.sets
    (fact,) = forget.facts
    assert fact.object == "Red Hats" and fact.distractors == ("Blue Hats", "Green Hats")
    assert fact.heldout == ("Question: What is the band of {}?\nAnswer:",)
    assert json.loads(json.dumps(fact.extra["portability"])) == KNOWEDIT[0]["portability"]
    assert [(f.prompt, f.object) for f in retain.same_subject] == [
        ("The birthplace of {} is", "Bern"),
        ("{} occupation", "singer"),
    ]
    assert retain.same_subject[0].distractors == ("Turin",)
    assert retain.same_subject[1].extra["answers"] == ("singer", "vocalist")
    assert [(f.subject, f.object) for f in retain.neighbors] == [("Olga Pihl", "Green Hats")]
    assert {(f.subject, f.prompt) for f in retain.general} == {
        ("Per", "The capital of {} is"),
        ("Olga Pihl", "The birthplace of {} is"),
    }
    assert Counter(item.reason for item in found.left_out) == {
        "locality: the subject does not occur": 1,
        "locality: Forgetfulness asks for the edited fact": 1,
    }


def test_the_layout_is_seen_by_the_first_row_or_given(tmp_path):
    memit, knowedit = write(tmp_path / "m.json", MEMIT), write(tmp_path / "k.json", KNOWEDIT)
    assert load_zsre(memit, subjects=1) == load_zsre(memit, subjects=1, layout="memit")
    assert load_zsre(tmp_path, name="k", subjects=1) == load_zsre(knowedit, subjects=1, layout="knowedit")
    with pytest.raises(ValueError, match=r"m.json, row 0: field 'prompt' must be given"):
        load_zsre(memit, layout="knowedit")
    with pytest.raises(ValueError, match=r"row 0: must have either 'src' \(MEMIT\) or 'prompt' \(KnowEdit\)"):
        load_zsre(write(tmp_path / "n.json", [{"subject": "Ada"}]))


def test_a_question_is_set_into_the_prompt_asked_for_and_a_sentence_is_not(tmp_path):
    found = load_zsre(write(tmp_path / "k.json", KNOWEDIT), subjects=["Kai Lund", "Per"], question="Q: {question} A:")
    assert [f.prompt for f in found.forget.facts] == ["Q: Which band is {} in? A:", "The capital of {} is"]
    with pytest.raises(ValueError, match="must hold {question} once"):
        load_zsre(tmp_path / "k.json", question="Q")


@pytest.mark.parametrize(
    ("rows", "change", "reason"),
    [
        (MEMIT, lambda r: r.pop("subject"), "row 1: field 'subject' must be given"),
        (MEMIT, lambda r: r.update(answers={"a": 1}), "row 1: field 'answers' must be an answer or a list of answers"),
        (MEMIT, lambda r: r.update(loc=3), "row 1: field 'loc' must be a string, found 3"),
        (KNOWEDIT, lambda r: r.update(ground_truth=[["a", 3]]), "row 1: field 'ground_truth' must be an answer"),
        (
            KNOWEDIT,
            lambda r: r["locality"].update(Relation_Specificity=[{"prompt": "a"}]),
            "row 1: field 'locality.Relation_Specificity.0.ground_truth' must be given",
        ),
        (KNOWEDIT, lambda r: r.update(portability=[]), "row 1: field 'portability' must be a"),
    ],
)
def test_a_bad_row_is_named_with_file_row_and_field(tmp_path, rows, change, reason):
    rows = copy.deepcopy(rows)
    change(rows[1])
    with pytest.raises(ValueError, match="bad.json") as error:
        load_zsre(write(tmp_path / "bad.json", rows))
    assert reason in str(error.value) and "\n" not in str(error.value)
