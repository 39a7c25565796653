"""SaeShift: the state of a name moves from the known to the unknown in the latents of an SAE, and a probe gates it."""

import dataclasses
import sys

import pytest
import torch

from mech_unlearn.core import Entity, ForgetSet, RetainSet, Site
from mech_unlearn.locate.lenses.probe_auc import probe_auc
from mech_unlearn.methods import SaeShift
from mech_unlearn.methods.sae_shift import known_scores, latent_masks, pre_activations, shifted
from mech_unlearn.methods.writing import keys
from mech_unlearn.model.load import load
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer

SITE = Site(1, "resid_post")


def make_sae(d_in=32, site=SITE, seed=0):
    from sae_lens import StandardSAE, StandardSAEConfig

    from mech_unlearn.model.latents import Sae

    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=96))
    generator = torch.Generator().manual_seed(seed)
    for weight in sae.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / 6
    return Sae(site, sae.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def sae():
    return make_sae()


def groups(seed=0, shift=0.0, n=30):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(n, 1, 8, generator=generator).expand(-1, 4, -1) for _ in range(2))
    noise = [0.1 * torch.randn(n, 4, 8, generator=generator) for _ in range(2)]
    return first + noise[0], second + noise[1] + shift


def test_a_probe_finds_a_difference_of_groups_and_nothing_where_there_is_none():
    assert probe_auc(*groups(shift=2.0)) > 0.95
    assert 0.35 < probe_auc(*groups(n=100)) < 0.65


def test_a_probe_is_tested_on_other_entities_and_contexts_than_it_saw():
    first, second = groups(n=6)  # each entity is a point of its own: memorising entities does not help
    assert probe_auc(first.repeat(1, 8, 1), second.repeat(1, 8, 1)) < 0.8
    first, second = groups(n=30)
    first[:, :3] -= 3.0  # contexts 0..2 differ, context 3 does not
    assert probe_auc(first[:, :3], second[:, :3]) > 0.95
    assert probe_auc(first, second, heldout=(3,)) < 0.75


def test_a_probe_of_one_entity_is_refused():
    with pytest.raises(ValueError, match="two entities"):
        probe_auc(torch.zeros(1, 1, 4), torch.zeros(5, 1, 4))
    with pytest.raises(ValueError, match="every context is held out"):
        probe_auc(torch.zeros(3, 1, 4), torch.zeros(3, 1, 4), heldout=(0,))


def test_scores_are_the_difference_of_activation_rates(sae):
    known, unknown = torch.randn(5, 2, 32), torch.randn(4, 2, 32)
    scores = known_scores(sae, known, unknown)
    j = int(scores.abs().argmax())
    rates = [(sae.encode(x)[..., j] > 0).float().mean() for x in (known, unknown)]
    torch.testing.assert_close(scores[j], rates[0] - rates[1])
    torch.testing.assert_close(known_scores(sae, unknown, known), -scores)


def test_pre_activations_are_what_the_encoder_rectifies(sae):
    x = torch.randn(3, 32)
    torch.testing.assert_close(pre_activations(sae, x).relu(), sae.encode(x))


def test_moving_all_latents_and_the_error_reaches_the_reference_itself(sae):
    x, reference = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    error = reference - sae.reconstruct(reference)
    every = latent_masks(torch.zeros(96), None)
    got = shifted(sae, x, sae.encode(reference), error, *every)
    torch.testing.assert_close(got, reference, atol=1e-4, rtol=1e-4)
    kept = shifted(sae, x, sae.encode(reference), None, *every)
    own_error = x - sae.reconstruct(x)
    torch.testing.assert_close(kept, sae.reconstruct(reference) + own_error, atol=1e-4, rtol=1e-4)


