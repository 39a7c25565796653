"""Needle: one column changes, every other entry stays, even in training with decay; planted vectors are found."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.methods import Needle
from mech_unlearn.methods.writing.columns import best_neurons
from mech_unlearn.metrics.recall import recall
from mech_unlearn.model.load import load
from tests.planted import FORGOTTEN, WRITER, fresh_planted_model, planted_facts
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer


def column(model, layer, j):
    name, stored_in_first = model.w_out(layer)
    weight = model.held[name].detach()
    return weight[j] if stored_in_first else weight[:, j]


def changed(model, edit):
    """The (layer, index) of value vectors that differ under the edit; any other difference fails."""
    before = {name: weight.detach().clone() for name, weight in model.held.items()}
    out = []
    with edit.on(model):
        for name, weight in model.held.items():
            different = weight.detach() != before[name]
            if not different.any():
                continue
            layer = next(at for at in range(model.n_layers) if model.w_out(at)[0] == name)
            neurons = different.any(1 if model.w_out(layer)[1] else 0)
            out += [(layer, j) for j in neurons.nonzero().flatten().tolist()]
    return sorted(out)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_chosen_vectors_change(architecture, dtype, tiny_sets):
    model = load(tiny_hf(architecture).to(dtype), tokenizer=tiny_tokenizer())
    for mode in ("noise", "zero", "mean"):
        edit = Needle(vectors=((0, 7), (2, 63)), mode=mode).fit(model, *tiny_sets)
        assert changed(model, edit) == [(0, 7), (2, 63)]
        if mode == "zero":
            with edit.on(model):
                assert not column(model, 0, 7).any()


def test_the_mean_of_the_layer_stands_in_for_the_vector(tiny_model, tiny_sets):
    name = tiny_model.w_out(1)[0]
    with Needle(vectors=((1, 5),), mode="mean").fit(tiny_model, *tiny_sets).on(tiny_model):
        after = column(tiny_model, 1, 5).clone()
    torch.testing.assert_close(after, tiny_model.held[name].detach().mean(1), atol=1e-6, rtol=1e-5)


def test_noise_has_the_asked_length_relative_to_the_vector_or_the_papers_absolute_size(tiny_model, tiny_sets):
    many = tuple((layer, j) for layer in range(4) for j in range(64))
    ratio = Needle(vectors=many, ratio=3.0).fit(tiny_model, *tiny_sets)
    assert torch.tensor(ratio.recipe["report"]["change_over_norm"]).mean().item() == pytest.approx(3.0, rel=0.05)
    absolute = Needle(vectors=many, std=0.1).fit(tiny_model, *tiny_sets)
    noise = torch.cat([absolute.deltas[tiny_model.w_out(layer)[0]].dense().flatten() for layer in range(4)])
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    other = Needle(vectors=many, ratio=3.0, seed=1).fit(tiny_model, *tiny_sets)
    name = tiny_model.w_out(0)[0]
    assert not torch.equal(ratio.deltas[name].dense(), other.deltas[name].dense())


@pytest.mark.parametrize("architecture", ("gpt2", "llama", "olmo2"))
def test_training_moves_the_chosen_vectors_only_even_with_weight_decay(architecture, tiny_sets):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    vectors = ((1, 3), (2, 5))
    schedule = replace(Needle.schedule, epochs=2, batch_size=2, weight_decay=0.01)
    trained = Needle(vectors=vectors, schedule=schedule).fit(model, *tiny_sets)
    assert changed(model, trained) == [(1, 3), (2, 5)]
    report = trained.recipe["report"]
    assert report["n_backward"] > 0 and report["steps"] > 0
    plain = Needle(vectors=vectors).fit(model, *tiny_sets)
    name = model.w_out(1)[0]
    assert not torch.equal(trained.deltas[name].dense(), plain.deltas[name].dense())


def test_the_planted_vector_is_found_and_without_it_the_fact_is_gone_while_others_stay():
    model, facts = fresh_planted_model(), planted_facts()
    forget, kept = facts[:1], facts[1:FORGOTTEN]
    edit = Needle(mode="zero", n=2).fit(model, ForgetSet(facts=forget), RetainSet())
    assert sorted(edit.recipe["report"]["vectors"]) == [[WRITER, 0], [WRITER, 4]]  # both names with this object
    assert recall(model, forget).value == 1
    with edit.on(model):
        assert recall(model, forget).value == 0
        assert recall(model, kept).value == 1
    other = Needle(vectors=((WRITER, 9),), mode="noise", ratio=5.0).fit(model, ForgetSet(facts=forget), RetainSet())
    with other.on(model):
        assert recall(model, forget).value == 1


def test_each_entity_has_vectors_of_its_own_and_those_that_are_given_are_not_searched():
    model, facts = fresh_planted_model(), planted_facts()
    both = Needle(mode="zero", n=1).fit(model, ForgetSet(facts=facts[:2]), RetainSet()).recipe["report"]
    alone = [
        Needle(mode="zero", n=1).fit(model, ForgetSet(facts=(f,)), RetainSet()).recipe["report"] for f in facts[:2]
    ]
    assert both["found"] == {**alone[0]["found"], **alone[1]["found"]} and len(both["found"]) == 2
    assert both["vectors"] == [*alone[0]["vectors"], *alone[1]["vectors"]]
    given = Needle(vectors=((0, 1),)).fit(model, ForgetSet(facts=facts[:2]), RetainSet()).recipe["report"]
    assert given["found"] == {} and given["vectors"] == [[0, 1]]


def test_the_best_neurons_of_an_attribution_can_be_given():
    labels = {"layer": (1, 3), "neuron": (0, 1, 2)}
    values = torch.tensor([[0.0, 5.0, 1.0], [4.0, float("nan"), 0.0]])
    found = Attribution(name="a", values=values, axes=("layer", "neuron"), labels=labels, unit="u", n=1)
    assert best_neurons(found, 2) == ((1, 1), (3, 0))
    flat = Attribution(name="a", values=values[0], axes=("neuron",), labels={"neuron": (0, 1, 2)}, unit="u", n=1)
    with pytest.raises(ValueError, match="one over"):
        best_neurons(flat, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vectors": ((4, 0),)}, "layers 0..3"),
        ({"vectors": ((0, 64),)}, "neurons 0..63"),
        ({"vectors": ()}, "at least one"),
        ({"ratio": 0.0}, "out of range"),
        ({"n": 0}, "out of range"),
    ],
)
def test_bad_settings_are_refused(tiny_model, tiny_sets, settings, message):
    with pytest.raises(ValueError, match=message):
        Needle(**settings).fit(tiny_model, *tiny_sets)
