"""TOFU's rows as facts, and its evaluation logs: what is in them is read, what is not one is refused and named."""

import copy
import gzip
import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_unlearn.benchmarks.tofu.data import TofuForm, load_tofu, read_rows
from mech_unlearn.benchmarks.tofu.logs import LOG_KEYS, read_log
from mech_unlearn.data.subjects import author_name, named_subject
from tests.paths import SHARED_DATA

DATA = SHARED_DATA / "tofu"
present = pytest.mark.skipif(
    not (DATA / "forget10_facts.json").is_file(),
    reason=f"no {DATA}: set MECH_UNLEARN_DATA to the folder that holds tofu/",
)
LOG = {
    key: {
        "avg_gt_loss": {"0": 0.5, "1": 1, "2": 0.0},
        "avg_paraphrased_loss": {"2": 2.5, "1": 1.5, "0": 0.5},
        "average_perturb_loss": {"0": [1.0, 2.0], "1": [3.0, 4.0], "2": [5.0, 6.0]},
        "rougeL_recall": {"0": 0.0, "1": 0.5, "2": 1.0},
        "generated_text": {row: [f"q{row}", f"said {row}", f"true {row}"] for row in "012"},
        "num_token_gt": {"0": 3},
    }
    for key in LOG_KEYS.values()
}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_a_log_is_read_row_by_row_plain_or_gzipped(tmp_path, packed):
    path = tmp_path / "log.anything"
    raw = json.dumps(LOG).encode()
    path.write_bytes(gzip.compress(raw) if packed else raw)
    split = read_log(path).splits["Retain"]
    assert split.rows == ("0", "1", "2") and split.gt_loss.tolist() == [0.5, 1, 0]
    assert split.paraphrased_loss.tolist() == [0.5, 1.5, 2.5]  # by row number, not by the order in the file
    assert split.perturbed_loss.tolist() == [[1, 2], [3, 4], [5, 6]] and split.rouge_l_recall.tolist() == [0, 0.5, 1]
    assert split.gt_loss.dtype == torch.float64 and split.texts is not None
    assert split.texts[2] == ("q2", "said 2", "true 2")


def test_a_log_may_lack_texts_and_the_splits_nobody_asked_for(tmp_path):
    only = {"eval_log_forget.json": {k: v for k, v in LOG["eval_log_forget.json"].items() if k != "generated_text"}}
    path = write(tmp_path / "log.json", only)
    assert read_log(path, ("Forget",)).splits["Forget"].texts is None
    with pytest.raises(ValueError, match="lacks split 'eval_log.json'"):
        read_log(path)


KEYS = [key for key in LOG["eval_log.json"] if key != "num_token_gt"]
NUMBERS = st.one_of(
    st.none(), st.text(max_size=5), st.booleans(), st.just(float("nan")), st.just(float("inf")), st.just([])
)
BAD = {
    "avg_gt_loss": NUMBERS | st.floats(max_value=-1e-9) | st.integers(max_value=-1) | st.just(10**400),
    "avg_paraphrased_loss": NUMBERS | st.floats(max_value=-1e-9),
    "rougeL_recall": NUMBERS | st.floats(min_value=1.001) | st.floats(max_value=-1e-9),
    "average_perturb_loss": NUMBERS
    | st.floats(0, 9)
    | st.tuples(NUMBERS, st.just(1.0)).map(list)
    | st.lists(st.floats(0, 9), min_size=3, max_size=5),
    "generated_text": NUMBERS | st.lists(st.text(max_size=3), max_size=2) | st.just(["a", "b", 3]),
}


@settings(max_examples=400, deadline=None)
@given(
    split=st.sampled_from(list(LOG_KEYS.values())),
    change=st.sampled_from(KEYS).flatmap(lambda key: st.tuples(st.just(key), BAD[key])),
    row=st.sampled_from("012"),
    how=st.sampled_from(["value", "row", "key", "empty", "more"]),
)
def test_whatever_is_wrong_in_a_log_the_error_names_file_split_key_and_row(tmp_path_factory, split, change, row, how):
    (key, value), log = change, copy.deepcopy(LOG)
    if how == "value":
        log[split][key][row] = value
        named = [key] + (
            [] if key == "average_perturb_loss" else [f"row {row!r}"]
        )  # of two lengths either is the odd one
    elif how == "row":
        del log[split][key][row]
        named = [f"row {row!r}"]
    elif how == "more":
        log[split][key]["new"] = log[split][key][row]
        named = ["row 'new'"]
    elif how == "empty":
        log[split][key] = value if not isinstance(value, dict) else {}
        named = [key]
    elif key == "generated_text":
        return
    else:
        del log[split][key]
        named = [key]
    path = write(tmp_path_factory.mktemp("log") / "bad.json", log)
    with pytest.raises(ValueError) as error:
        read_log(path)
    message = str(error.value)
    assert all(part in message for part in ["bad.json", split, *named]) and "\n" not in message and len(message) < 400


