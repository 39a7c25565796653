"""SaeClamp: what SAEBench does, for the chosen latents only, exactly as the whole SAE would."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.methods import SaeClamp
from mech_unlearn.methods.sae_clamp import best_latents, chosen_latents, clamp_of, firing_rates
from mech_unlearn.metrics.recall import recall
from mech_unlearn.model.latents import Sae
from mech_unlearn.model.load import load
from tests.planted import FORGOTTEN, fresh_planted_model, planted_facts, planted_sae
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

IDS = torch.tensor([[2, 5, 9, 10, 6, 7], [2, 5, 6, 7, 8, 11]])
SITE = Site(1, "resid_post")
LATENTS = (3, 40, 41, 95)


def make_sae(kind="standard", centered=False, site=SITE, **settings):
    import sae_lens as s

    classes = {
        "standard": (s.StandardSAE, s.StandardSAEConfig),
        "jumprelu": (s.JumpReLUSAE, s.JumpReLUSAEConfig),
        "topk": (s.TopKSAE, s.TopKSAEConfig),
        "gated": (s.GatedSAE, s.GatedSAEConfig),
    }
    made, config = classes[kind]
    sae = made(config(d_in=32, d_sae=96, **settings))
    generator = torch.Generator().manual_seed(0)
    for name, weight in sae.named_parameters():
        size = torch.rand(weight.shape, generator=generator) if name == "threshold" else None
        weight.data = torch.randn(weight.shape, generator=generator) / 3 if size is None else size
    return Sae(site, sae.eval().requires_grad_(False), centered=centered)


def slow(sae, x, latents, c):
    """SAEBench: decode(edited) + (x - decode(original)), with latents zeroed at position 0."""
    acts = sae.encode(x)
    edited = acts.clone()
    for j in latents:
        edited[..., j] = torch.where(acts[..., j] > 0, torch.full_like(acts[..., j], -c), acts[..., j])
    edited[:, 0] = acts[:, 0]
    return sae.decode(edited) + (x - sae.decode(acts))


@pytest.mark.parametrize("centered", (False, True))
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("jumprelu", {}),
        ("topk", {"k": 12}),
        ("topk", {"k": 12, "rescale_acts_by_decoder_norm": True}),
    ],
)
def test_clamping_a_few_latents_is_what_the_whole_sae_would_do(kind, settings, centered):
    sae = make_sae(kind, centered, **settings)
    x = torch.randn(4, 30, 32, generator=torch.Generator().manual_seed(3)) * 2
    clamp = clamp_of(sae, LATENTS, -7.0)
    ids = torch.zeros(4, 30, dtype=torch.long)
    active = (sae.encode(x)[..., list(LATENTS)] > 0)[:, 1:].any(-1)
    assert 0 < active.float().mean() < 1  # both directions are tested
    moved = clamp(x, ids)
    torch.testing.assert_close(moved, slow(sae, x, LATENTS, 7.0), atol=2e-4, rtol=1e-4)
    assert torch.equal(moved[:, 1:][~active], x[:, 1:][~active]) and torch.equal(moved[:, 0], x[:, 0])
    assert len(clamp.encoder) == len(LATENTS) and (clamp.rest is None) == (kind != "topk")


def test_latents_that_fire_on_retained_text_are_excluded_and_the_rest_ranked_by_how_often_they_fire():
    forget = torch.tensor([0.5, 0.9, 0.3, 0.0, 0.4])
    retain = torch.tensor([0.0, 0.01, 0.009, 0.0, 0.0])
    assert chosen_latents(forget, retain, 2, 0.01).tolist() == [0, 4]
    assert chosen_latents(forget, retain, 5, 0.01).tolist() == [0, 4, 2]  # a latent that never fires is not chosen
    assert chosen_latents(forget, retain, 2, 0.02).tolist() == [1, 0]


def test_firing_rates_are_shares_of_ordinary_tokens(tiny_model):
    sae, texts = make_sae(), ("Rivers run to the sea .", "rain falls")
    rows = [tiny_model.tokenizer(text)["input_ids"] for text in texts]
    fired = []
    for row in rows:
        with torch.no_grad(), tiny_model.hooks((sae.site, lambda x: fired.append(sae.encode(x)[0, 1:] > 1e-6))):
            tiny_model.logits(torch.tensor([row]))
    torch.testing.assert_close(firing_rates(tiny_model, sae, texts), torch.cat(fired).float().mean(0))


def test_the_planted_names_latents_are_found_and_their_facts_go_while_others_stay():
    model = fresh_planted_model()
    facts = tuple(replace(f, prompt="{}", paraphrases=()) for f in planted_facts())  # a name and its object, no words
    forget, retain = ForgetSet(facts=facts[:FORGOTTEN]), RetainSet(neighbors=facts[FORGOTTEN:])
    edit = SaeClamp(sae=planted_sae(), k=FORGOTTEN, c=1.0).fit(model, forget, retain)
    report = edit.recipe["report"]
    assert sorted(report["latents"]) == list(range(FORGOTTEN))
    assert report["forget_rate"] == [1 / 8] * FORGOTTEN and report["retain_rate"] == [0] * FORGOTTEN
    off = SaeClamp(sae=planted_sae(), k=FORGOTTEN, c=0.0).fit(model, forget, retain)
    assert recall(model, facts).value == 1
    with off.on(model):
        assert recall(model, facts[:FORGOTTEN]).value <= 0.25 and recall(model, facts[FORGOTTEN:]).value == 1


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_acts_on_every_architecture_and_keeps_position_zero(architecture, dtype, tiny_sets):
    model = load(tiny_hf(architecture).to(dtype), tokenizer=tiny_tokenizer())
    edit = SaeClamp(sae=make_sae(), k=8, c=5.0, max_retain=2.0).fit(model, *tiny_sets)
    clean = model.logits(IDS)
    with edit.on(model):
        moved = model.logits(IDS)
    assert torch.equal(moved[:, 0], clean[:, 0]) and not torch.equal(moved, clean)


def test_the_best_latents_of_an_attribution_can_be_given():
    values = torch.tensor([0.1, float("nan"), 0.7, 0.2])
    settings = dict(name="a", values=values, unit="u", n=1)
    assert best_latents(Attribution(axes=("latent",), labels={"latent": (0, 1, 2, 3)}, **settings), 2) == (2, 3)
    with pytest.raises(ValueError, match="one over"):
        best_latents(Attribution(axes=("neuron",), labels={"neuron": (0, 1, 2, 3)}, **settings), 2)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        ({}, {"latents": (96,)}, "latents 0..95"),
        ({}, {"latents": (1, 1)}, "each once"),
        ({}, {"k": 0}, "k 1 or more"),
        ({}, {"max_retain": 1e-9}, "raise max_retain"),
        ({"kind": "gated"}, {"latents": (1,)}, "a GatedSAE; clamping knows"),
        ({"normalize_activations": "layer_norm"}, {"latents": (1,)}, "normalises each state"),
        ({"site": Site(1, "resid_mid")}, {"latents": (1,)}, "MLP's input only"),
        ({"site": Site(9, "resid_post")}, {"latents": (1,)}, "L9"),
    ],
)
def test_bad_input_is_refused(tiny_model, tiny_sets, make, settings, message):
    with pytest.raises(ValueError, match=message):
        SaeClamp(sae=make_sae(**make), **settings).fit(tiny_model, *tiny_sets)
    with pytest.raises(ValueError, match="neither facts nor texts"):
        SaeClamp(sae=make_sae()).fit(tiny_model, tiny_sets[0], RetainSet())
