"""TokenGuard: answers are not produced behind their subjects; no state changes, nor any other prompt's logits."""

import pytest
import torch

from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.methods import TokenGuard
from mech_unlearn.metrics.recall import recall
from mech_unlearn.model.capture import capture
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import greedy, score, score_each
from mech_unlearn.model.tokens import make_queries, pad
from tests.planted import FORGOTTEN, fresh_planted_model, planted_facts
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

FORGET = ForgetSet(facts=planted_facts()[:FORGOTTEN])
KEPT = planted_facts()[FORGOTTEN:]


def test_the_answer_is_not_produced_and_other_facts_are():
    model = fresh_planted_model()
    edit = TokenGuard().fit(model, FORGET, RetainSet())
    (query, *_) = make_queries(model.tokenizer, FORGET.facts, "prompt")
    assert (recall(model, FORGET.facts).value, recall(model, KEPT).value) == (1, 1)
    assert greedy(model, [query.prompt], 1) == [query.answers[0]]
    with edit.on(model):
        assert (recall(model, FORGET.facts).value, recall(model, FORGET.facts, "heldout").value) == (0, 0)
        assert recall(model, KEPT).value == 1
        assert query.answers[0][0] not in greedy(model, [query.prompt], 6)[0]
        assert score(model, [query]).logprob[0, 0] < -1e3
        (arm,) = score_each(model, [query], [{Site(0, "resid_pre"): lambda x, b: x}])
        assert arm.logprob[0, 0] < -1e3  # with writes, too, logits are read behind the guard


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_and_other_prompts_stay_bit_identical_and_logits_stay_finite(architecture, dtype, tiny_sets):
    model = load(tiny_hf(architecture).to(dtype), tokenizer=tiny_tokenizer())
    edit = TokenGuard().fit(model, *tiny_sets)
    queries = make_queries(model.tokenizer, (*tiny_sets[0].facts, *tiny_sets[1].facts), "prompt")
    sites = [Site(layer, "resid_post") for layer in range(4)]
    rows = [query.prompt for query in queries]
    before = capture(model, rows, sites)
    clean = [model.logits(torch.tensor([row])) for row in rows]
    with edit.on(model):
        after = capture(model, rows, sites)
        guarded = [model.logits(torch.tensor([row])) for row in rows]
    assert all(torch.equal(before[site], after[site]) for site in sites)
    forgotten = {fact.subject for fact in tiny_sets[0].facts}
    for query, a, b in zip(queries, clean, guarded, strict=True):
        assert torch.isfinite(b).all()
        changed = (a != b)[0]
        if query.fact.subject not in forgotten:
            assert not changed.any()
            continue
        end = query.span[1] - 1  # nothing in front of the subject's last token changes
        banned = {q.answers[0][0] for q in queries if q.fact.subject == query.fact.subject}
        assert changed.any(-1).tolist() == [pos >= end for pos in range(len(query.prompt))]
        assert set(changed.any(0).nonzero().flatten().tolist()) == banned


@pytest.mark.parametrize("side", ("left", "right"))
def test_it_finds_subjects_in_a_padded_batch(tiny_model, tiny_sets, side):
    edit = TokenGuard().fit(tiny_model, *tiny_sets)
    queries = make_queries(tiny_model.tokenizer, tiny_sets[0].facts[:1])
    ids, mask, shifts = pad([query.prompt for query in queries], 0, side)
    clean = tiny_model.logits(ids, mask)
    with edit.on(tiny_model):
        changed = (tiny_model.logits(ids, mask) != clean).any(-1)
    for row, (query, shift) in enumerate(zip(queries, shifts.tolist(), strict=True)):
        assert changed[row].nonzero()[0].item() == shift + query.span[1] - 1


def test_all_tokens_of_an_answer_or_its_first_are_banned(tiny_model, tiny_sets):
    fact = type(tiny_sets[0].facts[0])(**{**vars(tiny_sets[0].facts[0]), "object": "Paris hills", "distractors": ()})
    (query, *_) = make_queries(tiny_model.tokenizer, [fact])
    for tokens, banned in (("all", set(query.answers[0])), ("first", {query.answers[0][0]})):
        (ban,) = TokenGuard(tokens=tokens).fit(tiny_model, ForgetSet(facts=(fact,)), RetainSet()).interventions
        assert set(ban.tokens[0]) == banned


def test_a_cached_generation_is_refused_since_later_steps_do_not_see_the_subject(tiny_model, tiny_sets):
    with (
        TokenGuard().fit(tiny_model, *tiny_sets).on(tiny_model),
        pytest.raises(ValueError, match="model.scores.greedy"),
    ):
        tiny_model.hf.generate(torch.tensor([[2, 5, 6]]), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("penalty", (0.0, float("inf"), 1e6))
def test_a_penalty_that_float16_cannot_hold_is_refused(tiny_model, tiny_sets, penalty):
    with pytest.raises(ValueError, match="below 65504"):
        TokenGuard(penalty=penalty).fit(tiny_model, *tiny_sets)
