"""Activation and attribution patching against plain hooks, against each other, and on the shipped worlds."""

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.locate.patching.activation_patching import (
    CLASSES_AND_SPAN,
    activation_patching,
    activation_patching_per_fact,
    interchange,
)
from mech_unlearn.locate.patching.attribution_patching import agreement, attribution_patching_per_fact
from mech_unlearn.locate.patching.pairs import class_places, make_pairs
from mech_unlearn.model.load import load
from mech_unlearn.testbed import open_world
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer

FACTS = (*tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss"]), *tiny_facts(["Gina", "Hugo"], ["works"]))
TWO = (FACTS[0], FACTS[2])
CASES = [(a, "denoise", "attn_out") for a in ARCHITECTURES]
CASES += [("llama", "denoise", kind) for kind in ("resid_pre", "resid_mid", "resid_post", "mlp_out", "mlp_post")]
CASES += [("gpt2", "noise", "resid_post")]


@torch.no_grad()
def plain(model, pair, direction, kind, layer, places, head=None):
    """Log-probability of the fact's answer after one patch, from whole forward passes with hooks."""
    own, other = (torch.tensor([query.full[:-1]]) for query in (pair.own, pair.other))
    base, source = (other, own) if direction == "denoise" else (own, other)
    kept = []
    with model.hooks((Site(layer, kind), lambda x: kept.append(x))):
        model.logits(source)

    def write(x):
        x = x.clone()
        if head is None:
            x[:, places] = kept[0][:, places]
        else:
            x[:, places, head] = kept[0][:, places, head]
        return x

    with model.hooks((Site(layer, kind), write)):
        logprob = model.logits(base).log_softmax(-1)[0]
    start = len(pair.own.prompt) - 1
    return torch.stack([logprob[start + t, token] for t, token in enumerate(pair.own.answers[0])]).mean()


@pytest.mark.thorough
@pytest.mark.parametrize(("architecture", "direction", "kind"), CASES)
def test_every_effect_equals_one_patch_by_plain_hooks(architecture, direction, kind):
    model = load(tiny_hf(architecture, layers=3), tokenizer=tiny_tokenizer())
    facts = FACTS[:3]
    ours = activation_patching_per_fact(model, facts, kind=kind, direction=direction)
    for i, pair in enumerate(make_pairs(model, facts)):
        run = pair.other if direction == "denoise" else pair.own
        unpatched = plain(model, type(pair)(run, run), "denoise", kind, 0, [0])
        for u, unit in enumerate(CLASSES_AND_SPAN):
            places = class_places(pair.own)[unit]
            for layer in range(3):
                value = ours.values[i, u, layer]
                if not places:
                    assert value.isnan()
                    continue
                expected = plain(model, pair, direction, kind, layer, places) - unpatched
                torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-4)
    assert ours.values.nan_to_num().abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["z", "q", "k", "v"])
def test_heads_are_patched_one_by_one(tiny_model, kind):
    ours = activation_patching_per_fact(tiny_model, TWO, kind=kind, at="subject")
    assert ours.axes == ("fact", "layer", "head")
    assert ours.values.shape[2] == (2 if kind in "kv" else 4)
    for i, pair in enumerate(make_pairs(tiny_model, TWO)):
        unpatched = plain(tiny_model, type(pair)(pair.other, pair.other), "denoise", "resid_pre", 0, [0])
        for layer, head in ((0, 0), (2, 1)):
            expected = plain(tiny_model, pair, "denoise", kind, layer, class_places(pair.own)["subject"], head)
            torch.testing.assert_close(ours.values[i, layer, head], expected - unpatched, atol=2e-5, rtol=1e-4)


def test_pairs_share_every_position_and_ask_the_same_about_somebody_else(tiny_model):
    pairs = make_pairs(tiny_model, FACTS)
    for pair, fact in zip(pairs, FACTS, strict=True):
        assert pair.own.fact is fact and pair.other.fact is fact
        assert pair.own.span == pair.other.span and len(pair.own.full) == len(pair.other.full)
        assert pair.own.answers == pair.other.answers and pair.own.prompt != pair.other.prompt
    assert pairs == make_pairs(tiny_model, FACTS)
    with pytest.raises(ValueError, match="no other subject has 2 tokens"):
        make_pairs(tiny_model, FACTS[:1])


