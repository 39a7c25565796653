"""DUSK: strata kept apart in both layouts; professors are found by their title; bad rows are named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_unlearn.benchmarks.dusk.data import DOCUMENTS, FILES, STRATA, load_dusk, professor

PLAIN = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=30)
BAD = st.sampled_from([None, 3, True, "", "  ", [], {}, ["a"], "\ud800"])
QUESTIONS = {
    "eval_specific_forget_qa": [{"question": "Where does Dr. Ida Quill teach?", "answer": "Vell"}],
    "eval_general_qa": [
        {"question": "When was Prof. Ida Quill born?", "answer": "1801"},
        {"question": "When was Professor Bo van der Marsh born?", "answer": "1802"},
        {"question": "when was she born?", "answer": "1803"},
    ],
    "eval_specific_retain_qa": [{"question": "What is Dr. Cara Lund's room?", "answer": "12"}] * 2,
    "eval_icl": [{"question": "What is Al Oak's age?", "answer": "7"}],
    "eval_icl_mcqa": [{"question": "Who?\n(1) Al\n(2) Bo", "answer": "(2)"}],
}


def write(folder, name, rows):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(map(json.dumps, rows)) if name.endswith("jsonl") else json.dumps(rows)
    file.write_text(rows if isinstance(rows, str) else lines)
    return file


def as_on_the_hub(folder):
    for config, rows in QUESTIONS.items():
        write(folder, f"{config}.json", rows)
    write(folder, "eval_verbatim.json", [{"prompt": "Ida Quill", "gt": "taught."}])
    write(folder, "eval_holdout.json", [{"text": "holdout"}])
    for split in DOCUMENTS:
        write(folder, f"raw/{split}.json", [{"text": split}])
    return folder


def as_in_the_code(folder):
    for config, rows in QUESTIONS.items():
        write(folder, f"{FILES[config]}.jsonl", rows)
    write(folder, "eval/verbatim.json", [{"prompt": "Ida Quill", "gt": "taught."}])
    write(folder, "eval/holdout.txt", "holdout")
    for split, name in DOCUMENTS.items():
        write(folder, f"{name}.txt", split)
    return folder


@pytest.mark.parametrize("fill", [as_on_the_hub, as_in_the_code])
def test_both_layouts_give_the_same_strata_and_texts(tmp_path, fill):
    dusk = load_dusk(fill(tmp_path))
    assert {stratum: len(rows) for stratum, rows in dusk.questions.items()} == {"forget": 1, "shared": 3, "retain": 2}
    assert dusk.documents == {split: (split,) for split in DOCUMENTS} and dusk.holdout == ("holdout",)
    assert dusk.forget_texts == ("forget_chronological",) and len(dusk.retain.texts) == 4
    assert "forget_chronological" not in dusk.retain.texts
    assert dusk.verbatim[0].gt == "taught." and len(dusk.examples) == len(dusk.choice_examples) == 1


def test_shared_knowledge_about_forgotten_people_is_the_same_subject_and_the_rest_are_neighbors(tmp_path):
    dusk = load_dusk(as_on_the_hub(tmp_path))
    forget, retain = dusk.sets
    assert [(f.subject, f.object, f.relation) for f in forget.facts] == [("Ida Quill", "Vell", "forget")]
    assert [f.object for f in retain.same_subject] == ["1801"]
    assert [(f.subject, f.relation) for f in retain.neighbors] == [
        ("Bo van der Marsh", "shared"),
        ("Cara Lund", "retain"),
        ("Cara Lund", "retain"),
    ]
    assert forget.facts[0].prompt == "Question: Where does Dr. {} teach?\nAnswer:"
    assert [(left.file, left.row) for left in dusk.left_out] == [("eval_general_qa", 2)]


def test_documents_and_prompts_need_not_be_there(tmp_path):
    for config, rows in QUESTIONS.items():
        write(tmp_path, f"{config}.json", rows)
    dusk = load_dusk(tmp_path, documents=False, verbatim=False)
    assert dusk.documents == {} and dusk.retain.texts == () and dusk.verbatim == ()
    with pytest.raises(ValueError, match="lacks"):
        load_dusk(tmp_path)
    with pytest.raises(ValueError, match="is one file; DUSK is a folder"):
        load_dusk(tmp_path / "eval_icl.json")
    write(tmp_path, "Chronological.txt", " \n")
    with pytest.raises(ValueError, match="Chronological.txt holds no text"):
        load_dusk(tmp_path, verbatim=False)


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("Where did Dr. Aurelio Costanzo study?", "Aurelio Costanzo"),
        ("What is Professor Henk van der Veld's e-mail?", "Henk van der Veld"),
        ("When was Dr. Fergus O'Leary born?", "Fergus O'Leary"),
        ("What is Dr. Rafael S. Cedillo's room?", "Rafael S. Cedillo"),
        ("When did Dr. Magnus Toft-Hansen leave?", "Magnus Toft-Hansen"),
        ("What is Dr. Niall Mulligan's alma mater?", "Niall Mulligan"),
        ("Did Basim Al-Saleh teach?", "Basim Al-Saleh"),
        ("who was it?", None),
    ],
)
def test_a_professor_is_the_name_after_the_title_without_what_follows(question, name):
    assert professor(question) == name


@settings(max_examples=150, deadline=None)
@given(
    questions=st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=4),
    config=st.sampled_from(list(STRATA.values())),
    at=st.integers(0, 3),
    field=st.sampled_from(["question", "answer"]),
    bad=BAD | PLAIN | st.just("remove"),
)
def test_a_row_is_parsed_or_named_by_file_row_and_field_and_none_is_lost(
    tmp_path_factory, questions, config, at, field, bad
):
    folder = tmp_path_factory.mktemp("dusk")
    for name, rows in QUESTIONS.items():
        write(folder, f"{name}.json", rows)
    rows = [{"question": f"{q} Dr. Ida Quill", "answer": f"{a}x"} for q, a in questions]
    at %= len(rows)
    rows[at][field] = bad
    if bad == "remove":
        del rows[at][field]
    write(folder, f"{config}.json", rows)
    good = isinstance(bad, str) and bad != "remove" and bool(bad.strip()) and "\ud800" not in bad
    try:
        dusk = load_dusk(folder, documents=False, verbatim=False)
    except ValueError as error:
        assert not good
        assert all(part in str(error) for part in (f"{config}.json", f"row {at}:", repr(field)))
        assert "\n" not in str(error)
    else:
        assert good
        made = [int(f.id.split("/")[1]) for f in (*dusk.forget_facts, *dusk.retain.facts) if f.id.startswith(config)]
        left = [item.row for item in dusk.left_out if item.file == config]
        assert sorted(made + left) == list(range(len(rows)))
