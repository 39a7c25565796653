"""Causal tracing against a plain one-at-a-time reference, and its two ends: everything restored, nothing restored."""

import zlib

import pytest
import torch

from mech_unlearn.core import Fact, Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.locate.patching.causal_trace import (
    causal_trace,
    causal_trace_per_fact,
    causal_trace_tokens,
    subject_sigma,
    window_layers,
)
from mech_unlearn.locate.patching.token_classes import CLASSES, token_classes
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import make_queries, make_query
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer

FACTS = (*tiny_facts(["Anna Lee", "Ben Hill"]), *tiny_facts(["Gina"], ["works"]))
SAMPLES, SIGMA = 3, 0.4


def in_class(query, position):
    return next((c for c, places in token_classes(query).items() if position in places), None)


def noise_of(query, d_model, seed=0):
    a, b = query.span
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {query.fact.id}".encode()))
    return 3 * SIGMA * torch.randn(SAMPLES, b - a, d_model, generator=generator)


@torch.no_grad()
def probability(model, query, rows, writes):
    """Geometric mean over the answer tokens, mean over rows; plain forward passes of the whole row."""
    ids = torch.tensor([query.full[:-1]] * rows)
    with model.hooks(*writes):
        logprob = model.logits(ids).log_softmax(-1)
    start = len(query.prompt) - 1
    terms = [logprob[:, start + t, token] for t, token in enumerate(query.answers[0])]
    return torch.stack(terms).mean(0).exp().mean().item()


