"""SaeIru: coordinates with a gradient everywhere, bands that end the training, names that move to unknown ones."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import Entity, ForgetSet, RetainSet, Site
from mech_unlearn.methods import SaeIru
from mech_unlearn.methods.experimental.iru_bands import active_rate, bands_of, error_share, separating
from mech_unlearn.methods.experimental.sae_iru import own_mentions, settled
from mech_unlearn.methods.sae_shift import pre_activations
from mech_unlearn.methods.writing import keys
from mech_unlearn.model.load import load
from mech_unlearn.training.schedule import Schedule
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer

SITE = Site(1, "resid_post")
FAST = Schedule(lr=1e-2, epochs=1, batch_size=4)
PEOPLE = [f"{a} {b}" for a in ("Cara", "Dan", "Eva", "Finn") for b in ("Moss", "Park", "Reed", "Stone")]
STRANGERS = [f"{a} {b}" for a in ("Gina", "Hugo") for b in ("Vale", "West", "Moss", "Stone")]


def make_sae(d_in=32, site=SITE, seed=0, d_sae=96):
    from sae_lens import StandardSAE, StandardSAEConfig

    from mech_unlearn.model.latents import Sae

    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae))
    generator = torch.Generator().manual_seed(seed)
    for weight in sae.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / 6
    return Sae(site, sae.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def sae():
    return make_sae()


def states(n, shift=0.0, seed=0):
    return torch.randn(n, 3, 32, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.fixture
def bands(sae):
    chosen = separating(sae, states(20), states(20, 1.0, 1), 12)
    return bands_of(sae, chosen, states(20), states(20, 1.0, 1), states(20, 1.0, 2))


def sets(known=PEOPLE, unknown=STRANGERS, gone=("Anna Lee", "Ben Hill")):
    retain = RetainSet(
        neighbors=tiny_facts(known),
        texts=("Rivers run to the sea .", "rain falls on hills .") * 2,
        unknown=tuple(Entity(name=name, kind="person") for name in unknown),
    )
    return ForgetSet(facts=tiny_facts(gone)), retain


def test_a_latent_that_is_off_has_a_gradient_and_its_activation_has_none(sae, bands):
    x = states(1)[0, :1].requires_grad_()
    off = int(((pre_activations(sae, x)[0] < -0.1) & torch.isin(torch.arange(96), bands.chosen)).nonzero()[0, 0])
    (dead,) = torch.autograd.grad(sae.encode(x)[0, off], [x])
    assert dead.abs().sum() == 0
    at = int((bands.chosen == off).nonzero())
    (alive,) = torch.autograd.grad(bands.coordinates(x)[0, at], [x])
    assert alive.abs().sum() > 0
    q = bands.coordinates(x).detach().requires_grad_()
    ((q - bands.unknown).square().mean(-1) - bands.near).relu().sum().backward()
    assert q.grad[0, at] != 0


def test_distances_are_means_of_squares_over_standardised_coordinates(sae, bands):
    x, known, unknown = states(2, seed=5), states(20), states(20, 1.0, 1)
    raw = {
        n: (t @ sae.sae.W_enc + sae.sae.b_enc)[..., bands.chosen] for n, t in (("x", x), ("k", known), ("u", unknown))
    }
    both = torch.cat([raw["k"].flatten(0, 1), raw["u"].flatten(0, 1)])
    q = {n: (t - both.mean(0)) / both.std(0) for n, t in raw.items()}
    for got, name in zip(bands.distances(x), ("u", "k")):
        slow = (q["x"] - q[name].flatten(0, 1).mean(0)).square().mean(-1)
        torch.testing.assert_close(got, slow, atol=1e-3, rtol=1e-3)


def test_the_bands_are_quartiles_of_unknown_names_that_made_no_reference(bands):
    others = states(20, 1.0, 2)
    near, far = bands.distances(others)
    assert (near <= bands.near).float().mean() == pytest.approx(0.75, abs=0.02)
    assert (far >= bands.far).float().mean() == pytest.approx(0.75, abs=0.02)
    assert 0.5 <= bands.inside(others).float().mean() <= 0.8
    assert bands.inside(states(20, 0.0, 3)).float().mean() < 0.1


def test_inside_the_bands_the_loss_and_its_gradient_are_exactly_zero(bands):
    x = states(20, 1.0, 4).requires_grad_()
    loss = bands.excess(x, eta=1.0)
    loss.sum().backward()
    inside = bands.inside(x)
    assert 0.3 < inside.float().mean() < 1
    assert (loss[inside] == 0).all() and (x.grad[inside] == 0).all()
    assert (loss[~inside] > 0).all() and x.grad[~inside].abs().sum(-1).min() > 0


def test_swapped_bands_pull_the_other_way(sae):
    known, unknown = states(20), states(20, 1.0, 1)
    chosen = separating(sae, known, unknown, 12)
    axis = unknown.mean((0, 1)) - known.mean((0, 1))
    for k, u, others, x, sign in (
        (known, unknown, states(20, 1.0, 2), states(5, seed=7), 1),
        (unknown, known, states(20, 0.0, 3), states(5, 1.0, 7), -1),
    ):
        x.requires_grad_()
        bands_of(sae, chosen, k, u, others).excess(x, 1.0).sum().backward()
        assert sign * (-x.grad.sum((0, 1)) @ axis) > 0


def test_separating_latents_are_the_extremes_of_the_activation_rates(sae):
    known, unknown = states(20), states(20, 1.0, 1)
    rate = [(sae.encode(x) > 1e-6).float().mean((0, 1)) for x in (known, unknown)]
    order = (rate[0] - rate[1]).argsort()
    got = separating(sae, known, unknown, 5)
    threshold = (rate[0] - rate[1])[order]
    assert len(got) == 10
    assert ((rate[0] - rate[1])[got] <= threshold[4]).sum() >= 5 and (
        (rate[0] - rate[1])[got] >= threshold[-5]
    ).sum() >= 5
    frequency = active_rate(sae, known.flatten(0, 1))
    rare = separating(sae, known, unknown, 5, frequency, most=0.3)
    assert frequency[rare].max() <= 0.3 < frequency[got].max()
    with pytest.raises(ValueError, match="raise background"):
        separating(sae, known, unknown, 5, torch.ones(96), most=0.5)


def test_the_unexplained_share_is_that_of_the_reconstruction(sae):
    x = states(4)
    torch.testing.assert_close(error_share(sae, x), (x - sae.reconstruct(x)).norm(dim=-1) ** 2 / x.norm(dim=-1) ** 2)
    y = x.clone().requires_grad_()
    error_share(sae, y).sum().backward()
    assert y.grad.abs().sum() > 0


def test_contexts_that_decide_when_to_stop_are_never_trained_on(tiny_model):
    forget, _ = sets()
    contexts = ("{} was", "The birthplace of {}", "The employer of {}")
    seen, unseen = (own_mentions(tiny_model, forget, contexts, [2], out) for out in (False, True))
    assert not {ids for ids, _ in seen} & {ids for ids, _ in unseen}
    assert len(seen) == 4 and len(unseen) == 2
    for ids, start in (*seen, *unseen):
        assert start == len(ids) - 1
        assert tiny_model.tokenizer.convert_ids_to_tokens(ids[-1]) in ("Lee", "Hill")


def mean_distance(model, edit, bands, names, contexts):
    with edit.on(model):
        x = keys.name_states(model, names, contexts, SITE).float()
    return bands.distances(x)[0].mean()


@pytest.mark.thorough
@pytest.mark.parametrize("space", ("latents", "states"))
@pytest.mark.parametrize("goal", ("bands", "prototype"))
def test_forgotten_names_move_towards_unknown_ones_and_known_ones_stay(tiny_model, sae, space, goal):
    forget, retain = sets()
    contexts = keys.contexts_of(forget.facts)
    method = SaeIru(
        schedule=replace(FAST, epochs=40, weight_decay=0.0),
        min_auc=0.0,
        sae=sae,
        space=space,
        objective=goal,
        patience=0,
        n_latents=16,
    )
    plan = method._plan(tiny_model, forget, retain, contexts, [len(contexts) - 1])
    tight = dataclasses.replace(plan.bands, near=0.5 * plan.bands.near)
    if goal == "bands":  # the random model's names may lie in the bands already
        object.__setattr__(method, "_plan", lambda *_: dataclasses.replace(plan, bands=tight))
    edit = method.fit(tiny_model, forget, retain)
    nothing = dataclasses.replace(edit, deltas={})
    last = contexts[-1:]  # never trained on
    for names, most in ((["Anna Lee", "Ben Hill"], 0.75), (PEOPLE, None)):
        before, after = (mean_distance(tiny_model, e, plan.bands, names, last) for e in (nothing, edit))
        assert after < most * before if most else abs(after / before - 1) < 0.15
    assert set(edit.deltas) == {tiny_model.w_out(layer)[0] for layer in (0, 1)}


def test_targets_that_are_unknown_already_are_left_alone(tiny_model, sae):
    forget, retain = sets(gone=STRANGERS[:1], unknown=STRANGERS[1:])
    method = SaeIru(schedule=replace(FAST, epochs=30, weight_decay=0.0), min_auc=0.0, sae=sae, recon_weight=0.0)
    contexts = keys.contexts_of(forget.facts)
    plan = method._plan(tiny_model, forget, retain, contexts, [len(contexts) - 1])
    wide = dataclasses.replace(plan.bands, near=1e9, far=0.0)
    object.__setattr__(method, "_plan", lambda *_: dataclasses.replace(plan, bands=wide, share=1.0))
    edit = method.fit(tiny_model, forget, retain)
    assert not edit.deltas
    report = edit.recipe["report"]
    assert report["stopped"] == "inside the bands" and report["steps"] == 20 and report["inside"] == [1.0] * 3
    endless = dataclasses.replace(method, patience=0, schedule=replace(method.schedule, epochs=2))
    object.__setattr__(endless, "_plan", method._plan)
    assert endless.fit(tiny_model, forget, retain).recipe["report"]["stopped"] == "epochs"


def test_training_stops_only_after_so_many_looks_in_a_row():
    shares = [0.6, 0.4, 0.5, 0.7]
    assert [settled(shares[:n], 0.5, 2) for n in range(5)] == [False, False, False, False, True]
    assert not any(settled(shares[:n], 0.5, 0) for n in range(5))
    assert not settled(shares, 0.5, 5)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_listed_matrices_change(architecture, sae):
    model = load(tiny_hf(architecture).to(torch.bfloat16), tokenizer=tiny_tokenizer())
    method = SaeIru(
        schedule=replace(FAST, weight_decay=0.0),
        min_auc=0.0,
        sae=sae,
        objective="prototype",
        patience=0,
        layers=(1,),
        background=0.9,
    )
    edit = method.fit(model, *sets())
    assert set(edit.deltas) == {model.w_out(1)[0]}
    assert edit.deltas[model.w_out(1)[0]].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        (dict(sae=make_sae(24)), "decodes to 24 dimensions.*d_model=32"),
        (dict(sae=make_sae(site=Site(9, "resid_post"))), "behind one of layers 0..3"),
        (dict(sae=make_sae(site=Site(1, "mlp_out"))), "behind one of layers"),
        (dict(contexts=("{} was",)), "1 contexts, 1 held out"),
        (dict(heldout=("no {}",)), "not among the contexts"),
        (dict(layers=(3,)), "lies above"),
        (dict(schedule=replace(FAST, stop_recall=0.1)), "look at answers"),
        (dict(schedule=replace(FAST, skip_forgotten=True)), "set patience="),
    ),
)
def test_what_cannot_work_is_refused(tiny_model, sae, changes, message):
    with pytest.raises(ValueError, match=message):
        SaeIru(**{"sae": sae, "min_auc": 0.0, **changes}).fit(tiny_model, *sets())


def test_groups_that_a_probe_cannot_tell_apart_and_too_few_names_are_refused(tiny_model, sae):
    same = sets(known=PEOPLE[::2], unknown=PEOPLE[1::2])
    with pytest.raises(ValueError, match="with AUC 0"):
        SaeIru(sae=sae).fit(tiny_model, *same)
    with pytest.raises(ValueError, match="give four or more"):
        SaeIru(sae=sae).fit(tiny_model, *sets(unknown=STRANGERS[:3]))
