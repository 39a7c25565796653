"""Soft prompts: equal to tokens where they are tokens, trained without moving a weight, scored on untaught facts."""

import pytest
import torch

from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import embeddings, make_queries
from mech_unlearn.restoration import Case
from mech_unlearn.restoration.engine.lessons import lessons
from mech_unlearn.restoration.engine.levels import QuerySet, make_query_set
from mech_unlearn.restoration.prompts import soft_prompt
from tests.planted import planted_case, planted_model
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer


def people_case():
    models = [load(tiny_hf("llama", seed=s), tokenizer=tiny_tokenizer()) for s in (0, 1, 2)]
    return Case(full=models[0], retrained=tuple(models[1:]), facts=tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss"]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_of_token_embeddings_scores_as_these_tokens_do(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    facts = tiny_facts(["Anna Lee", "Ben Hill"])
    query_set = QuerySet(facts, make_queries(model.tokenizer, facts, "prompt"), 0)
    ids = [40, 41, 42]
    tokens = QuerySet(facts, tuple(soft_prompt.prefixed(model, q, ids) for q in query_set.queries), 0).margins(model)
    soft = soft_prompt.margins(model, query_set, embeddings(model, [ids])[0])
    torch.testing.assert_close(soft, tokens, atol=1e-4, rtol=1e-4)
    assert (soft - query_set.margins(model)).abs().max() > 1e-3


def test_a_prefix_goes_behind_the_bos_and_moves_the_subject():
    model = planted_model()
    query = make_query_set(planted_case(sae=None), "test").queries[0]
    moved = soft_prompt.prefixed(model, query, [7, 8])
    assert moved.prompt == (2, 7, 8, *query.prompt[1:])
    assert moved.prompt[slice(*moved.span)] == query.prompt[slice(*query.span)]


@pytest.mark.slow
def test_training_lowers_the_loss_on_the_lessons_and_leaves_weights_gradients_and_random_state_alone():
    case = people_case()
    model, query_set = case.full, make_query_set(case, "select")
    weights, state = {name: w.clone() for name, w in model.held.items()}, torch.get_rng_state()
    first, last = soft_prompt.train(model, lessons(case, case.facts), 4, (1, 40), 0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(w, model.held[name]) and model.held[name].grad is None for name, w in weights.items())
    assert (
        soft_prompt.margins(model, query_set, last).mean() > soft_prompt.margins(model, query_set, first).mean() + 0.1
    )
    again = soft_prompt.train(model, lessons(case, case.facts), 4, (1, 40), 0)[1]
    other = soft_prompt.train(model, lessons(case, case.facts), 4, (1, 40), 1)[1]
    assert torch.equal(again, last) and not torch.equal(other, last)


def test_the_taught_facts_are_not_the_scored_ones_and_wrong_lessons_hold_wrong_answers():
    case = people_case()
    ready = soft_prompt.prepare(case, length=2, steps=(1,))
    for fold, (right, wrong) in enumerate(zip(ready.lessons, ready.wrong)):
        mine = [fact for fact, f in zip(case.facts, ready.folds) if f == fold]
        scored = {row for row, _ in lessons(case, mine)}
        assert right and not {row for row, _ in right} & scored
        assert all(a[:n] == b[:n] and a != b for (a, n), (b, _) in zip(right, wrong))


@pytest.mark.slow
def test_random_models_and_a_retrained_one_get_nothing_beyond_what_is_injected():
    case = planted_case(sae=None)
    ready = soft_prompt.prepare(case, length=2, steps=(2, 6))
    for truth in ("full", "late", "early"):
        found = soft_prompt.audit(case, ready, planted_model(truth), truth)
        assert (found.recoverability < 0.1).all()  # no attention: a prompt cannot reach the answer
    retrained = soft_prompt.audit(case, ready, case.retrained[0], "R")
    assert (retrained.recoverability < 0.1).all() and retrained.null.shape == (3, 4)
    assert set(retrained.columns) >= {"sham_taught", "random_string"}
    assert retrained.curve_axes["rho"] == (2.0, 6.0)


def test_a_longer_prompt_writes_a_random_string_better():
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    trained, untrained = (soft_prompt.random_string(model, 8, steps, 0) for steps in (60, 1))
    assert trained > untrained + 0.2


def test_without_retrained_models_the_grade_is_b():
    case = planted_case(sae=None, retrained=())
    found = soft_prompt.audit(case, soft_prompt.prepare(case, length=2, steps=(2,)), planted_model("late"), "late")
    assert found.grade == "B" and (found.recoverability < 0.1).all()


def test_a_prompt_without_length_or_steps_is_refused():
    for wrong in (dict(length=0), dict(steps=()), dict(steps=(5, 2))):
        with pytest.raises(ValueError, match="soft prompt needs"):
            soft_prompt.prepare(planted_case(sae=None), **wrong)


def test_a_fact_is_scored_behind_the_prompt_that_its_own_fold_did_not_train():
    case = people_case()
    ready = soft_prompt.prepare(case, length=2, steps=(3,))
    found = soft_prompt.audit(case, ready, case.full, "full")
    for fold, rows in enumerate(ready.lessons):
        mine = [f == fold for f in ready.folds]
        (prompt,) = soft_prompt.train(case.full, rows, 2, (3,), case.seed + fold)
        want = soft_prompt.margins(case.full, ready.levels.query_set.part(mine), prompt)[0]
        assert torch.equal(found.score_raw[torch.tensor(mine)], want)