@torch.no_grad()
def reference(model, fact, kind, width):
    """Clean probability, corrupted probability and effects [place, layer], one restoration at a time."""
    query = make_query(model.tokenizer, fact, fact.prompt)
    a, b = query.span
    clean = {}
    reads = [
        (Site(layer, kind), lambda x, i=layer: clean.__setitem__(i, x[0].clone())) for layer in range(model.n_layers)
    ]
    p_clean = probability(model, query, 1, reads)
    noise = noise_of(query, model.d_model)

    def corrupt(x):
        x = x.clone()
        x[:, a:b] += noise
        return x

    def put(layer, place):
        def write(x):
            x = x.clone()
            x[:, place] = clean[layer][place]
            return x

        return Site(layer, kind), write

    embed = ("hook_embed", corrupt)
    p_corrupted = probability(model, query, SAMPLES, [embed])
    effects = torch.zeros(len(query.prompt), model.n_layers)
    for place in range(len(query.prompt)):
        for layer in range(model.n_layers):
            window = range(max(0, layer - width // 2), min(model.n_layers, layer - (-width // 2)))
            writes = [embed, *(put(i, place) for i in window)]
            effects[place, layer] = probability(model, query, SAMPLES, writes) - p_corrupted
    return p_clean, p_corrupted, effects


CASES = [("gpt_neox", "resid_post", 1), ("gemma2", "attn_out", 2), *((a, "mlp_out", 3) for a in ARCHITECTURES)]


@pytest.mark.thorough
@pytest.mark.parametrize(("architecture", "kind", "width"), CASES)
def test_the_batched_sweep_equals_restoring_one_state_at_a_time(architecture, kind, width):
    model = load(tiny_hf(architecture, layers=3), tokenizer=tiny_tokenizer())
    fact = FACTS[0]
    ours = causal_trace_tokens(model, fact, kind=kind, window=width, samples=SAMPLES, sigma=SIGMA)
    _, _, effects = reference(model, fact, kind, width)
    torch.testing.assert_close(ours.values, effects, atol=2e-6, rtol=1e-4)
    assert effects.abs().max() > 1e-4


def test_facts_in_one_batch_equal_facts_alone_and_classes_are_means_of_their_tokens(tiny_model):
    table = causal_trace_per_fact(tiny_model, FACTS, samples=SAMPLES, sigma=SIGMA)
    small = causal_trace_per_fact(tiny_model, FACTS, samples=SAMPLES, sigma=SIGMA, max_tokens=200)
    torch.testing.assert_close(table.values, small.values, atol=1e-6, rtol=1e-4, equal_nan=True)
    for i in (1, 4):
        query = make_query(tiny_model.tokenizer, FACTS[i], FACTS[i].prompt)
        p_clean, p_corrupted, effects = reference(tiny_model, FACTS[i], "resid_post", 1)
        for c, name in enumerate(CLASSES):
            places = token_classes(query)[name]
            if places:
                expected = effects[places].mean(0)
                torch.testing.assert_close(table.values[i, c], expected, atol=2e-6, rtol=1e-4)
            else:
                assert table.values[i, c].isnan().all()
        # Behind the last layer only the last prompt token is read: restoring it there gives everything back.
        assert table.values[i, -1, -1].item() == pytest.approx(p_clean - p_corrupted, abs=2e-6)


def test_answers_of_several_tokens_are_scored_by_their_geometric_mean(tiny_model):
    fact = Fact(id="x", subject="Anna Lee", relation="born", object="West Oslo", prompt="{} was born in")
    ours = causal_trace_tokens(tiny_model, fact, samples=SAMPLES, sigma=SIGMA)
    assert len(make_query(tiny_model.tokenizer, fact, fact.prompt).answers[0]) == 2
    torch.testing.assert_close(ours.values, reference(tiny_model, fact, "resid_post", 1)[2], atol=2e-6, rtol=1e-4)


def test_windows_are_those_of_the_papers_code_and_cut_off_at_the_ends():
    assert [list(window_layers(c, 10, 48)) for c in (2, 24, 47)] == [
        list(range(0, 7)),
        list(range(19, 29)),
        list(range(42, 48)),
    ]
    assert [list(window_layers(c, 1, 4)) for c in range(4)] == [[0], [1], [2], [3]]


def test_restoring_all_that_was_corrupted_gives_the_clean_run_and_restoring_nothing_corrupted_the_corrupted_one(
    tiny_model,
):
    # The subject is one token and ends the prompt: it is all that was corrupted, and all that the answer is read from.
    fact = Fact(id="end", subject="Gina", relation="works", object="Acme", prompt="The employer of {}")
    ours = causal_trace_tokens(tiny_model, fact, samples=SAMPLES, sigma=SIGMA)
    p_clean, p_corrupted, _ = reference(tiny_model, fact, "resid_post", 1)
    assert abs(p_clean - p_corrupted) > 1e-4
    torch.testing.assert_close(ours.values[-1], torch.full((4,), p_clean - p_corrupted), atol=1e-6, rtol=1e-5)
    assert ours.values[:-1].abs().max() < 1e-6
    assert f"P clean {p_clean:.3f}, corrupted {p_corrupted:.3f}" in ours.note


def test_token_classes_split_the_prompt_from_the_subject_on():
    tokenizer = tiny_tokenizer()
    fact = Fact(
        id="z", subject="Anna Lee Hill", relation="r", object="Rome", prompt="The birthplace of {} was in the hills of"
    )
    query = make_query(tokenizer, fact, fact.prompt)
    assert list(token_classes(query).values()) == [[4], [5], [6], [7], [8, 9, 10], [11]]
    ends = make_query(tokenizer, fact, "The birthplace of {}")
    assert token_classes(ends)["last subject"] == [6]
    assert token_classes(ends)["last prompt"] == token_classes(ends)["first after"] == []


def test_sigma_is_the_spread_of_the_subjects_embeddings(tiny_model):
    queries = make_queries(tiny_model.tokenizer, FACTS, "prompt")
    names = {q.prompt[slice(*q.span)] for q in queries}
    rows = tiny_model.held["model.embed_tokens.weight"][torch.tensor([t for name in names for t in name])]
    assert subject_sigma(tiny_model, queries) == pytest.approx(rows.std(unbiased=False).item(), rel=1e-5)


def test_the_average_says_how_many_facts_and_groups_it_rests_on_and_bounds_itself(tiny_model):
    result = causal_trace(tiny_model, FACTS[:4], kind="mlp_out", samples=2)
    per_fact = causal_trace_per_fact(tiny_model, FACTS[:4], kind="mlp_out", samples=2)
    assert (
        result.axes == ("token", "layer") and result.n == 4 and "2 groups" in result.note and "sigma" not in result.unit
    )
    torch.testing.assert_close(result.values, per_fact.values.nanmean(0), equal_nan=True)
    known = ~result.values.isnan()
    assert (result.low[known] <= result.values[known]).all() and (result.values[known] <= result.high[known]).all()
    (at, value), *_ = result.top(1)
    assert value == result.values.nan_to_num(-9).max() and set(at) == {"token", "layer"}


def test_the_same_seed_gives_the_same_trace_and_leaves_the_callers_random_state(tiny_model):
    state = torch.get_rng_state()
    first, second = (causal_trace_per_fact(tiny_model, FACTS[:2], samples=2, seed=7).values for _ in range(2))
    other = causal_trace_per_fact(tiny_model, FACTS[:2], samples=2, seed=8).values
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.nan_to_num(), second.nan_to_num()) and not torch.equal(
        first.nan_to_num(), other.nan_to_num()
    )


def test_bad_settings_and_activation_edits_in_force_are_refused(tiny_model):
    with pytest.raises(ValueError, match="no facts"):
        causal_trace(tiny_model, [])
    with pytest.raises(ValueError, match="choose resid_post"):
        causal_trace(tiny_model, FACTS, kind="resid_pre")
    with pytest.raises(ValueError, match="positive"):
        causal_trace(tiny_model, FACTS, samples=0)
    query = make_query(tiny_model.tokenizer, FACTS[0], FACTS[0].prompt)
    shift = Shift(Site(1, "resid_post"), (query.prompt[slice(*query.span)],), torch.ones(1, 32))
    edit = Edit(name="x", base=tiny_model.hash(), interventions=(shift,))
    with edit.on(tiny_model):
        with pytest.raises(ValueError, match="activation interventions"):
            causal_trace(tiny_model, FACTS)
        tiny_model.logits(torch.tensor([query.prompt]))
