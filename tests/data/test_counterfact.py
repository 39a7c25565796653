"""CounterFact: cases and neighbors as facts; whom a neighborhood prompt is about is found, or the prompt is listed."""

import copy
import json
from collections import Counter

import pytest

from mech_unlearn.data.counterfact import LABELS, load_counterfact, subject_of


def case(number, subject, true, new, prompt="The native language of {} is", relation="P103", **more):
    return {
        "case_id": number,
        "pararel_idx": number,
        "requested_rewrite": {
            "prompt": prompt,
            "relation_id": relation,
            "target_new": {"str": new, "id": "Q1"},
            "target_true": {"str": true, "id": "Q2"},
            "subject": subject,
        },
        "paraphrase_prompts": [],
        "neighborhood_prompts": [],
        "attribute_prompts": [],
        "generation_prompts": [],
    } | more


CASES = [
    case(
        7,
        "Ada Berg",
        "Danish",
        "Greek",
        paraphrase_prompts=[
            "The weather was mild {that day. Ada Berg, a native speaker of",
            "Nobody said a word.  Ada Berg was raised speaking ",
            "Ada Berg, like Ada Berg senior, speaks",
            "She speaks",
            "The native language of Ada Berg is",
        ],
        neighborhood_prompts=[
            "The native language of Carl Dahl is",
            "Eva Fonn, a native speaker of",
            "Gro Hals was raised speaking",
            "The native language of Carl Dahl is",
            "Eva Fonn is at home in",
            "The native language of the old king is",
            "The native language of Ada Berg is",
        ],
        attribute_prompts=["The native language of Nikos Pavlou is", "iPhone 3, a native speaker of"],
        generation_prompts=["Ada Berg lives"],
    ),
    case(8, "Ivo Juhl", "Dutch", "Greek", neighborhood_prompts=["The native language of Kai Lund is"]),
    case(9, "Ada Berg", "Oslo", "Rome", prompt="{} works in", relation="P937"),
    case(10, "Mia Nord", "Lima", "Rome", prompt="{} works in", relation="P937"),
    case(11, "Olga", "Olga", "Rome", prompt="{} is called", relation="P9999"),
    case(12, "Per Quist", "Ada Berg", "Rome", prompt="{} admires", relation="P9999"),
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps(CASES))
    return path


def test_cases_become_facts_of_four_kinds_and_every_other_case_or_prompt_is_listed(file):
    found = load_counterfact(file, relations=["P103"], subjects=["Ada Berg"])
    forget, retain = found.sets
    (fact,) = forget.facts
    assert (fact.id, fact.subject, fact.relation, fact.object) == ("case7", "Ada Berg", "native language", "Danish")
    assert fact.prompt == "The native language of {} is" and fact.distractors[0] == "Greek"
    assert fact.heldout == (
        "The weather was mild {that day. {}, a native speaker of",
        "Nobody said a word.  {} was raised speaking",
    )
    assert fact.extra["generation_prompts"] == ("Ada Berg lives",) and fact.extra["target_new"]["id"] == "Q1"
    assert {(f.subject, f.object, f.prompt) for f in retain.neighbors} == {
        ("Carl Dahl", "Danish", "The native language of {} is"),
        ("Eva Fonn", "Danish", "{}, a native speaker of"),
        ("Gro Hals", "Danish", "{} was raised speaking"),
        ("Nikos Pavlou", "Greek", "The native language of {} is"),
        ("iPhone 3", "Greek", "{}, a native speaker of"),
        ("Ivo Juhl", "Dutch", "The native language of {} is"),
    }
    assert [(f.subject, f.object) for f in retain.same_subject] == [("Ada Berg", "Oslo")]
    assert [(f.subject, f.object) for f in retain.general] == [("Mia Nord", "Lima")]
    assert Counter((item.row, item.reason) for item in found.left_out) == {
        (0, "held-out phrasing: the subject occurs more than once"): 1,
        (0, "held-out phrasing: the subject does not occur"): 1,
        (0, "held-out phrasing: it is the prompt itself"): 1,
        (0, "neighborhood prompt: no phrasing of its relation in the file shows who the subject is"): 1,
        (0, "neighborhood prompt: what stands in the subject's place does not look like a name"): 1,
        (0, "the same fact stands in an earlier row of counterfact"): 1 + 1,
        (4, "object equals subject"): 1,
        (5, "its object is a forgotten subject"): 1,
    }


