"""Facts in scripts without spaces: the joiner stands between prompt and object everywhere, and changes nothing else."""

import random
from dataclasses import replace

import pytest

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.data.jsonl import load_facts, save_facts
from mech_unlearn.methods import IdkDpo, Npo
from mech_unlearn.metrics.forms import by_form
from mech_unlearn.metrics.recall import recall
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import greedy
from mech_unlearn.model.tokens import make_queries, make_query
from mech_unlearn.training.rows import answer_rows, refusal_rows
from mech_unlearn.training.schedule import Schedule
from tests.checkpoints import byte_tokenizer, random_hf
from tests.tiny import tiny_facts, tiny_tokenizer

CHINESE = Fact(id="0", subject="法国", relation="首都", object="巴黎", prompt="{}的首都是")


@pytest.fixture(scope="module")
def model():
    return load(random_hf(0), tokenizer=byte_tokenizer())


def said(model, count):
    """Facts whose object is what the model says right behind the prompt, without a space."""
    facts = []
    for i in range(400):
        fact = replace(CHINESE, id=str(i), subject=f"国{i}")
        prompt = model.tokenizer(fact.prompt.replace("{}", fact.subject)).input_ids
        text = model.tokenizer.decode(greedy(model, [prompt], 1)[0])
        if text.strip() == text != "" and "\ufffd" not in text:
            facts.append(replace(fact, object=text))
    assert len(facts) >= count
    return facts[:count]


@pytest.mark.slow
def test_recall_counts_what_follows_without_a_space_and_only_that(model):
    facts = said(model, 4)
    assert recall(model, facts).value == 1.0
    assert recall(model, [replace(fact, joiner=" ") for fact in facts]).value < 1.0


def test_prompt_and_object_are_joined_by_it_in_scores_training_and_refusals(model):
    tokenizer = model.tokenizer
    query = make_query(tokenizer, CHINESE, CHINESE.prompt)
    assert tokenizer.decode(query.full[1:]) == "法国的首都是巴黎"
    assert answer_rows(tokenizer, [CHINESE]) == [(tuple(tokenizer("法国的首都是巴黎").input_ids), len(query.prompt))]

    ((row, _),) = refusal_rows(tokenizer, [CHINESE], ("不知道",), random.Random(0))
    assert tokenizer.decode(row[1:]) == "法国的首都是不知道"
    assert CHINESE.stated("我知道{}的首都是") == "我知道法国的首都是巴黎" and CHINESE.joined("答： ") == "答： 巴黎"


@pytest.mark.slow
@pytest.mark.parametrize("method", (Npo, lambda schedule: IdkDpo(schedule=schedule, refusals=("不知道",))))
def test_methods_train_such_facts(model, method):
    facts = said(model, 4)
    forget, retain = ForgetSet(facts=tuple(facts[:2])), RetainSet(neighbors=tuple(facts[2:]))
    edit = method(schedule=Schedule(lr=3e-3, epochs=8, batch_size=4)).fit(model, forget, retain)
    with edit.on(model):
        assert recall(model, forget.facts).value < 1.0


def test_english_forms_are_not_asked(model):
    report = by_form(model, [replace(CHINESE, distractors=("罗马",))])
    assert {"question", "cloze", "multiple_choice"} <= report.not_asked.keys()


def test_it_is_read_and_written_and_left_out_where_it_is_that_of_the_script(tmp_path):
    path = tmp_path / "facts.jsonl"
    save_facts([CHINESE, replace(CHINESE, id="1", joiner=" ")], path)
    assert [fact.joiner for fact in load_facts(path)] == ["", " "]
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert "joiner" not in first and '"joiner": " "' in second
    table = tmp_path / "facts.csv"
    table.write_text(
        "id,subject,relation,object,prompt,joiner\n0,法国,首都,巴黎,{}的首都是,\n1,A,b,c,{} is, \n", encoding="utf-8"
    )
    assert [fact.joiner for fact in load_facts(table)] == ["", " "]


@pytest.mark.parametrize(
    ("prompt", "joiner"),
    [
        ("{}的首都是", ""),
        ("{}の首都は", ""),
        ("เมืองหลวงของ{}คือ", ""),
        ("{}的首都：", ""),
        ("{}의 수도는", " "),
        ("Столица {} -", " "),
        ("The capital of {} is", " "),
    ],
)
def test_the_script_of_the_phrasing_chooses_it(prompt, joiner):
    assert Fact(id="0", subject="X", relation="r", object="Y", prompt=prompt).joiner == joiner
    assert replace(CHINESE, joiner=" ").joiner == " "


@pytest.mark.parametrize("joiner", ("  ", "-"))
def test_other_joiners_are_refused(joiner):
    with pytest.raises(ValueError, match="'joiner' must be a space or empty"):
        replace(CHINESE, joiner=joiner)


def test_an_answer_that_merges_with_the_prompt_names_the_joiner_as_the_mend():
    fact = replace(CHINESE, id="a", prompt="{} que", object="stion")
    with pytest.raises(ValueError, match="fact 'a': .*merge with the end .*set joiner to a space"):
        make_query(byte_tokenizer(), fact, fact.prompt)


def test_a_space_stays_the_default_and_gives_the_tokens_of_the_text():
    tokenizer = tiny_tokenizer()
    for query in make_queries(tokenizer, tiny_facts(["Anna Lee", "Ben Hill"])):
        text = f"{query.template.replace('{}', query.fact.subject)} {query.fact.object}"
        assert list(query.full) == tokenizer(text).input_ids
