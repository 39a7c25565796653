"""AltPo: an alternative of the same kind takes the place of the forgotten answer."""

import random
from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.methods import AltPo
from mech_unlearn.methods.alt_po import alternative_rows
from mech_unlearn.metrics import recall
from mech_unlearn.training.rows import BatchScores, answer_rows
from mech_unlearn.training.schedule import Schedule
from tests.planted import FORGOTTEN, fresh_planted_model, planted_facts


def scores(logprob, tokens):
    n = len(logprob)
    return BatchScores(torch.tensor(logprob), torch.tensor(tokens), torch.zeros(n).bool(), torch.arange(n))


def test_the_losses_are_those_of_the_equations():
    now, before = scores([-1.0, -2.0, -5.0, -0.5], [1, 2, 2, 1]), scores([-0.5, -0.1, -6.0, -4.0], [1, 2, 2, 1])
    gains = torch.tensor([-5.0 + 6.0, -0.5 + 4.0]) - torch.tensor([-1.0 + 0.5, -2.0 + 0.1])
    wanted = -(2 / 0.3) * torch.log(1 / (1 + torch.exp(-0.3 * gains))).mean()
    torch.testing.assert_close(AltPo(beta=0.3)._loss(before)(now), wanted)
    negative = -(2 / 0.3) * torch.log(1 / (1 + torch.exp(0.3 * torch.tensor([-0.5, -1.9])))).mean()
    torch.testing.assert_close(AltPo(loss="npo", beta=0.3)._loss(before)(now), negative + (2.5 + 0.5) / 2)


def test_alternatives_share_the_prompts_and_are_the_facts_distractors_or_those_given(tiny_model, tiny_sets):
    facts, tokenizer = tiny_sets[0].facts, tiny_model.tokenizer
    rows = answer_rows(tokenizer, facts)
    drawn = alternative_rows(tokenizer, facts, {}, False, random.Random(0))
    assert [(ids[:start], start) for ids, start in drawn] == [(ids[:start], start) for ids, start in rows]
    words = [tokenizer.decode(ids[start:]) for ids, start in drawn]
    for i, word in enumerate(words):
        assert word in facts[i // 2].distractors and word != facts[i // 2].object
        assert word == words[i // 2 * 2]  # the same in all phrasings
    given = alternative_rows(tokenizer, facts, {facts[0].id: ("the sea",)}, False, random.Random(0))
    assert tokenizer.decode(given[0][0][given[0][1] :]) == "the sea"
    apart = alternative_rows(tokenizer, facts * 4, {}, True, random.Random(0))
    assert any(apart[i][0][-1] != apart[i + 1][0][-1] for i in range(0, len(apart), 2))


@pytest.mark.thorough
@pytest.mark.parametrize("loss", ("dpo", "npo"))
def test_the_model_says_the_alternative_instead_and_keeps_the_rest(loss):
    model, facts = fresh_planted_model(), planted_facts()
    forget, retain = ForgetSet(facts=facts[:FORGOTTEN]), RetainSet(neighbors=facts[FORGOTTEN:])
    told = {fact.id: (fact.distractors[0],) for fact in forget.facts}
    method = AltPo(schedule=Schedule(lr=1e-2, epochs=15, batch_size=8), loss=loss, alternatives=told)
    edit = method.fit(model, forget, retain)
    others = [replace(fact, object=told[fact.id][0], distractors=()) for fact in forget.facts]
    assert recall(model, others).value == 0.0 and recall(model, forget.facts).value == 1.0
    with edit.on(model):
        assert recall(model, others).value == 1.0 and recall(model, forget.facts).value == 0.0
        assert recall(model, retain.facts).value == 1.0


def test_what_cannot_be_an_alternative_is_refused(tiny_model, tiny_sets):
    fact = tiny_sets[0].facts[0]
    bare = ForgetSet(facts=(replace(fact, distractors=()),))
    for method, forget, message in (
        (AltPo(), bare, "has no distractors"),
        (AltPo(alternatives={fact.id: (fact.object,)}), tiny_sets[0], "is its answer"),
        (AltPo(alternatives={"nobody": ("Rome",)}), tiny_sets[0], "which is no fact"),
        (AltPo(beta=0.0), tiny_sets[0], "beta must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            method.fit(tiny_model, forget, tiny_sets[1])