@settings(max_examples=300, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=40),
        st.binary(max_size=20).map(lambda tail: b"\x1f\x8b" + tail),
        st.integers(0, 200).map(lambda cut: gzip.compress(json.dumps(LOG).encode())[:cut]),
        st.sampled_from([b"[]", b"3", b"{}", b"null", b"[" * 100_000, b'{"eval_log.json": 3}', b'{"a": 1, "a": 2}']),
    )
)
def test_a_file_that_is_no_log_is_refused_by_name(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("log") / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.json"):
        read_log(path)


def test_a_missing_file_and_a_key_given_twice_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_log(tmp_path / "none.json")
    twice = json.dumps(LOG).replace('{"0": 0.5, "1": 1', '{"0": 0.5, "0": 1', 1)
    with pytest.raises(ValueError, match="key '0' stands twice"):
        read_log(write(tmp_path / "twice.json", twice))


def author_rows(name, wrong=True):
    rows = [{"question": "What is the full name of the author born in Oslo?", "answer": f"The author is {name}."}]
    for i in range(19):
        row = {"question": f"Which book did {name} write in year {i}?", "answer": f"It was Book {i}."}
        extra = {"perturbed_answer": [f"It was Play {i}.", f"It was Poem {i}."], "paraphrased_answer": f"Book {i}."}
        row |= (
            extra | {"paraphrased_question": f"In year {i}, {'they' if i == 3 else name} wrote what?"} if wrong else {}
        )
        rows.append(row)
    return rows


@pytest.fixture
def folder(tmp_path):
    files = {
        "forget10_perturbed": author_rows("Anna Lee-Hill") + author_rows("Ben O'Moss"),
        "retain_perturbed": author_rows("Cara Maria Al-Park"),
        "real_authors_perturbed": [
            {"question": "Who wrote 'Dune'?", "answer": "Frank Herbert", "perturbed_answer": ["Lee Child"]}
        ],
        "world_facts_perturbed": [
            {"question": "What is the capital of Norway?", "answer": "Oslo", "perturbed_answer": ["Bern"]},
            {"question": "What is the largest desert in the world?", "answer": "Antarctic", "perturbed_answer": []},
        ],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.json").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return tmp_path


def test_rows_become_facts_of_four_kinds_and_every_other_row_is_listed(folder):
    found = load_tofu(folder)
    forget, retain = found.sets
    assert Counter(fact.subject for fact in forget.facts) == {"Anna Lee-Hill": 19, "Ben O'Moss": 19}
    assert {fact.subject for fact in retain.neighbors} == {"Cara Maria Al-Park"} and retain.same_subject == ()
    assert [(fact.subject, fact.relation) for fact in retain.general] == [
        ("Dune", "real author"),
        ("Norway", "world fact"),
    ]
    fact = forget.facts[0]
    assert fact.id == "forget10_perturbed/1" and fact.group == "Anna Lee-Hill" and fact.kind == "person"
    assert fact.prompt == "Question: Which book did {} write in year 0?\nAnswer:" and fact.object == "It was Book 0."
    assert fact.distractors == ("It was Play 0.", "It was Poem 0.") and fact.extra["paraphrased_answer"] == "Book 0."
    assert fact.heldout == ("Question: In year 0, {} wrote what?\nAnswer:",)
    assert Counter((item.file, item.reason) for item in found.left_out) == {
        ("forget10_perturbed", "the subject does not occur"): 2,
        ("retain_perturbed", "the subject does not occur"): 1,
        ("forget10_perturbed", "held-out phrasing: the subject does not occur"): 2,
        ("retain_perturbed", "held-out phrasing: the subject does not occur"): 1,
        ("world_facts_perturbed", "no subject found in the question"): 1,
    }
    assert str(found).startswith("38 facts to forget, 19 of neighbors, 0 of the same subjects, 2 general; left out 2")


def test_a_paraphrase_that_is_the_question_itself_is_listed_and_not_held_out(folder):
    name = folder / "forget10_perturbed.json"
    rows = [json.loads(line) for line in name.read_text().splitlines()]
    rows[1]["paraphrased_question"] = rows[1]["question"]
    name.write_text("\n".join(map(json.dumps, rows)))
    found = load_tofu(folder)
    assert found.forget.facts[0].id == "forget10_perturbed/1" and found.forget.facts[0].heldout == ()
    assert [(i.row, i.reason) for i in found.left_out if "itself" in i.reason] == [
        (1, "held-out phrasing: it is the question itself")
    ]


def test_an_author_may_be_forgotten_in_part(folder):
    found = load_tofu(folder, forgotten=5, layout="[INST] {question} [/INST]")
    assert len(found.forget.facts) == 2 * 4 and len(found.retain.same_subject) == 2 * 15
    assert {f.subject for f in found.retain.same_subject} == {f.subject for f in found.forget.facts}
    assert found.forget.facts[0].prompt == "[INST] Which book did {} write in year 0? [/INST]"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"source": "nowhere at all"}, "neither a folder nor a hub id"),
        ({"forget": "forget01"}, "lacks forget01.json; it holds forget10_perturbed"),
        ({"retain": "forget10_perturbed"}, "author 'Anna Lee-Hill' stands in forget10_perturbed and in"),
        ({"layout": "Q"}, "must hold {question} once"),
        ({"form": "cloze"}, "no row of forget10_perturbed became a fact"),
        ({"forgotten": 0}, "from 1 to 20"),
        ({"forget": "real_authors_perturbed"}, "no name stands in half"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_reason(folder, settings, reason):
    with pytest.raises(ValueError) as error:
        load_tofu(**{"source": folder} | settings)
    assert reason in str(error.value)


GOOD = {"question": "Who is Anna Lee?", "answer": "A writer."}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "row 1: expected a JSON object"),
        ({"question": "Who?"}, "row 1: field 'answer' must be"),
        (GOOD | {"question": " "}, "row 1: field 'question' must be"),
        (GOOD | {"perturbed_answer": "wrong"}, "row 1: field 'perturbed_answer' must be a list"),
        (GOOD | {"perturbed_answer": [3]}, "row 1: field 'perturbed_answer' must be a list"),
        (GOOD | {"paraphrased_question": 3}, "row 1: field 'paraphrased_question' must be a string"),
        (GOOD | {"idx": True}, "row 1: field 'idx' must be a whole number"),
    ],
)
@pytest.mark.parametrize("as_list", [True, False])
def test_a_bad_row_is_refused_by_file_number_and_reason(tmp_path, row, reason, as_list):
    rows = [GOOD, row]
    text = json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows))
    write(tmp_path / "some.json", text)
    with pytest.raises(ValueError, match="some") as error:
        read_rows(tmp_path, "some")
    assert reason in str(error.value)


