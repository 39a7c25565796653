"""DirectionalAblation: the component is gone where it was asked, in states or in the weights, and only there."""

import dataclasses

import pytest
import torch

from mech_unlearn.core import Entity, ForgetSet, RetainSet, Site
from mech_unlearn.edit.edit import Edit
from mech_unlearn.edit.interventions import Affine
from mech_unlearn.methods import DirectionalAblation
from mech_unlearn.methods.directional_ablation import bystanders, difference_directions
from mech_unlearn.methods.writing import keys
from mech_unlearn.metrics.recall import recall
from mech_unlearn.model.capture import stream
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import score
from mech_unlearn.model.tokens import make_queries
from tests.planted import FORGOTTEN, UNKNOWN, fresh_planted_model, planted_facts
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

IDS = torch.tensor([[2, 5, 9, 10, 6, 7], [2, 5, 6, 7, 8, 11]])


def seen(model, sites, ids=IDS):
    found = {}
    with torch.no_grad(), model.hooks(*((site, lambda x, s=site: found.__setitem__(s, x.float())) for site in sites)):
        model.logits(ids)
    return found


def directions(model, sets, layer, rank=1):
    edit = DirectionalAblation(layers=(layer,), rank=rank).fit(model, *sets)
    return edit.interventions[0].right


def test_the_direction_is_the_normalised_difference_of_means_and_further_ones_are_orthogonal():
    own, other = (torch.randn(n, 3, 8, generator=torch.Generator().manual_seed(n)).double() for n in (5, 7))
    r = difference_directions(own, other, 3)
    difference = own.mean((0, 1)) - other.mean((0, 1))
    torch.testing.assert_close(r[0], difference / difference.norm())
    torch.testing.assert_close(r @ r.T, torch.eye(3).double())
    means = own.mean(1) - own.mean((0, 1))
    kept = means - means @ r[:1].T @ r[:1]
    assert (kept @ r[1]).square().sum() >= kept.square().sum() / 4  # the largest of at most 4 directions
    with pytest.raises(ValueError, match="do not differ"):
        difference_directions(own, own, 1)


def test_a_hook_takes_the_component_at_the_name_and_nowhere_else(tiny_model, tiny_sets):
    row = torch.tensor([keys.mention(tiny_model.tokenizer, "The birthplace of {} is", "Anna Lee")[0] + (35,)])
    site = Site(1, "resid_post")
    clean = seen(tiny_model, [site], row)[site]
    edit = DirectionalAblation(layers=(1,)).fit(tiny_model, *tiny_sets)
    r = edit.interventions[0].right[0]
    with edit.on(tiny_model):
        moved = seen(tiny_model, [site], row)[site]
    assert (moved != clean).any(-1)[0].tolist() == [False] * 5 + [True, False]
    assert abs((clean @ r)[0, 5]) > 1e-3 > 1e-5 > abs((moved @ r)[0, 5])
    toward = DirectionalAblation(layers=(1,), center="reference").fit(tiny_model, *tiny_sets)
    with toward.on(tiny_model):
        moved = seen(tiny_model, [site], row)[site]
    center = toward.interventions[0].center
    torch.testing.assert_close((moved @ r)[0, 5], center @ r, atol=1e-4, rtol=1e-4)


def written_off(model, edit):
    """The directions that the token embeddings lost."""
    table = model.hf.get_input_embeddings().weight
    return next(edit.deltas[name].right for name, weight in model.held.items() if weight is table)