def test_only_chosen_latents_move_and_known_ones_only_down(sae):
    scores = torch.linspace(-1, 1, 96)
    raised, lowered = latent_masks(scores, 5)
    assert raised.nonzero().flatten().tolist() == list(range(5))
    assert lowered.nonzero().flatten().tolist() == list(range(91, 96))
    x, code = torch.randn(1, 1, 32), torch.rand(1, 1, 96)
    own = sae.encode(x)
    moved = own.clone()
    moved[..., :5] = torch.maximum(own, code)[..., :5]
    moved[..., 91:] = torch.minimum(own, code)[..., 91:]
    got = shifted(sae, x, code, None, raised, lowered)
    torch.testing.assert_close(got - x, (moved - own) @ sae.w_dec, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", ("matched", "mean"))
def test_the_hook_puts_the_mean_state_of_each_name_on_its_target(tiny_model, tiny_sets, sae, target):
    forget, retain = tiny_sets
    contexts = keys.contexts_of(forget.facts)
    edit = SaeShift(sae=sae, min_auc=0.0, target=target).fit(tiny_model, forget, retain)
    references = edit.recipe["report"]["references"]
    for name in ("Anna Lee", "Ben Hill"):
        pool = [references[name]] if references else [entity.name for entity in retain.unknown]
        wanted = keys.name_states(tiny_model, pool, contexts, SITE).mean((0, 1))
        before = keys.name_states(tiny_model, [name], contexts, SITE).mean((0, 1))
        with edit.on(tiny_model):
            after = keys.name_states(tiny_model, [name], contexts, SITE).mean((0, 1))
        assert (before - wanted).norm() > 1
        torch.testing.assert_close(after, wanted, atol=1e-3, rtol=1e-3)


def test_with_shared_directions_only_what_contexts_do_to_unknown_names_is_left_of_a_names_deviation(
    tiny_model, tiny_sets, sae
):
    forget, retain = tiny_sets
    contexts = keys.contexts_of(forget.facts)
    edit = SaeShift(sae=sae, min_auc=0.0, shared=1).fit(tiny_model, forget, retain)
    (shift,) = edit.interventions
    assert shift.kept is not None and shift.kept.shape == (1, tiny_model.d_model)
    unknown = keys.name_states(tiny_model, [e.name for e in retain.unknown], contexts, SITE)
    effects = unknown.mean(0) - unknown.mean((0, 1))
    direction = torch.linalg.svd(effects, full_matrices=False)[2][0]
    before = keys.name_states(tiny_model, ["Anna Lee"], contexts, SITE)[0]
    with edit.on(tiny_model):
        after = keys.name_states(tiny_model, ["Anna Lee"], contexts, SITE)[0]
    deviation = after - after.mean(0)
    expected = (before - before.mean(0)) @ direction[:, None] * direction
    torch.testing.assert_close(deviation, expected, atol=1e-4, rtol=1e-4)
    assert (before - before.mean(0)).norm() > 1.01 * deviation.norm()
    with pytest.raises(ValueError, match="shared=3 with mode='weights'"):
        SaeShift(sae=sae, min_auc=0.0, shared=3, mode="weights").fit(tiny_model, forget, retain)


def test_swapping_known_and_unknown_moves_an_unknown_name_the_other_way(tiny_model, tiny_sets, sae):
    forget, retain = tiny_sets
    unknown = [entity.name for entity in retain.unknown]
    swapped_forget = ForgetSet(facts=tiny_facts(unknown[:2]))
    swapped = RetainSet(
        neighbors=tiny_facts(unknown[2:]), texts=retain.texts, unknown=tuple(e for e in retain.entities)
    )
    contexts = keys.contexts_of(forget.facts)

    def mean(names):
        return keys.name_states(tiny_model, names, contexts, SITE).mean((0, 1))

    axis = mean(unknown) - mean([entity.name for entity in retain.entities])
    moves = []
    for sets in ((forget, retain), (swapped_forget, swapped)):
        edit = SaeShift(sae=sae, min_auc=0.0, target="mean").fit(tiny_model, *sets)
        names = [entity.name for entity in sets[0].entities]
        before = mean(names)
        with edit.on(tiny_model):
            moves.append(((mean(names) - before) @ axis).item())
    assert moves[1] < 0 < moves[0] or moves[1] < moves[0]


def test_in_the_weights_names_come_near_their_reference(tiny_model, tiny_sets, sae):
    edit = SaeShift(sae=sae, min_auc=0.0, mode="weights", protect=()).fit(tiny_model, *tiny_sets)
    report = edit.recipe["report"]
    assert not edit.interventions
    assert set(edit.deltas) == {tiny_model.w_out(0)[0], tiny_model.w_out(1)[0]}
    assert report["distance_after"] < 0.6 * report["distance_before"]


def test_known_and_unknown_that_a_probe_cannot_tell_apart_are_refused(tiny_model, tiny_sets, sae):
    people = [f"{a} {b}" for a in ("Cara", "Dan", "Eva", "Finn") for b in ("Moss", "Park", "Reed", "Stone")]
    known, unknown = tiny_facts(people[::2]), tuple(Entity(name=name, kind="person") for name in people[1::2])
    retain = RetainSet(neighbors=known, unknown=unknown)
    with pytest.raises(ValueError, match="tells known from unknown names with AUC 0"):
        SaeShift(sae=sae).fit(tiny_model, tiny_sets[0], retain)
    assert SaeShift(sae=sae, min_auc=0.0).fit(tiny_model, tiny_sets[0], retain).interventions


@pytest.mark.parametrize(
    ("site", "width", "mode", "message"),
    (
        (SITE, 24, "hook", "decodes to 24 dimensions.*d_model=32"),
        (Site(9, "resid_post"), 32, "hook", "layers 0..3"),
        (Site(1, "mlp_post"), 32, "hook", "resid_pre or resid_post only"),
        (Site(0, "resid_pre"), 32, "weights", 'use mode="hook"'),
    ),
)
def test_an_sae_of_another_model_or_place_is_refused(tiny_model, tiny_sets, site, width, mode, message):
    with pytest.raises(ValueError, match=message):
        SaeShift(sae=make_sae(width, site), mode=mode, min_auc=0.0).fit(tiny_model, *tiny_sets)


def test_missing_references_are_refused(tiny_model, tiny_sets, sae):
    forget, retain = tiny_sets
    with pytest.raises(ValueError, match="no entity of kind person"):
        SaeShift(sae=sae).fit(tiny_model, forget, dataclasses.replace(retain, unknown=()))
    with pytest.raises(ValueError, match="give RetainSet.neighbors"):
        SaeShift(sae=sae).fit(tiny_model, forget, dataclasses.replace(retain, neighbors=()))
    with pytest.raises(ValueError, match="n_latents=97"):
        SaeShift(sae=sae, min_auc=0.0, n_latents=97).fit(tiny_model, forget, retain)


def test_importing_the_methods_imports_no_slow_library():
    import subprocess

    code = (
        "import sys, mech_unlearn.methods as m; assert m.METHODS; "
        "bad = {'transformers', 'transformer_lens', 'sae_lens', 'sklearn', 'scipy', 'pandas'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_model_may_be_in_bfloat16(tiny_sets, sae):
    model = load(tiny_hf("llama").to(torch.bfloat16), tokenizer=tiny_tokenizer())
    for mode in ("hook", "weights"):
        edit = SaeShift(sae=sae, min_auc=0.0, mode=mode).fit(model, *tiny_sets)
        ids = torch.tensor([keys.mention(model.tokenizer, "{} was", "Anna Lee")[0]])
        clean = model.logits(ids)
        with edit.on(model):
            assert not torch.equal(model.logits(ids), clean)
        assert torch.equal(model.logits(ids), clean)