@torch.no_grad()
def moved(model, pair, kind, layer, share, head=slice(None)):
    """The score after the subject's activations went a share of the way from the other's to the fact's own."""
    own, other = (torch.tensor([query.full[:-1]]) for query in (pair.own, pair.other))
    kept, places = [], class_places(pair.own)["subject"]
    for ids in (own, other):
        with model.hooks((Site(layer, kind), lambda x: kept.append(x))):
            model.logits(ids)

    def write(x):
        x = x.clone()
        x[:, places, head] += share * (kept[0] - kept[1])[:, places, head]
        return x

    with model.hooks((Site(layer, kind), write)):
        logprob = model.logits(other).log_softmax(-1)[0]
    start = len(pair.own.prompt) - 1
    return torch.stack([logprob[start + t, token] for t, token in enumerate(pair.own.answers[0])]).mean()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [(a, "z") for a in ARCHITECTURES] + [("llama", kind) for kind in ("mlp_out", "q", "k", "v")] + [("gpt2", "q")],
)
def test_the_estimate_is_the_derivative_of_the_true_effect(architecture, kind):
    """Along a step of size e the true change of the score is e times the estimate, up to e^2."""
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    estimate = attribution_patching_per_fact(model, TWO, kind=kind, at="subject").values
    step = 1e-2
    for i, pair in enumerate(make_pairs(model, TWO)):
        for layer in (0, 2):
            heads = (slice(None),) if kind == "mlp_out" else (0, 1)
            for head in heads:
                slope = moved(model, pair, kind, layer, step, head) - moved(model, pair, kind, layer, -step, head)
                found = estimate[i, 0, layer] if kind == "mlp_out" else estimate[i, layer, head]
                torch.testing.assert_close(found, slope / (2 * step), atol=3e-3, rtol=2e-2)
    assert estimate.abs().max() > 1e-2


def test_more_steps_between_the_runs_bring_the_estimate_closer_to_the_truth(tiny_model):
    facts = FACTS[:3]
    true = activation_patching_per_fact(tiny_model, facts, kind="resid_post", at="last prompt")
    one = attribution_patching_per_fact(tiny_model, facts, kind="resid_post", at="last prompt")
    many = attribution_patching_per_fact(tiny_model, facts, kind="resid_post", at="last prompt", steps=16)
    expected = {"pearson": 1, "spearman": 1, "slope": 1, "missed": 0, "k": 10, "n": 3}
    assert agreement(true, true) == pytest.approx(expected)
    assert agreement(true, many)["pearson"] > agreement(true, one)["pearson"]
    with pytest.raises(ValueError, match="do not cover the same"):
        agreement(true, activation_patching_per_fact(tiny_model, facts, kind="resid_post", at="subject"))


@pytest.mark.slow
def test_in_the_world_the_answer_follows_the_last_subject_token_and_nothing_else():
    world = open_world("biographies")
    model, facts = load(world.full), world.forget.facts[:36]
    share = interchange(model, facts, seed=1)
    rows = dict(zip(share.labels["token"], share.values.tolist(), strict=True))
    assert min(rows["last subject"][:3]) > 0.8 and max(rows["first subject"][1:]) < 0.2
    assert max(rows["last prompt"][:2]) < 0.1 and min(rows["last prompt"][4:]) > 0.8
    assert share.unit == "change of share of prompts answered" and share.n == 36
    strangers = activation_patching(model, facts, at="last subject", direction="noise", metric="probability")
    assert strangers.values[0, :3].max() < -0.8 and strangers.high[0, :3].max() < -0.7


def test_bad_settings_are_refused(tiny_model):
    for settings, message in (
        (dict(direction="up"), "choose denoise or noise"),
        (dict(metric="rouge"), "choose logprob"),
        (dict(at="nowhere"), "choose one of first subject"),
        (dict(kind="z"), "say where with at="),
    ):
        with pytest.raises(ValueError, match=message):
            activation_patching(tiny_model, FACTS, **settings)
    with pytest.raises(ValueError, match="has no gradient"):
        attribution_patching_per_fact(tiny_model, FACTS, metric="exact")
    with pytest.raises(ValueError, match="no facts"):
        activation_patching(tiny_model, ())
