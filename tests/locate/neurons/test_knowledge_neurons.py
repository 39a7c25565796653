"""Attributions equal a plain implementation layer by layer, add up, and rank a planted neuron first."""

import sys
from dataclasses import replace

import pytest
import torch

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact, Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.locate.neurons.knowledge_neurons import (
    knowledge_neurons,
    knowledge_neurons_per_fact,
    located_neurons,
    mean_scores,
)
from mech_unlearn.locate.neurons.neuron_attribution import neuron_attribution
from mech_unlearn.locate.neurons.neuron_scores import neuron_scores
from mech_unlearn.methods.writing.keys import count_forwards
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import make_queries, make_query
from tests.planted import OBJECTS, WRITER, fresh_planted_model, object_of, planted_facts, planted_model
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer

MODULE = sys.modules[knowledge_neurons.__module__]  # the package gives the function of the same name
LONG = Fact(id="long", subject="Cara Moss", relation="born", object="West Oslo", prompt="The birthplace of {} is")
FACTS = (*tiny_facts(["Anna Lee", "Ben Hill"]), LONG)


def value(logits, gold, target):
    if target == "logit":
        return logits[..., gold]
    return logits.log_softmax(-1)[..., gold] if target == "logprob" else logits.softmax(-1)[..., gold]


def plain(model, query, alphas, weights, kind="mlp_post", target="probability"):
    """Attributions [layer, neuron]: one whole forward pass per layer, point and answer token."""
    total = []
    for layer in range(model.n_layers):
        site, out = Site(layer, kind), 0
        for t, gold in enumerate(query.answers[0]):
            ids = torch.tensor([(query.prompt + query.answers[0])[: len(query.prompt) + t]])
            kept: list[torch.Tensor] = []
            with torch.no_grad(), model.hooks((site, lambda x, kept=kept: kept.append(x[0, -1].clone()))):
                model.logits(ids)
            for alpha, weight in zip(alphas, weights, strict=True):
                leaf = (alpha * kept[0]).requires_grad_()
                with model.hooks((site, lambda x, leaf=leaf: torch.cat([x[:, :-1], leaf[None, None]], 1))):
                    p = value(model.logits(ids)[0, -1], gold, target)
                out = out + weight * torch.autograd.grad(p, leaf)[0] * kept[0]
        total.append(out)
    return torch.stack(total)


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sweep_equals_one_plain_run_per_layer_also_for_answers_of_several_tokens(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    queries = make_queries(model.tokenizer, FACTS, "prompt", distractors=False)
    assert max(len(query.answers[0]) for query in queries) > 1
    found = neuron_attribution(model, queries, steps=4)
    pre = neuron_attribution(model, queries, steps=4, activation="pre", target="logprob")
    for i in (0, len(queries) - 1):
        assert relative(found[i], plain(model, queries[i], [0, 0.25, 0.5, 0.75], [0.25] * 4)) < 1e-4
        expected = plain(model, queries[i], [0, 0.25, 0.5, 0.75], [0.25] * 4, "mlp_pre", "logprob")
        assert relative(pre[i], expected) < 1e-4
    assert (pre - found).abs().max() > 1e-3
    assert all(weight.grad is None for weight in model.held.values())


@pytest.mark.thorough
@pytest.mark.parametrize(
    "rule, alphas, weights",
    [
        ("right", (0.5, 1), (0.5, 0.5)),
        ("midpoint", (0.25, 0.75), (0.5, 0.5)),
        ("trapezoid", (0, 0.5, 1), (0.25, 0.5, 0.25)),
    ],
)
def test_each_rule_has_its_points_and_each_target_its_gradient(tiny_model, rule, alphas, weights):
    query = make_query(tiny_model.tokenizer, LONG, LONG.prompt)
    for target in ("probability", "logprob", "logit"):
        found = neuron_attribution(tiny_model, [query], steps=2, rule=rule, target=target)[0]
        assert relative(found, plain(tiny_model, query, alphas, weights, target=target)) < 1e-4


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("activation", ["post", "pre"])
def test_a_layers_attributions_add_up_to_the_change_of_the_probability(architecture, activation):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    query = make_query(model.tokenizer, FACTS[0], FACTS[0].prompt)
    found = neuron_attribution(model, [query], steps=200, rule="trapezoid", activation=activation)[0].sum(-1)
    ids, gold = torch.tensor([query.prompt]), query.answers[0][0]

    def zero(x):
        x = x.clone()
        x[:, -1] = 0
        return x

    with torch.no_grad():
        clean = model.logits(ids)[0, -1].softmax(-1)[gold]
        for layer in range(model.n_layers):
            with model.hooks((Site(layer, f"mlp_{activation}"), zero)):
                change = clean - model.logits(ids)[0, -1].softmax(-1)[gold]
            assert found[layer].item() == pytest.approx(change.item(), rel=0.02, abs=1e-5)


@pytest.mark.slow
def test_batches_and_bounds_change_nothing(tiny_model):
    queries = make_queries(tiny_model.tokenizer, FACTS[2:], "templates", distractors=False)
    one = neuron_attribution(tiny_model, queries, steps=5)
    for bound in (3, 64):
        torch.testing.assert_close(neuron_attribution(tiny_model, queries, steps=5, max_tokens=bound), one)
    state = torch.get_rng_state()
    with torch.no_grad():
        torch.testing.assert_close(neuron_attribution(tiny_model, queries[:1], steps=5), one[:1])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_planted_neuron_of_each_fact_ranks_first_and_not_for_another_answer():
    facts, model = planted_facts(), planted_model()
    found = knowledge_neurons_per_fact(model, facts)
    assert found.axes == ("fact", "layer", "neuron") and found.n == len(facts)
    wrong = tuple(replace(f, object=OBJECTS[(object_of(e) + 1) % 4], distractors=()) for e, f in enumerate(facts))
    shuffled = knowledge_neurons_per_fact(model, wrong)
    for e in range(len(facts)):
        best = found.values[e].argmax().item()
        assert divmod(best, found.values.shape[2]) == (WRITER, e)
        assert found.values[e, WRITER, e] > 0.05
        assert shuffled.values[e].max() < 1e-6 and shuffled.values[e, WRITER, e] < 0


def test_a_neuron_planted_by_hand_is_found_only_once_it_is_there():
    model, facts = fresh_planted_model("retrained"), planted_facts()[:1]
    before = knowledge_neurons(model, facts)
    assert not before.top(1) or before.top(1)[0][1] < 1e-3
    gold = model.tokenizer.convert_tokens_to_ids(facts[0].object)
    mlp = {name: w for name, w in model.held.items() if ".3.mlp." in name}
    with torch.no_grad():
        for name, weight in mlp.items():
            if "down" in name:
                weight[:, 11] = 0.1 * model.held["lm_head.weight"][gold]
            else:
                weight[11, 8] = 1.0  # the axis of "a person"
    labels, size = knowledge_neurons(model, facts).top(1)[0]
    assert labels == {"layer": 3, "neuron": 11} and size > 0.05


def test_the_mean_over_facts_has_the_intervals_of_the_table_per_fact(tiny_model):
    facts = tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss"])[:5]
    found = knowledge_neurons(tiny_model, facts, steps=3)
    expected = knowledge_neurons_per_fact(tiny_model, facts, steps=3).mean(facts)
    assert found.axes == ("layer", "neuron") and found.n == 5 and len(found.top(7)) == 7
    for name in ("values", "low", "high"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-7, rtol=1e-4)
    alone = knowledge_neurons(tiny_model, facts[:2], steps=3)
    assert alone.low.isnan().all() and alone.values.isfinite().all()


def test_the_mean_does_not_depend_on_how_many_facts_are_held(tiny_model, monkeypatch):
    facts = tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss"])
    one = knowledge_neurons(tiny_model, facts, steps=3)
    monkeypatch.setattr(MODULE, "HELD", 1)
    torch.testing.assert_close(knowledge_neurons(tiny_model, facts, steps=3).high, one.high)


def test_the_raw_activation_is_that_of_the_model_at_the_last_token(tiny_model):
    found = knowledge_neurons_per_fact(tiny_model, FACTS[:1], which="prompt", method="activation")
    query = make_query(tiny_model.tokenizer, FACTS[0], FACTS[0].prompt)
    kept: list[torch.Tensor] = []
    with torch.no_grad(), tiny_model.hooks((Site(2, "mlp_post"), lambda x: kept.append(x[0, -1]))):
        tiny_model.logits(torch.tensor([query.prompt]))
    torch.testing.assert_close(found.values[0, 2], kept[0])
    assert found.unit == "activation"


def test_bad_input_is_refused(tiny_model, monkeypatch):
    for wrong in ({"steps": 0}, {"rule": "up"}, {"target": "loss"}, {"activation": "mid"}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            knowledge_neurons(tiny_model, FACTS, **wrong)
    with pytest.raises(ValueError, match="at least one"):
        knowledge_neurons(tiny_model, ())
    with pytest.raises(ValueError, match="given twice"):
        knowledge_neurons(tiny_model, (FACTS[0], FACTS[0]))
    with pytest.raises(ValueError, match="at least one"):
        neuron_attribution(tiny_model, [])
    edit = Edit(
        name="shift",
        base=tiny_model.hash(),
        interventions=(Shift(Site(1, "resid_post"), ((5,),), torch.ones(1, tiny_model.d_model)),),
    )
    with edit.on(tiny_model):
        with pytest.raises(ValueError, match="interventions is in force"):
            knowledge_neurons(tiny_model, FACTS)
        query = make_query(tiny_model.tokenizer, FACTS[0], FACTS[0].prompt)
        tiny_model.logits(torch.tensor([query.prompt]))
    monkeypatch.setattr(MODULE, "PER_FACT", 1)
    with pytest.raises(ValueError, match="more than a gigabyte"):
        knowledge_neurons_per_fact(tiny_model, FACTS)


def test_the_mean_of_kept_scores_and_its_interval_are_those_of_the_same_scores_as_a_dense_table(tiny_model):
    facts = tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss"])
    scores = neuron_scores(tiny_model, facts, steps=4, floor=0.3)
    table = torch.zeros(len(facts), scores.n_layers, scores.d_mlp)
    for (fact, _, layer, neuron), value in zip(scores.entries.tolist(), scores.values.tolist(), strict=True):
        table[fact, layer, neuron] += value / scores.phrasings[fact]
    axes = ("fact", "layer", "neuron")
    labels = dict(zip(axes, map(tuple, map(range, table.shape)), strict=True))
    dense = Attribution(name="", values=table, axes=axes, labels=labels, unit="", n=6).mean(facts)
    sparse = mean_scores(scores)
    assert sparse.values.count_nonzero() > 10 and sparse.n == 6
    for ours, theirs in ((sparse.values, dense.values), (sparse.low, dense.low), (sparse.high, dense.high)):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)


def test_located_neurons_goes_on_from_its_folder(tiny_model, tmp_path):
    facts = tiny_facts(["Anna Lee", "Ben Hill"])
    first = located_neurons(tiny_model, facts, folder=tmp_path / "scores", steps=4)
    with count_forwards(tiny_model) as forwards:
        again = located_neurons(tiny_model, facts, folder=tmp_path / "scores", steps=4)
    assert forwards == [0] and torch.equal(first.values, again.values)
