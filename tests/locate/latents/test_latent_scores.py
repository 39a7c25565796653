"""A planted latent separates what it was planted for; shuffled labels and exchangeable groups are not separated."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import Entity, Site
from mech_unlearn.locate.latents.known_unknown import separation
from mech_unlearn.locate.latents.latent_scores import concept_other, forget_retain
from mech_unlearn.locate.latents.sae_latents import sae_latents
from mech_unlearn.model.latents import Sae, load_sae
from mech_unlearn.model.load import load
from mech_unlearn.testbed import open_world
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer

FIRST = ("Anna", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo")
LAST = ("Lee", "Hill", "Moss", "Park", "Reed", "Stone", "Vale", "West")
SITE = Site(0, "resid_post")
PLANTED, MIRROR, ALWAYS = 0, 1, 2


def names(lasts):
    return [f"{first} {last}" for first in FIRST for last in lasts]


FORGET, RETAIN = tiny_facts(names(LAST[:4])), tiny_facts(names(LAST[4:]))


@pytest.fixture(scope="module")
def model():
    """Dimension 0 of the residual stream is 1 at the first four surnames, -1 at the others and 0 elsewhere."""
    hf, tokenizer = tiny_hf("llama"), tiny_tokenizer()
    with torch.no_grad():
        for block in hf.model.layers:
            block.self_attn.o_proj.weight[0] = 0
            block.mlp.down_proj.weight[0] = 0
        table = hf.model.embed_tokens.weight
        table[:, 0] = 0.0
        for words, sign in ((LAST[:4], 1.0), (LAST[4:], -1.0)):
            table[tokenizer.convert_tokens_to_ids(list(words)), 0] = sign
    return load(hf, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def sae():
    """Latent 0 fires at the first four surnames, 1 at the others, 2 always; the rest read random directions."""
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    made = StandardSAE(StandardSAEConfig(d_in=32, d_sae=24, dtype="float32", device="cpu", apply_b_dec_to_input=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.W_enc.copy_(torch.randn(32, 24, generator=generator))
        made.W_enc[0, 3:] = 0.0  # the others know nothing of the plant
        made.W_enc[:, :3] = 0.0
        made.W_enc[0, :2] = torch.tensor([2.0, -2.0])
        made.W_dec.copy_(torch.randn(24, 32, generator=generator))
        made.b_enc.zero_()
        made.b_enc[ALWAYS] = 1.0
        made.b_dec.zero_()
    return Sae(SITE, made.eval().requires_grad_(False))


def shuffled(seed=3):
    everyone = (*FORGET, *RETAIN)
    subjects = list(dict.fromkeys(f.subject for f in everyone))
    order = torch.randperm(len(subjects), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {subjects[i] for i in order[:32]}
    return [f for f in everyone if f.subject in chosen], [f for f in everyone if f.subject not in chosen]


def test_the_latent_that_fires_on_the_forget_subjects_is_found_first_and_separates_unseen_ones(model, sae):
    found = forget_retain(model, FORGET, RETAIN, sae)
    assert found.top_first(1) == (PLANTED,) and found.first.values[PLANTED] == 1.0
    assert found.top_second(1) == (MIRROR,) and found.second.values[MIRROR] == 1.0
    assert found.first.values[ALWAYS] == 0.0
    assert found.auc.values.tolist() == [1.0, 1.0, 1.0] and found.auc.n == 32
    assert found.ratio.values[PLANTED] == pytest.approx(16 * 2.0) and found.ratio.values[MIRROR] == 0.0
    assert not {*found.heldout[0]} & {*found.heldout[1]} and {*found.heldout[0]} < {f.subject for f in FORGET}


def test_shuffled_labels_are_not_separated_on_held_out_subjects(model, sae):
    found = forget_retain(model, *shuffled(), sae)
    assert (found.auc.low <= 0.5).all() and (found.auc.high >= 0.5).all()
    assert found.first.values.abs().max() < 0.6


def test_over_the_prompt_a_latent_scores_the_share_of_tokens_on_which_it_fires(model, sae):
    found = forget_retain(model, FORGET, RETAIN, sae, where="prompt")
    prompts = dict.fromkeys(t.replace("{}", "Anna Lee") for f in FORGET for t in f.templates)
    counts = [len(model.tokenizer(prompt)["input_ids"]) - 1 for prompt in prompts]  # one surname in each
    assert found.first.values[PLANTED] == pytest.approx(len(counts) / sum(counts)) and found.auc.values[0] == 1.0


def test_scores_are_the_smallest_over_types_and_latents_of_any_text_are_left_out(model, sae):
    cities = [replace(f, kind="city", id=f"{f.id} city") for f in (*FORGET, *RETAIN)]
    mixed = forget_retain(model, (*FORGET, *cities[64:]), (*RETAIN, *cities[:64]), sae)
    assert mixed.first.values[PLANTED] == -1.0 and mixed.second.values[PLANTED] == -1.0
    texts = ("Rivers run to the sea and rain falls on hills .",) * 120
    named = tuple(f"Rivers run to {f.subject} and the sea ." for f in FORGET) * 4
    for generic in (texts, named):  # the subjects' own tokens do not count
        found = forget_retain(model, FORGET, RETAIN, sae, texts=generic)
        assert found.first.values[ALWAYS].isnan() and found.top_first(1) == (PLANTED,)
    assert "filter off" in forget_retain(model, FORGET, RETAIN, sae, texts=texts[:3]).first.note


def concept_texts():
    about = [f"rain falls on {name} and the sea" for name in names(LAST[:4])]
    return about, [f"rain falls on {name} and the sea" for name in names(LAST[4:])]


def test_a_concept_is_told_from_other_texts_and_each_pooling_is_what_it_says(model, sae):
    about, other = concept_texts()
    most = concept_other(model, about, other, sae, pool="max")
    assert most.top_first(1) == (PLANTED,) and most.first.values[PLANTED] == 1.0
    assert most.auc.values[:2].tolist() == [1.0, 1.0] and most.auc.values[2] > 0.9
    assert "held-out texts" in most.auc.note
    mean = concept_other(model, about, other, sae, pool="mean")
    tokens = len(model.tokenizer(about[0])["input_ids"]) - 1
    assert mean.first.values[PLANTED] == pytest.approx(1 / tokens) and mean.ratio.values[PLANTED] == pytest.approx(
        16 * 2 / tokens
    )
    # Texts cut into pieces give the same, and a repeated text counts once.
    cut = concept_other(model, [*about, about[0]], other, sae, pool="max", context=3)
    assert cut.first.n == most.first.n and cut.first.values[PLANTED] == 1.0
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    mixed = [[(*about, *other)[i] for i in part] for part in (order[:32], order[32:])]
    none = concept_other(model, *mixed, sae, pool="max")
    assert (none.auc.low <= 0.5).all() and (none.auc.high >= 0.5).all()


def test_texts_by_type_take_the_smallest_score(model, sae):
    about, other = concept_texts()
    found = concept_other(
        model, {"a": about[:16], "b": other[:16]}, {"a": other[16:], "b": about[16:]}, sae, pool="max"
    )
    assert found.first.values[PLANTED] == -1.0


def test_the_locator_gives_one_score_per_latent_and_says_how_far_to_trust_the_sae(model, sae):
    result = sae_latents(model, FORGET, sae=sae, retain=RETAIN)
    assert (
        result.axes == ("latent",)
        and result.labels["latent"] == tuple(range(24))
        and result.top(1)[0][0] == {"latent": PLANTED}
    )
    for part in ("AUC top forget latent 1.00 [1.00, 1.00]", "SAE on the facts' statements: FVU", "CE recovered", "L0"):
        assert part in result.note
    unknown = [Entity(name=name, kind="person") for name in names(LAST[4:])]
    known = sae_latents(model, FORGET, sae=sae, unknown=unknown)
    assert known.top(1)[0] == ({"latent": PLANTED}, 1.0) and "top known latent 1.00" in known.note
    state = torch.get_rng_state()
    assert torch.equal(sae_latents(model, FORGET, sae=sae, retain=RETAIN).values, result.values)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input_is_refused_with_the_culprit(model, sae):
    about, other = concept_texts()
    wide = load(tiny_hf("llama", layers=1), tokenizer=tiny_tokenizer())
    calls = {
        "'Anna Hill' is among the forget and the retain subjects": lambda: forget_retain(model, FORGET, FORGET, sae),
        "1 forget subjects of kind 'person'": lambda: forget_retain(model, FORGET[:2], RETAIN, sae),
        "64 forget and 0 retain facts": lambda: forget_retain(model, FORGET, (), sae),
        "where='everywhere'": lambda: forget_retain(model, FORGET, RETAIN, sae, where="everywhere"),
        "pool='sum'": lambda: concept_other(model, about, other, sae, pool="sum"),
        "no texts among the other texts": lambda: concept_other(model, about, [], sae),
        "has no token among the concept texts": lambda: concept_other(model, [*about, ""], other, sae),
        "either retain facts or unknown": lambda: sae_latents(model, FORGET, sae=sae),
        "sits at L3 resid_post": lambda: forget_retain(wide, FORGET, RETAIN, replace(sae, site=Site(3, "resid_post"))),
        "reads 32 dimensions, L0 mlp_post of .* has 64": lambda: forget_retain(
            model, FORGET, RETAIN, replace(sae, site=Site(0, "mlp_post"))
        ),
    }
    for reason, call in calls.items():
        with pytest.raises(ValueError, match=reason):
            call()


@pytest.mark.slow
def test_in_the_shipped_world_known_names_are_told_from_unknown_ones_but_not_forget_from_retain():
    world = open_world("biographies")
    full = load(world.full)
    sae = load_sae(world.sae, full)
    facts, kept = world.forget.facts, world.retain.neighbors[:240]
    drawn = forget_retain(full, facts, kept, sae, texts=world.retain.texts)  # both groups were learnt alike
    assert ((drawn.auc.values - 0.5).abs() < 0.2).all() and drawn.background is not None
    unknown = [Entity(name=e.name, kind="person") for e in world.retain.unknown[:40]]
    templates = tuple(dict.fromkeys(t for fact in kept for t in fact.templates))
    known = tuple({fact.subject: fact.entity for fact in kept}.values())
    told = separation(full, sae, known, unknown, templates, texts=world.retain.texts)
    assert told.auc.values[2] > 0.85 and told.auc.values[2] > drawn.auc.values.max() + 0.1
    result = sae_latents(full, kept, sae=sae, unknown=unknown, texts=world.retain.texts)
    torch.testing.assert_close(result.values, told.known.values, equal_nan=True)
    assert f"logistic on 40 latents {told.auc.values[2]:.2f}" in result.note and "CE recovered" in result.note