def test_neighbors_carry_the_other_target_as_distractor_and_say_where_they_are_from(file):
    neighbors = {
        f.subject: f for f in load_counterfact(file, relations=["P103"], subjects=["Ada Berg"]).retain.neighbors
    }
    assert neighbors["Carl Dahl"].distractors[0] == "Greek" and neighbors["Nikos Pavlou"].distractors[0] == "Danish"
    carl = neighbors["Carl Dahl"].extra
    assert carl["prompt_kind"] == "neighborhood" and carl["case_id"] == 7
    assert "prompt_kind" not in neighbors["Ivo Juhl"].extra


def test_attribute_prompts_and_the_prompts_of_kept_cases_stay_out_when_not_wanted(file):
    found = load_counterfact(file, relations=["P103"], subjects=["Ada Berg"], attributes=False)
    subjects = {fact.subject for fact in found.retain.neighbors}
    assert "Nikos Pavlou" not in subjects and "Carl Dahl" in subjects and "Kai Lund" not in subjects
    other = load_counterfact(file, relations=["native language"], subjects=["Ivo Juhl"])
    assert "Kai Lund" in {fact.subject for fact in other.retain.neighbors}


def test_a_neighborhood_prompt_about_a_forgotten_subject_is_not_kept(file):
    rows = copy.deepcopy(CASES)
    rows[0]["neighborhood_prompts"] = ["Ada Berg, a native speaker of", "Ivo Juhl, a native speaker of"]
    file.write_text(json.dumps(rows))
    found = load_counterfact(file, relations=["P103"], subjects=["Ada Berg", "Ivo Juhl"])
    assert [item.reason for item in found.left_out if "forgotten fact" in item.reason] == [
        "it asks for a forgotten fact"
    ] * 2
    assert not {"Ada Berg", "Ivo Juhl"} & {fact.subject for fact in found.retain.neighbors}


def test_the_longest_matching_phrasing_tells_the_subject():
    templates = ["{}, which is located in", "The city of {} is in", "{} is in"]
    assert subject_of("Biure, which is located in", templates) == ("Biure", templates[0])
    assert subject_of("The city of Lima is in", templates) == ("Lima", templates[1])
    assert subject_of("Lima is in ", templates) == ("Lima", templates[2])
    for prompt in ("Lima lies in", " is in", "is in", "{}", ""):
        with pytest.raises(ValueError, match="no phrasing of its relation"):
            subject_of(prompt, templates)
    for prompt in ("Biure which is in", "the valley is in"):
        with pytest.raises(ValueError, match="does not look like a name"):
            subject_of(prompt, ["{} in" if "which" in prompt else "{} is in"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r.pop("case_id"), "row 2: field 'case_id' must be given"),
        (lambda r: r.update(case_id=7), "row 2: case_id 7 stands in row 0 too"),
        (lambda r: r["requested_rewrite"].pop("subject"), "row 2: field 'requested_rewrite.subject' must be given"),
        (
            lambda r: r["requested_rewrite"].update(target_true="Oslo"),
            "row 2: field 'requested_rewrite.target_true' must be a",
        ),
        (lambda r: r.update(paraphrase_prompts=[3]), "row 2: field 'paraphrase_prompts.0' must be a string, found 3"),
    ],
)
def test_a_bad_case_is_named_with_file_row_and_field(file, change, reason):
    rows = copy.deepcopy(CASES)
    change(rows[2])
    file.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="counterfact.json") as error:
        load_counterfact(file, subjects=["Ada Berg"])
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_relation_is_chosen_by_id_or_by_name_and_each_name_is_used_once(file):
    by_id, by_name = (load_counterfact(file, relations=[key], subjects=2) for key in ("P103", LABELS["P103"]))
    assert by_id == by_name and len(by_id.forget.facts) == 2
    assert len(set(LABELS.values())) == len(LABELS)
    with pytest.raises(ValueError, match="no relation 'P1' in the data"):
        load_counterfact(file, relations=["P1"])
