"""Teacher-forced metrics do not depend on batch size or padding: each against padded batches of a plain model.

The scores of `evaluate` itself are held to the same in test_evaluate.py, whose slow reference is used here.
"""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mech_unlearn.metrics.forms import FORMS, by_form
from mech_unlearn.metrics.memorization import (
    IGNORED,
    answer_loss,
    answer_probability,
    exact_memorization,
    extraction_strength,
)
from mech_unlearn.metrics.multiple_choice import (
    ChoiceQuestion,
    choice_by_letter,
    choice_by_option_text,
    lettered_prompt,
)
from mech_unlearn.model.load import load
from tests.metrics.test_evaluate import padded
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer

NEAR = dict(rtol=1e-6, atol=1e-6)
FACTS = tiny_facts(["Anna Lee", "Ben Hill", "Gina"])
OTHERS = tiny_facts(["Cara Moss", "Dan Park", "Eva Reed"])
QUESTIONS = (
    ChoiceQuestion(question="Anna Lee was born in ?", options=("Paris", "Rome", "Oslo", "Bern"), right=0),
    ChoiceQuestion(question="Ben works for ?", options=("the sea", "Acme and Globex"), right=1),
    ChoiceQuestion(question="The employer of Cara Moss is ?", options=("Acme", "rain", "Rivers run"), right=2),
)


@cache
def model(architecture):
    return load(tiny_hf(architecture), tokenizer=tiny_tokenizer())


def forms_of(fact):
    """(Prompt, answer) in each form that has the fact's own wording."""
    options = sorted((fact.object, *fact.distractors))
    listed = ", ".join(f"{letter}: {option}" for letter, option in zip("ABCD", options, strict=False))
    main = fact.prompt.replace("{}", fact.subject)
    return {
        "prompt": (main, fact.object),
        "question": (f"Question: what is the {fact.relation} of {fact.subject}? Answer:", fact.object),
        "multiple_choice": (f"{listed}. {main}, letter", "ABCD"[options.index(fact.object)]),
        "reversed": (f"{fact.object} is the {fact.relation} of", fact.subject),
        "heldout": (fact.heldout[0].replace("{}", fact.subject), fact.object),
    }


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ("llama", "gpt2"))
@pytest.mark.parametrize("side", ("left", "right"))
def test_each_form_scores_as_padded_batches_of_any_size_do_on_either_side(architecture, side):
    found = by_form(model(architecture), FACTS, OTHERS).forms
    for form in ("prompt", "question", "multiple_choice", "reversed", "heldout"):
        rows = [forms_of(fact)[form] for fact in FACTS]
        for size in (1, 4, len(rows)):
            loss, memorized, _ = padded(architecture, rows, size, side)
            torch.testing.assert_close(found[form].probability.values, (-loss).exp().double(), **NEAR)
            torch.testing.assert_close(found[form].token_accuracy.values.double(), memorized.double(), **NEAR)
            assert torch.equal(found[form].recall.values, (memorized == 1).double())


def test_what_a_form_says_of_a_fact_does_not_depend_on_the_facts_asked_with_it():
    together = by_form(model("gemma2"), FACTS, OTHERS).forms
    for i, fact in enumerate(FACTS):
        alone = by_form(model("gemma2"), [fact], (*OTHERS, *FACTS)).forms
        for form in FORMS:
            ours, own = together[form].probability.values[i : i + 1], alone[form].probability.values
            torch.testing.assert_close(ours, own, **NEAR)
            assert torch.equal(together[form].recall.values[i : i + 1], alone[form].recall.values)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ("llama", "gpt2"))
@pytest.mark.parametrize("side", ("left", "right"))
def test_both_variants_of_multiple_choice_score_as_padded_batches_of_any_size_do_on_either_side(architecture, side):
    letters = [(lettered_prompt(q), "ABCD"[i]) for q in QUESTIONS for i in range(len(q.options))]
    texts = [(f"{q.question}\nAnswer:", option) for q in QUESTIONS for option in q.options]
    for choose, rows in ((choice_by_letter, letters), (choice_by_option_text, texts)):
        table = choose(model(architecture), QUESTIONS).logprob
        for size in (1, 2, len(rows)):
            torch.testing.assert_close(table[~table.isnan()], -padded(architecture, rows, size, side)[0], **NEAR)
        for i, question in enumerate(QUESTIONS):
            alone = choose(model(architecture), [question])
            torch.testing.assert_close(table[i, : len(question.options)], alone.logprob[0], **NEAR)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 99),
)
def test_scores_of_given_logits_do_not_depend_on_padding_on_either_side_or_on_the_other_rows(shapes, left, right, seed):
    """Padding holds other logits, whose predictions must not count."""
    generator = torch.Generator().manual_seed(seed)
    width = max(prompt + answer for prompt, answer in shapes) + left + right
    logits = torch.randn(len(shapes), width, 7, generator=generator)
    labels = torch.full((len(shapes), width), IGNORED)
    rows = []
    for i, (prompt, answer) in enumerate(shapes):
        own = torch.randn(prompt + answer, 7, generator=generator)
        said = torch.randint(7, (answer,), generator=generator)
        said[::2] = own[prompt - 1 : -1].argmax(-1)[::2]
        at = left if i % 2 else width - right - prompt - answer
        logits[i, at : at + prompt + answer], labels[i, at + prompt : at + prompt + answer] = own, said
        rows.append((own[None], torch.cat([torch.full((prompt,), IGNORED), said])[None]))
    for score in (answer_loss, answer_probability, exact_memorization, extraction_strength):
        alone = torch.cat([score(*row) for row in rows])
        torch.testing.assert_close(score(logits, labels), alone, **NEAR)