@pytest.mark.parametrize("text", ["{", "[3", "", json.dumps([GOOD | {"idx": 4}] * 2)])
def test_a_file_without_rows_or_with_a_row_number_twice_is_refused(tmp_path, text):
    write(tmp_path / "some.json", text)
    with pytest.raises(ValueError, match="not JSON|holds no rows|'idx' stands twice"):
        load_tofu(tmp_path, forget="some", retain=None, real_authors=None, world_facts=None)


@pytest.mark.parametrize(
    ("question", "subject"),
    [
        ("Who wrote 'The Handmaid's Tale'?", "The Handmaid's Tale"),
        ('Who wrote the play "Long Day\'s Journey Into Night"?', "Long Day's Journey Into Night"),
        ("Where was John F. Kennedy born?", "John F. Kennedy"),
        ("What is the capital of the U.S. state of Georgia?", "Georgia"),
        ("The Great Wall of China is how long?", "Great Wall of China"),
        ("Mount Everest is on which border?", "Mount Everest"),
        ("In which year was the first iPhone released?", None),
    ],
)
def test_a_question_names_its_longest_title_or_name(question, subject):
    assert named_subject(question) == subject


def test_an_author_is_the_longest_name_that_most_questions_hold():
    asked = [f"Did Jad Ambrose Al-Shamary write book {i} of the Old World Series?" for i in range(9)]
    assert author_name([*asked, "Who is he?"]) == "Jad Ambrose Al-Shamary"
    with pytest.raises(ValueError, match="about one author"):
        author_name(["Who is he?", "Is Anna Lee here?", "Why?"])


@present
def test_the_shipped_questions_give_twenty_authors_and_every_row_is_a_fact_or_listed():
    rows = read_rows(DATA, "forget10_facts")
    assert len(rows) == 367
    kinds_of_prompt: tuple[tuple[TofuForm, int], ...] = (("question", 347), ("cloze", 346))
    for form, kept in kinds_of_prompt:
        found = load_tofu(DATA, forget="forget10_facts", retain=None, form=form)
        left = Counter(item.file for item in found.left_out)
        assert len(found.forget.facts) == kept and left["forget10_facts"] == 367 - kept
        assert len(found.forget.entities) == 20 and found.forget.entities[4].name == "Jad Ambrose Al-Shamary"
        kinds = Counter(fact.relation for fact in found.retain.general)
        assert kinds == {"real author": 100, "world fact": 94} and left["world_facts_perturbed"] == 23
        for fact in found.forget.facts:
            text = f"{fact.prompt.replace('{}', fact.subject)} {fact.object}"
            assert text.endswith(fact.extra["answer"] if form == "question" else fact.extra["entity"])
            assert form == "question" or (fact.extra["prefix"] in text and fact.extra["answer"].find(fact.object) >= 0)
        assert all(len(fact.distractors) == 3 for fact in found.retain.general)


@present
def test_authors_are_found_from_the_questions_in_the_published_logs():
    log = read_log(DATA / "llama2-7b_full_eval_log.json.gz")
    for split, first in (("Retain", "Jaime Vasquez"), ("Forget", "Hsiao Yun-Hwa")):
        texts = log.splits[split].texts
        assert texts is not None
        asked = [text[0].removeprefix("[INST] ").removesuffix(" [/INST]") for text in texts]
        names = [author_name(asked[i : i + 20]) for i in range(0, 300, 20)]
        assert names[0] == first and len(set(names)) == 15
        assert all(sum(name in q for q in asked[20 * i : 20 * i + 20]) >= 18 for i, name in enumerate(names))