def test_in_the_weights_the_direction_leaves_the_mean_state_and_first_tokens_alone(tiny_model, tiny_sets):
    site = Site(1, "resid_post")
    edit = DirectionalAblation(mode="weights", layers=(1,)).fit(tiny_model, *tiny_sets)
    r = written_off(tiny_model, edit)
    (plain,) = DirectionalAblation(layers=(1,)).fit(tiny_model, *tiny_sets).interventions
    aside = bystanders(tiny_model, tiny_sets[1], keys.contexts_of(tiny_sets[0].facts), site)
    assert aside.shape[0] == 2 and (r.double() @ aside.T).abs().max() < 1e-6
    assert (plain.right.double() @ aside.T).abs().max() > 0.05
    texts = [tiny_model.tokenizer(text).input_ids for text in tiny_sets[1].texts]
    first = next(iter(stream(tiny_model, texts, [site], [[0]] * len(texts)))).at[site][0].double()
    assert (first @ aside.T).norm() > 0.999 * first.norm()  # the BOS, the same in every row


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_the_weights_no_state_up_to_the_site_has_the_component(architecture, dtype, tiny_sets):
    model = load(tiny_hf(architecture).to(dtype), tokenizer=tiny_tokenizer())
    with torch.no_grad():  # gains of one would hide that they are forgotten
        for name, weight in model.held.items():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    sites = [Site(layer, "resid_post") for layer in range(3)]
    edit = DirectionalAblation(mode="weights", layers=(1,), rank=2).fit(model, *tiny_sets)
    r = written_off(model, edit)
    clean = seen(model, sites)
    with edit.on(model):
        after = seen(model, sites)
    bound = 1e-5 if dtype == torch.float32 else 0.03
    for site in sites[:2]:
        assert (after[site] @ r.T).norm() < bound * after[site].norm() < 0.5 * after[site].norm()
        assert (clean[site] @ r.T).norm() > 0.05 * clean[site].norm()
    assert (after[sites[2]] @ r.T).norm() > 0.01 * after[sites[2]].norm()  # the layer above writes as before


@pytest.mark.parametrize("kind", ("resid_pre", "resid_post"))
def test_weights_do_what_hooks_at_every_place_below_do(kind, tiny_sets):
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    edit = DirectionalAblation(mode="weights", layers=(1,), kind=kind).fit(model, *tiny_sets)
    r = written_off(model, edit)
    order = [
        Site(layer, k) for layer in (0, 1) for k in ("resid_pre", "resid_mid", "resid_post")
    ]  # resid_mid: the MLP's input
    below = order[: order.index(Site(1, kind)) + 1]
    maps = tuple(Affine(site=s, left=r.T.contiguous(), right=r, center=torch.zeros(32), where="all") for s in below)
    with edit.on(model):
        weights = model.logits(IDS)
    with Edit(name="h", base=model.hash(), interventions=maps).on(model):
        torch.testing.assert_close(model.logits(IDS), weights, atol=1e-4, rtol=1e-4)
    assert (model.logits(IDS) - weights).abs().max() > 1e-2


def test_in_the_planted_model_enough_directions_take_the_facts_of_the_forgotten_names_only():
    model, facts = fresh_planted_model(), planted_facts()
    forget = ForgetSet(facts=facts[:FORGOTTEN])
    retain = RetainSet(neighbors=facts[FORGOTTEN:], unknown=tuple(Entity(name=n, kind="person") for n in UNKNOWN))
    edit = DirectionalAblation(layers=(1,), rank=FORGOTTEN).fit(model, forget, retain)
    assert recall(model, forget.facts).value == 1
    with edit.on(model):
        margin = score(model, make_queries(model.tokenizer, forget.facts)).margin
        assert margin.abs().max() < 1e-4  # no object is left that is likelier than the others: greedy decoding is a tie
        assert recall(model, retain.neighbors).value == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "choose 1 to 2"),
        ({"rank": 3}, "choose 1 to 2"),
        ({"mode": "weights", "where": "last"}, "act at every token"),
        ({"mode": "weights", "center": "reference"}, "move a component"),
        ({"layers": (1, 1)}, "each once"),
        ({"kind": "resid_mid"}, "resid_pre or resid_post"),
    ],
)
def test_bad_settings_are_refused(tiny_model, tiny_sets, settings, message):
    with pytest.raises(ValueError, match=message):
        DirectionalAblation(**settings).fit(tiny_model, *tiny_sets)
    with pytest.raises(ValueError, match="no entity of kind"):
        DirectionalAblation().fit(tiny_model, tiny_sets[0], dataclasses.replace(tiny_sets[1], unknown=()))
