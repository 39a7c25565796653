"""Scores equal a plain sequence-by-sequence reference and do not depend on how rows are batched."""

import pytest
import torch

from mech_unlearn.core import Fact, Site
from mech_unlearn.edit.edit import Edit, Shift, clone
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import Scores, end_tokens, greedy, per_fact, score, score_each
from mech_unlearn.model.tokens import make_queries, pad
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer

LONG = Fact(
    id="long", subject="Cara Moss", relation="born", object="West Oslo", prompt="{} was born in",
    paraphrases=("The birthplace of Rivers and {} is",), distractors=("Rome", "Vale Bern Paris"),
)  # fmt: skip
FACTS = (*tiny_facts(["Anna Lee", "Ben Hill"]), LONG)


@torch.no_grad()
def reference(model, query):
    """Log-probability per answer token and greedy agreement, one forward pass per candidate, whole rows."""
    rows, exact = [], None
    for answer in query.answers:
        logits = model.logits(torch.tensor([query.prompt + answer]))[0].log_softmax(-1)
        start = len(query.prompt) - 1
        terms = [logits[start + t, token].item() for t, token in enumerate(answer)]
        rows.append(sum(terms) / len(terms))
        if exact is None:
            exact = all(logits[start + t].argmax() == token for t, token in enumerate(answer))
    return rows, exact


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", (*ARCHITECTURES, "opt"))
def test_scores_equal_one_pass_per_candidate_and_do_not_depend_on_the_batch(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    queries = make_queries(model.tokenizer, FACTS)
    scores, small = score(model, queries), score(model, queries, max_tokens=1)
    torch.testing.assert_close(scores.logprob, small.logprob, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert torch.equal(scores.exact, small.exact)
    for i, query in enumerate(queries):
        rows, exact = reference(model, query)
        torch.testing.assert_close(scores.logprob[i, : len(rows)], torch.tensor(rows), atol=1e-5, rtol=1e-5)
        assert scores.logprob[i, len(rows) :].isnan().all() and bool(scores.exact[i]) == bool(exact)


def test_an_answer_is_exact_if_and_only_if_greedy_decoding_gives_it(tiny_model):
    facts = []
    for i, base in enumerate(FACTS):
        (query,) = make_queries(tiny_model.tokenizer, [base], "prompt")
        (said,) = greedy(tiny_model, [query.prompt], 2)
        text = tiny_model.tokenizer.decode(list(said))
        if i % 2 == 0 and tiny_model.tokenizer(f"x {text}")["input_ids"][-len(said) :] == list(said):
            facts.append(Fact(id=str(i), subject=base.subject, relation="r", object=text, prompt=base.prompt))
        else:
            facts.append(base)
    queries = make_queries(tiny_model.tokenizer, facts, "prompt")
    exact = score(tiny_model, queries).exact.tolist()
    decoded = [greedy(tiny_model, [q.prompt], len(q.answers[0]))[0] == q.answers[0] for q in queries]
    assert exact == decoded
    assert True in exact and False in exact


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_greedy_decoding_is_that_of_transformers(architecture, tiny_folder):
    from transformers import AutoModelForCausalLM

    model = load(tiny_folder(architecture))
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder(architecture), attn_implementation="eager").eval()
    prompts = [(2, 9, 10, 11), (2, 13, 14), (2, 15, 16, 17)]
    for prompt, ours in zip(prompts, greedy(model, prompts, 6), strict=True):
        ids = torch.tensor([prompt])
        theirs = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        expected = [t for t in theirs[0, len(prompt) :].tolist() if t not in (0, 3)]
        assert list(ours) == expected


def test_greedy_text_ends_at_every_token_that_the_generation_settings_name_also_in_a_clone(tiny_model):
    prompts = [(2, 9, 10, 11), (2, 13, 14), (2, 15, 16, 17)]
    said = greedy(tiny_model, prompts, 8)
    end = said[0][2]
    assert end_tokens(tiny_model) == (3,) and len(said[0]) > 2
    for named, ends in ((end, (3, end)), ([3, end], (3, end)), (None, (3,))):
        tiny_model.hf.generation_config.eos_token_id = named
        cut = [tokens[: tokens.index(end)] if end in tokens and named else tokens for tokens in said]
        assert end_tokens(tiny_model) == ends and greedy(tiny_model, prompts, 8) == cut
        with clone(tiny_model) as other:
            assert greedy(other, prompts, 8) == cut


def test_a_write_sees_the_rows_it_is_given_and_changes_only_them(tiny_model):
    queries = make_queries(tiny_model.tokenizer, FACTS)
    before = score(tiny_model, queries)
    seen = []

    def write(x, batch):
        assert x.shape[:2] == batch.ids.shape
        for i, q in enumerate(batch.query.tolist()):
            a, b = batch.span[i].tolist()
            assert tuple(batch.ids[i, a:b].tolist()) == queries[q].prompt[slice(*queries[q].span)]
            assert tuple(batch.ids[i, : batch.end[i] + 1].tolist()) == queries[q].prompt
            seen.append(q)
        x = x.clone()
        rows = (batch.query == 1).nonzero()[:, 0]
        x[rows, batch.end[rows]] = 0
        return x

    after = score(tiny_model, queries, {Site(2, "resid_post"): write})
    same = [i for i in range(len(queries)) if i != 1]
    assert set(seen) == set(range(len(queries)))
    torch.testing.assert_close(after.logprob[same], before.logprob[same], atol=1e-6, rtol=1e-6, equal_nan=True)
    assert (after.logprob[1] - before.logprob[1]).nan_to_num().abs().max() > 1e-3
    with pytest.raises(KeyError, match="no hook"):
        score(tiny_model, queries, {"blocks.0.hook_resid_pots": write})


def test_margin_and_choice_have_their_closed_forms_and_ties_are_shared():
    nan = float("nan")
    logprob = torch.tensor(
        [[-1.0, -1.0, -3.0], [-2.0, -1.0, nan], [-1.0, nan, nan], [-0.5, -1.0, -1.5], [-1.0, -1.0, -1.0]]
    )
    scores = Scores(logprob, torch.zeros(5, dtype=torch.bool))
    torch.testing.assert_close(scores.choice, torch.tensor([0.5, 0.0, 1.0, 1.0, 1 / 3]))
    wrong = [
        (torch.exp(torch.tensor(w)).mean().log()).item() for w in ([-1.0, -3.0], [-1.0], [-1.0, -1.5], [-1.0, -1.0])
    ]
    expected = torch.tensor([-1 - wrong[0], -2 - wrong[1], -1.0, -0.5 - wrong[2], -1 - wrong[3]])
    torch.testing.assert_close(scores.margin, expected)


def test_scores_per_fact_are_means_over_its_phrasings(tiny_model):
    queries = make_queries(tiny_model.tokenizer, FACTS)
    scores = score(tiny_model, queries)
    result = per_fact(scores, queries, FACTS)
    for i, fact in enumerate(FACTS):
        mine = [j for j, q in enumerate(queries) if q.fact is fact]
        assert result.logprob[i].item() == pytest.approx(scores.logprob[mine, 0].mean().item(), abs=1e-6)
        assert result.recall[i].item() == pytest.approx(scores.exact[mine].float().mean().item())
        assert result.margin[i].item() == pytest.approx(scores.margin[mine].mean().item(), abs=1e-5)
    mine = [j for j, q in enumerate(queries) if q.fact is not LONG]
    partial = Scores(scores.logprob[mine], scores.exact[mine])
    with pytest.raises(ValueError, match="fact 'long' has no prompt"):
        per_fact(partial, [queries[j] for j in mine], FACTS)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", (*ARCHITECTURES, "opt"))
def test_arms_scored_together_are_those_scored_one_by_one(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    queries = make_queries(model.tokenizer, tiny_facts(["Anna Lee", "Ben Hill", "Gina"]))

    def arm(layer, scale):
        def write(x, batch):
            x = x.clone()
            x[torch.arange(len(x)), batch.span[:, 1] - 1] *= scale
            return x

        return {Site(layer, "resid_post"): write}

    arms = [arm(0, 3.0), arm(2, -1.0), arm(3, 0.5), {**arm(1, 2.0), **arm(2, 0.0)}]
    together = score_each(model, queries, arms, max_tokens=120)
    plain = score(model, queries)
    for one, found in zip(arms, together, strict=True):
        alone = score(model, queries, one)
        torch.testing.assert_close(found.logprob, alone.logprob, atol=3e-5, rtol=1e-5, equal_nan=True)
        assert torch.equal(found.exact, alone.exact)
    assert (together[0].logprob - plain.logprob).nan_to_num().abs().max() > 1e-2


def test_arms_see_the_interventions_of_an_edit_in_force(tiny_model):
    queries = make_queries(tiny_model.tokenizer, tiny_facts(["Anna Lee", "Ben Hill"]))
    shift = Shift(Site(1, "resid_post"), (queries[0].prompt[slice(*queries[0].span)],), torch.ones(1, 32))
    arms = [{Site(0, "resid_post"): lambda x, batch: x * 1.5}, {Site(2, "resid_post"): lambda x, batch: x * 0.5}]
    with Edit(name="s", base="", interventions=(shift,)).on(tiny_model):
        together = score_each(tiny_model, queries, arms)
        for one, found in zip(arms, together, strict=True):
            torch.testing.assert_close(found.logprob, score(tiny_model, queries, one).logprob, equal_nan=True)
    without = score_each(tiny_model, queries, arms)
    assert (together[0].logprob - without[0].logprob).nan_to_num().abs().max() > 1e-3


PROMPTS = ((2, 9, 10, 11), (2, 13, 14), (2, *range(5, 17)), (2, 20, 21, 22), (2, 15))


@torch.no_grad()
def padded_greedy(architecture, side, steps):
    """Greedy decoding by a plain model without a cache, all rows padded into one batch; ends behind </s>."""
    hf, rows = tiny_hf(architecture), [list(prompt) for prompt in PROMPTS]
    for _ in range(steps):
        ids, real, _ = pad(rows, 0, side)
        places = (real.cumsum(1) - 1).clamp(min=0)
        logits = hf(ids, attention_mask=real, position_ids=places).logits
        last = [ids.shape[1] - 1 if side == "left" else len(row) - 1 for row in rows]
        rows = [[*row, int(logits[i, at].argmax())] for i, (row, at) in enumerate(zip(rows, last, strict=True))]
    said = [row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)]
    return [tuple(tokens[: tokens.index(3)] if 3 in tokens else tokens) for tokens in said]


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", (*ARCHITECTURES, "opt"))
def test_greedy_text_is_the_same_with_a_cache_without_one_in_any_batch_and_padded_on_either_side(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    cached = greedy(model, PROMPTS, 12)
    lengths = []
    with model.hooks(("blocks.0.hook_resid_post", lambda x: lengths.append(x.shape[1]))):
        assert greedy(model, PROMPTS, 12) == cached
    assert lengths[:12] == list(range(2, 14))  # whole rows at each step
    assert greedy(model, PROMPTS, 12, max_tokens=1) == cached
    for side in ("left", "right"):
        assert padded_greedy(architecture, side, 12) == cached
    assert any(len(set(tokens)) > 2 for tokens in cached)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", (*ARCHITECTURES, "opt"))
@torch.no_grad()
def test_greedy_text_under_an_intervention_at_earlier_positions_is_that_of_whole_rows(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    plain = greedy(model, PROMPTS, 8)
    push = torch.randn(1, 32, generator=torch.Generator().manual_seed(1)) * 4

    def by_length(x):  # what it does to the first positions depends on how long the row is
        x = x.clone()
        x[:, :2] += push * (x.shape[1] % 3 - 1)
        return x

    def whole(steps):
        out = []
        for prompt in PROMPTS:
            row = list(prompt)
            for _ in range(steps):
                row.append(int(model.logits(torch.tensor([row]))[0, -1].argmax()))
            said = row[len(prompt) :]
            out.append(tuple(said[: said.index(3)] if 3 in said else said))
        return out

    shift = Shift(Site(1, "resid_post"), tuple((t,) for t in range(4, 30)), push.expand(26, -1))
    for force in (
        model.hooks((Site(1, "resid_post"), by_length)),
        Edit(name="s", base="", interventions=(shift,)).on(model),
    ):
        with force:
            found, expected = greedy(model, PROMPTS, 8), whole(8)
        assert found == expected != plain
    assert greedy(model, PROMPTS, 8) == plain
