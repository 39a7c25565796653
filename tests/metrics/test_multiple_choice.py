"""Multiple choice: a plain model read by hand, letters against texts, ties, chance."""

import math

import pytest
import torch

from mech_unlearn.metrics.multiple_choice import (
    ChoiceQuestion,
    choice_by_letter,
    choice_by_option_text,
    choice_chance,
    lettered_prompt,
)
from tests.tiny import tiny_hf, tiny_tokenizer

QUESTIONS = (
    ChoiceQuestion(question="Anna Lee was born in ?", options=("Paris", "Rome", "Oslo", "Bern"), right=0, cluster="a"),
    ChoiceQuestion(question="Ben Hill works for ?", options=("the sea", "Acme and Globex"), right=1, cluster="b"),
    ChoiceQuestion(question="Cara Moss works for ?", options=("Acme", "rain", "Rivers run"), right=2, cluster="b"),
)


def logprob(prompt, answer):
    """Mean log-probability per token by a plain model."""
    tokenizer = tiny_tokenizer()
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(f"{prompt} {answer}")["input_ids"]])
    with torch.no_grad():
        table = tiny_hf("llama")(ids).logits[0].log_softmax(-1)
    return sum(table[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])) / (ids.shape[1] - start)


def test_letters_are_read_after_the_lettered_options(tiny_model):
    assert lettered_prompt(QUESTIONS[1]) == "Ben Hill works for ?\nA. the sea\nB. Acme and Globex\nAnswer:"
    assert lettered_prompt(QUESTIONS[1], "rain :").startswith("rain :\n\nBen")
    found = choice_by_letter(tiny_model, QUESTIONS)
    for i, q in enumerate(QUESTIONS):
        slow = [logprob(lettered_prompt(q), "ABCD"[o]) for o in range(len(q.options))]
        assert found.logprob[i, : len(slow)].tolist() == pytest.approx(slow, abs=1e-5)
        assert found.correct.values[i] == float(max(range(len(slow)), key=slow.__getitem__) == q.right)
    assert found.logprob[1, 2:].isnan().all()


def test_option_texts_are_read_without_listing_the_options(tiny_model):
    found = choice_by_option_text(tiny_model, QUESTIONS)
    for i, q in enumerate(QUESTIONS):
        slow = [logprob(f"{q.question}\nAnswer:", option) for option in q.options]
        assert found.logprob[i, : len(slow)].tolist() == pytest.approx(slow, abs=1e-5)
    letter = choice_by_letter(tiny_model, QUESTIONS).correct
    with pytest.raises(ValueError, match="two kinds"):
        found.correct.minus(letter)
    assert found.correct.mean().n == 3


def test_the_right_option_is_found_where_the_model_was_made_to_say_it(tiny_model):
    tokenizer = tiny_model.tokenizer
    says = tiny_model.held["lm_head.weight"][tokenizer.convert_tokens_to_ids("Oslo")]
    push = lambda x: x + 50 * says / says.norm()  # noqa: E731
    with tiny_model.hooks(("ln_final.hook_out", push)):
        for right, share in ((2, 1.0), (0, 0.0)):
            q = ChoiceQuestion(question="Anna Lee was born in ?", options=("Paris", "Rome", "Oslo"), right=right)
            assert choice_by_option_text(tiny_model, [q]).correct.mean().value == share


def test_options_in_a_tie_share_the_point(tiny_model):
    with tiny_model.hooks(("ln_final.hook_out", lambda x: x * 0)):  # every token is as likely as any other
        found = choice_by_letter(tiny_model, QUESTIONS)
    assert found.correct.values.tolist() == pytest.approx([1 / 4, 1 / 2, 1 / 3])
    assert found.logprob[0].tolist() == pytest.approx([-math.log(len(tiny_model.tokenizer))] * 4, rel=1e-5)
    guess = choice_chance(QUESTIONS)
    assert guess.value == pytest.approx((1 / 4 + 1 / 2 + 1 / 3) / 3) and guess.n == 3
    four = choice_chance(QUESTIONS[:1] * 5)
    assert (four.value, four.ci) == (0.25, (0.25, 0.25))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"options": ("Paris",)}, "2 to 26 options"),
        ({"options": tuple(map(str, range(27)))}, "2 to 26 options"),
        ({"options": ("Paris", "Paris")}, "stands twice"),
        ({"right": 2}, "right is 2, of 2 options"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        ChoiceQuestion(**({"question": "Anna ?", "options": ("Paris", "Rome"), "right": 0} | changes))


def test_no_questions_or_a_layout_without_a_slot_are_refused(tiny_model):
    with pytest.raises(ValueError, match="no questions"):
        choice_by_letter(tiny_model, ())
    with pytest.raises(ValueError, match="lacks"):
        choice_by_option_text(tiny_model, QUESTIONS, layout="Answer:")
