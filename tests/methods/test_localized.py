"""Localized: exactly the named entries move, and the planted neurons suffice where others do nothing."""

import pytest
import torch

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.locate.neurons.knowledge_neurons import knowledge_neurons
from mech_unlearn.methods import Localized, Npo
from mech_unlearn.methods.localized import head_masks, neuron_masks, sites_of
from mech_unlearn.metrics import recall
from mech_unlearn.model.load import load
from mech_unlearn.training.schedule import Schedule
from tests.planted import FORGOTTEN, WRITER, fresh_planted_model, planted_facts
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

FAST = Schedule(lr=1e-3, epochs=1, batch_size=4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_neurons_entries_are_those_that_its_activation_depends_on_and_writes(architecture):
    """Against the model itself: zeroing row and column j, and only these, makes neuron j silent."""
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    masks = neuron_masks(model, [(1, 5), (1, 9), (2, 0)])
    assert all(".1.mlp." in n or ".2.mlp." in n for n in masks)
    into = [n for n in masks if n != model.w_out(1)[0] and ".1." in n]
    assert len(into) == (1 if architecture in ("gpt2", "gpt_neox") else 2)
    seen, ids = [], torch.tensor([[2, 8, 9, 30]])
    out, by_neuron = model.w_out(1)
    plain = model.plain_copy()
    weights = dict(plain.named_parameters())
    handle = plain.get_submodule(out.removesuffix(".weight")).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        plain(ids)
        for name in into:
            weights[name].masked_fill_(masks[name], 0.0)
            bias = name.removesuffix("weight") + "bias"
            if bias in weights:
                weights[bias].zero_()
                assert bias not in masks
        plain(ids)
    handle.remove()
    changed = (seen[0] != seen[1]).any(dim=(0, 1)) if not plain.config.model_type.startswith("gpt") else None
    if changed is not None:
        assert changed.nonzero()[:, 0].tolist() == [5, 9]
    assert seen[1][..., [5, 9]].abs().max() == 0
    lines = masks[out].any(1) if by_neuron else masks[out].any(0)
    assert lines.nonzero()[:, 0].tolist() == [5, 9] and masks[out].sum() == 2 * model.d_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_heads_entries_are_those_that_its_output_comes_from(architecture):
    """Against the model: with W_O restricted to the head's columns, only the head's own rows matter."""
    model = load(tiny_hf(architecture, layers=1), tokenizer=tiny_tokenizer())
    head, ids = 2, torch.tensor([[2, 8, 9, 30, 12]])
    masks = head_masks(model, [(0, head)])
    (out,) = [n for n in masks if n.split(".")[-2] in ("o_proj", "dense", "c_proj")]
    plain = model.plain_copy()
    weights = dict(plain.named_parameters())

    def logits():
        with torch.no_grad():
            return plain(ids).logits

    with torch.no_grad():
        weights[out].masked_fill_(~masks[out], 0.0)
        alone = logits()
        for name, mask in masks.items():  # queries of all other heads: no effect
            if name != out and name.split(".")[-2] in ("q_proj", "c_attn", "query_key_value"):
                noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
                kept = weights[name].clone()
                weights[name].add_(noise * ~mask)
                if architecture != "olmo2":  # whose queries are normalised over all heads together
                    torch.testing.assert_close(logits(), alone, atol=1e-4, rtol=1e-4)
                weights[name].copy_(kept + noise * mask)
                assert (logits() - alone).abs().max() > 1e-3
                weights[name].copy_(kept)
    grouped = architecture in ("llama", "gemma2", "qwen3", "olmo2")
    assert any("k_proj" in n for n in masks) is False
    both = head_masks(model, [(0, 2), (0, 3)])
    assert any("k_proj" in n for n in both) is grouped  # heads 2 and 3 share their keys and values


@pytest.mark.parametrize(
    ("settings", "wanted"),
    (
        (dict(layers=(1,)), lambda n: ".1.mlp." in n),
        (dict(layers=(1, 3), part="attention"), lambda n: ".1.self_attn." in n or ".3.self_attn." in n),
        (dict(layers=(2,), part="block"), lambda n: ".2." in n),
    ),
)
def test_layers_train_the_named_part_and_nothing_else(tiny_model, tiny_sets, settings, wanted):
    edit = Localized(base=Npo(schedule=FAST), **settings).fit(tiny_model, *tiny_sets)
    assert edit.deltas.keys() == {n for n in tiny_model.held if wanted(n)}


def test_neurons_and_heads_move_exactly_their_entries_and_add_up_with_layers(tiny_model, tiny_sets):
    neurons, heads = ((1, 3), (1, 7)), ((2, 0),)
    base = Npo(schedule=Schedule(lr=1e-3, epochs=2, batch_size=4, weight_decay=1.0))
    edit = Localized(base=base, neurons=neurons, heads=heads, layers=(0,)).fit(tiny_model, *tiny_sets)
    masks = {**neuron_masks(tiny_model, neurons), **head_masks(tiny_model, heads)}
    whole = {n for n in tiny_model.held if ".0.mlp." in n}
    assert edit.deltas.keys() == masks.keys() | whole
    for name, mask in masks.items():
        moved = edit.deltas[name] != 0
        assert not (moved & ~mask).any() and (moved & mask).sum() > 0.9 * mask.sum()
    sizes = sum(int(m.sum()) for m in masks.values()) + sum(tiny_model.held[n].numel() for n in whole)
    assert edit.recipe["report"]["trained_parameters"] == sizes
    inside = Localized(base=base, neurons=((0, 1),), layers=(0,)).fit(tiny_model, *tiny_sets)
    assert all((inside.deltas[n] != 0).float().mean() > 0.9 for n in whole)  # a layer holds its neurons


def table(axes, values, **labels):
    return Attribution(name="x", values=values, axes=axes, labels=labels, unit="u", n=1)


def test_sites_are_the_largest_entries_of_an_attribution():
    values = torch.tensor([[0.0, 5.0, 1.0], [4.0, float("nan"), -9.0]])
    got = sites_of(table(("layer", "neuron"), values, layer=(0, 1), neuron=(0, 1, 2)), 2)
    assert got == {"neurons": ((0, 1), (1, 0))}
    got = sites_of(table(("layer", "head"), values, layer=(0, 1), head=(0, 1, 2)), 1)
    assert got == {"heads": ((0, 1),)}
    got = sites_of(table(("token", "layer"), values, token=("subject", "last"), layer=(3, 4, 5)), 3)
    assert got == {"layers": (4, 3, 5)}
    with pytest.raises(ValueError, match="none of layers"):
        sites_of(table(("token", "fact"), values, token=(0, 1), fact=(0, 1, 2)), 1)
    with pytest.raises(ValueError, match="not a numbered layer"):
        sites_of(table(("token", "layer"), values, token=(0, 1), layer=("embed", "a", "b")), 1)


def test_located_neurons_suffice_to_forget_the_planted_facts_and_others_do_not():
    model, facts = fresh_planted_model(), planted_facts()
    forget, retain = ForgetSet(facts=facts[:FORGOTTEN]), RetainSet(neighbors=facts[FORGOTTEN:])
    found = knowledge_neurons(model, forget.facts, target="logit", steps=8)
    base = Npo(schedule=Schedule(lr=3e-2, epochs=12, batch_size=8, weight_decay=0.0))
    method = Localized.at(found, FORGOTTEN, base=base)
    assert {layer for layer, _ in method.neurons} == {WRITER} and {n for _, n in method.neurons} == {0, 1, 2, 3}
    edit = method.fit(model, forget, retain)
    assert recall(model, forget.facts).value == recall(model, retain.facts).value == 1.0
    with edit.on(model):
        assert recall(model, forget.facts).value < 0.1
        assert recall(model, forget.facts, "heldout").value < 0.1
        assert recall(model, retain.facts).value == 1.0
    silent = tuple((WRITER, n) for n in (10, 11, 12, 13))  # units that read and write nothing
    assert not Localized(base=base, neurons=silent).fit(model, forget, retain).deltas


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({}, "no sites"),
        (dict(layers=(9,)), "no layer 9; layers 0..3"),
        (dict(neurons=((0, 64),)), "no neuron 64 in layer 0; neurons 0..63"),
        (dict(neurons=((7, 0),)), "no layer 7"),
        (dict(heads=((0, 4),)), "no head 4 in layer 0; heads 0..3"),
    ),
)
def test_sites_that_do_not_exist_are_refused(tiny_model, tiny_sets, settings, message):
    with pytest.raises(ValueError, match=message):
        Localized(**settings).fit(tiny_model, *tiny_sets)


def test_a_block_without_the_part_says_what_it_holds(tiny_sets):
    model = load(tiny_hf("opt"), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="no mlp by name in .*, which holds .*fc1.*; give neurons= or heads="):
        Localized(base=Npo(), layers=(1,)).fit(model, *tiny_sets)
