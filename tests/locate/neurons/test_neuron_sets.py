"""Stores resume, refined sets follow the paper's rule by hand, and scaling neurons does what plain hooks do."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import Fact, Site
from mech_unlearn.locate.neurons.neuron_attribution import Scoring, neuron_attribution
from mech_unlearn.locate.neurons.neuron_interventions import (
    Scaling,
    amplify,
    neuron_effects,
    neuron_effects_per_fact,
    scaled_probability,
    suppress,
)
from mech_unlearn.locate.neurons.neuron_scores import NeuronScores, neuron_scores
from mech_unlearn.locate.neurons.neuron_sets import NeuronSets, overlap, random_like, refine, relation_neurons
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import make_queries
from mech_unlearn.testbed import open_world
from tests.planted import WRITER, planted_facts, planted_model
from tests.tiny import tiny_facts

FACTS = tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss"])


def fact(name, relation):
    return Fact(id=name, subject=name, relation=relation, object="x", prompt="{} is")


def handmade(table, relations):
    """Scores from {fact: [per phrasing {(layer, neuron): value}]}."""
    rows = [
        (f, p, *at, value)
        for f, phrasings in enumerate(table)
        for p, some in enumerate(phrasings)
        for at, value in sorted(some.items())
    ]
    return NeuronScores(
        facts=tuple(fact(f"f{i}", relation) for i, relation in enumerate(relations)),
        phrasings=tuple(len(phrasings) for phrasings in table),
        entries=torch.tensor([row[:4] for row in rows], dtype=torch.int32),
        values=torch.tensor([row[4] for row in rows]),
        scoring=Scoring(),
        floor=0.1,
        n_layers=4,
        d_mlp=8,
    )


def test_a_store_keeps_the_scores_above_the_floor(tiny_model):
    found = neuron_scores(tiny_model, FACTS, steps=3)
    dense = neuron_attribution(tiny_model, make_queries(tiny_model.tokenizer, FACTS, distractors=False), steps=3)
    table = torch.zeros(len(FACTS), 2, *dense.shape[1:])
    table[tuple(found.entries.long().T)] = found.values
    largest = dense.flatten(1).amax(1)[:, None, None]
    torch.testing.assert_close(table.flatten(0, 1), torch.where(dense >= 0.1 * largest, dense, 0.0))
    few = neuron_scores(tiny_model, FACTS, steps=3, top=2)
    assert len(few.values) == 2 * 2 * len(FACTS) and len(found.to_frame()) == len(found.values)


def test_a_finished_folder_is_read_and_an_unfinished_one_is_gone_on_with(tiny_model, tmp_path):
    folder = tmp_path / "neurons"
    calls = []
    handle = tiny_model.bridge.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    settings = dict(steps=3, folder=folder, facts_per_shard=2)
    first = neuron_scores(tiny_model, FACTS, **settings)
    everything = len(calls)
    again = neuron_scores(tiny_model, FACTS, **settings, max_tokens=16)
    assert len(calls) == everything > 0
    assert torch.equal(first.entries, again.entries) and torch.equal(first.values, again.values)
    (folder / "000001.safetensors").unlink()
    resumed = neuron_scores(tiny_model, FACTS, **settings)
    assert everything < len(calls) < 2 * everything
    assert torch.equal(first.entries, resumed.entries)
    handle.remove()
    assert sorted(path.name for path in folder.iterdir()) == [
        "000000.safetensors",
        "000001.safetensors",
        "000002.safetensors",
        "manifest.json",
    ]
    together = neuron_scores(tiny_model, FACTS, steps=3)
    assert torch.equal(together.entries, first.entries)
    for other in ({"steps": 4}, {"floor": 0.2}, {"which": "prompt"}, {"rule": "right"}):
        with pytest.raises(ValueError, match="name another"):
            neuron_scores(tiny_model, FACTS, **{**settings, **other})
    with torch.no_grad():
        next(iter(tiny_model.held.values())).mul_(1.5)
    with pytest.raises(ValueError, match="model differ"):
        neuron_scores(tiny_model, FACTS, **settings)


def test_refinement_follows_threshold_share_and_count():
    a, b, c, d = (0, 1), (1, 2), (2, 3), (3, 4)
    table = [[{a: 1.0, b: 0.2, c: 0.19}, {a: 1.0, b: 0.3, d: 0.5}, {a: 0.5, b: 1.0}, {a: 0.1, d: 1.0}]]
    sets = refine(handmade(table, ["r"]), wanted=None)
    assert sets.neurons == {"f0": (a, b)} and sets.sharing == {"r": 0.7}
    assert refine(handmade(table, ["r"]), wanted=None, sharing=0.9).neurons == {"f0": ()}
    assert refine(handmade(table, ["r"]), wanted=None, threshold=0.1, sharing=1.0).neurons == {"f0": (a,)}
    assert refine(handmade(table, ["r"]), wanted=None, sharing=0.1, min_prompts=2).neurons == {"f0": (a, b, d)}
    with pytest.raises(ValueError, match="floor"):
        refine(handmade(table, ["r"]), threshold=0.05)
    with pytest.raises(ValueError, match="has 2 phrasings"):
        refine(handmade([table[0][:2]], ["r"]))


def test_the_sharing_rate_of_a_relation_is_moved_until_its_sets_have_the_wanted_size():
    few = [{(0, j): 1.0 for j in range(2)}] * 6 + [{(1, 0): 1.0}] * 4  # 2 neurons in 60 % of the phrasings
    many = [{(0, j): 1.0 for j in range(6)}] * 8 + [{(0, j): 1.0 for j in range(4)}] * 2  # 6 in 80 %, 4 in all
    sets = refine(handmade([few, many], ["few", "many"]))
    assert len(sets.neurons["f0"]) == 2 and sets.sharing["few"] == pytest.approx(0.6)
    assert len(sets.neurons["f1"]) == 4 and sets.sharing["many"] == pytest.approx(0.85)
    stuck = refine(handmade([few, many], ["few", "many"]), rounds=1)
    assert stuck.neurons["f0"] == () and len(stuck.neurons["f1"]) == 6


def sets_of(neurons, relations, d_mlp=8):
    facts = tuple(fact(f"f{i}", relation) for i, relation in enumerate(relations))
    return NeuronSets(
        facts=facts,
        neurons={f.id: tuple(some) for f, some in zip(facts, neurons, strict=True)},
        sharing=dict.fromkeys(relations, 0.7),
        n_layers=4,
        d_mlp=d_mlp,
    )


def test_overlap_counts_shared_neurons_within_and_across_relations():
    a, b, c, d = (0, 1), (1, 2), (2, 3), (3, 4)
    sets = sets_of([[a, b], [a, b, c], [a, d], [d]], ["r", "r", "s", "s"], d_mlp=1000)
    frame = overlap(sets).set_index(["neurons", "quantity"])
    value = frame["value"]
    assert value["refined", "neurons per fact"] == 2 == value["random", "neurons per fact"]
    assert value["refined", "shared within a relation"] == pytest.approx((2 + 1) / 2)
    assert value["refined", "shared across relations"] == pytest.approx((1 + 0 + 1 + 0) / 4)
    assert value["random", "shared within a relation"] < 0.1
    assert frame["n"].tolist() == [4, 2, 4] * 2
    assert (frame["low"] <= frame["value"]).all() and (frame["value"] <= frame["high"]).all()
    assert relation_neurons(sets, "r") == [a, b, c] and relation_neurons(sets, "s", share=0.6) == [d]
    with pytest.raises(ValueError, match="no fact of relation"):
        relation_neurons(sets, "t")


def test_random_neurons_keep_the_layers_and_avoid_the_given_ones():
    own = [(0, 0), (0, 1), (3, 5)]
    drawn = random_like(own, 4, torch.Generator().manual_seed(0))
    assert [layer for layer, _ in drawn] == [0, 0, 3] and not set(drawn) & set(own) and len(set(drawn)) == 3
    with pytest.raises(ValueError, match="too few"):
        random_like([(0, 0), (0, 1), (0, 2)], 4, torch.Generator())


def plain_probability(model, query, neurons, factor, where):
    def scale(x, layer):
        x = x.clone()
        first = len(query.prompt) - 1 if where == "answer" else 0
        for at, j in neurons:
            if at == layer:
                x[:, first:, j] *= factor
        return x

    hooks = [
        (Site(layer, "mlp_post"), lambda x, layer=layer: scale(x, layer)) for layer in {layer for layer, _ in neurons}
    ]
    with torch.no_grad(), model.hooks(*hooks):
        logits = model.logits(torch.tensor([query.full[:-1]]))[0, len(query.prompt) - 1 :].log_softmax(-1)
    return logits.gather(1, torch.tensor(query.answers[0])[:, None]).mean().exp().item()


@pytest.mark.thorough
@pytest.mark.parametrize("where", ["answer", "all"])
def test_scaled_neurons_equal_plain_hooks(tiny_model, where):
    long = replace(FACTS[0], id="long", object="West Oslo", distractors=())
    queries = make_queries(tiny_model.tokenizer, [*FACTS, long], "templates", distractors=False)
    some = [((0, 3), (2, 9), (2, 10)), ((1, 5),), ((3, 0), (1, 7))]
    jobs = [
        Scaling(q, some[(q + k) % 3], factor) for q in range(len(queries)) for k, factor in enumerate((0.0, 2.0, 30.0))
    ]
    for bound in (8192, 30):
        before, after = scaled_probability(tiny_model, queries, jobs, where=where, max_tokens=bound)
        for job, p in zip(jobs, after.tolist(), strict=True):
            expected = plain_probability(tiny_model, queries[job.query], job.neurons, job.factor, where)
            assert p == pytest.approx(expected, rel=1e-4)
        assert ((after - before[[job.query for job in jobs]]).abs() > 1e-5).float().mean() > 0.5


def test_planted_neurons_carry_their_fact_and_no_other():
    facts = tuple(
        replace(f, relation=f"r{i % 2}") for i, f in enumerate(planted_facts())
    )  # two relations, so that each fact has another to be compared with
    model = planted_model()
    sets = refine(neuron_scores(model, facts), wanted=None)
    assert sets.neurons == {f.id: ((WRITER, e),) for e, f in enumerate(facts)}
    effects = neuron_effects(model, sets)
    value = dict(zip(effects.labels["change"], effects.values.tolist(), strict=True))
    (own_down, other_down), random_down = value["suppress"]
    (own_up, other_up), random_up = value["amplify"]
    assert own_down < -0.5 and own_up > 0  # P is 0.99 already
    assert max(map(abs, (other_down, other_up, *random_down, *random_up))) < 1e-4
    assert effects.high[0, 0, 0] < 0 < effects.low[1, 0, 0]
    queries = make_queries(model.tokenizer, facts[:1], distractors=False)
    assert (suppress(model, queries, sets.neurons["Anna"]) < amplify(model, queries, sets.neurons["Anna"])).all()


def test_facts_without_neurons_or_without_another_fact_are_nan(tiny_model):
    facts = FACTS[:1]
    sets = NeuronSets(facts=facts, neurons={facts[0].id: ()}, sharing={"born": 0.7}, n_layers=4, d_mlp=64)
    assert neuron_effects_per_fact(tiny_model, sets).values.isnan().all()
    sets = replace(sets, neurons={facts[0].id: ((0, 1),)})
    found = neuron_effects_per_fact(tiny_model, sets).values
    assert found[..., 0].isfinite().all() and found[..., 1].isnan().all()


def test_bad_scalings_are_refused(tiny_model):
    queries = make_queries(tiny_model.tokenizer, FACTS[:1], "prompt", distractors=False)
    for job, what in ((Scaling(0, (), 0.0), "at least one"), (Scaling(0, ((0, 64),), 0.0), "neuron")):
        with pytest.raises(ValueError, match=what):
            scaled_probability(tiny_model, queries, [job])
    with pytest.raises(ValueError, match="where"):
        scaled_probability(tiny_model, queries, [], where="first")


@pytest.fixture(scope="module")
def biographies():
    world = open_world("biographies")
    by_relation = {}
    for item in world.forget.facts:
        by_relation.setdefault(item.relation, []).append(item)
    return load(world.full), tuple(item for some in by_relation.values() for item in some[:3])


@pytest.mark.slow
def test_phrasing_halves_of_a_fact_share_more_neurons_than_different_facts(biographies):
    model, facts = biographies
    halves = [
        refine(
            neuron_scores(model, [replace(f, prompt=p[0], paraphrases=p[1:]) for f, p in zip(facts, part)], steps=10),
            min_prompts=2,
        ).neurons
        for part in (
            [tuple(f.templates[k] for k in (0, 2)) for f in facts],
            [tuple(f.templates[k] for k in (1, 3)) for f in facts],
        )
    ]

    def jaccard(a, b):
        return len(set(a) & set(b)) / max(1, len(set(a) | set(b)))

    same = [jaccard(halves[0][f.id], halves[1][f.id]) for f in facts]
    different = [jaccard(halves[0][f.id], halves[1][g.id]) for f in facts for g in facts if f.subject != g.subject]
    assert sum(same) / len(same) > 2 * sum(different) / len(different) > 0


@pytest.mark.slow
def test_suppressing_lowers_the_probability_far_more_than_random_neurons(biographies):
    model, facts = biographies
    effects = neuron_effects_per_fact(model, refine(neuron_scores(model, facts, steps=10))).values
    down = effects[~effects[:, 0, 0, 0].isnan(), 0]
    assert len(down) > 0.7 * len(facts)
    assert (down[:, 0, 0] < 0).float().mean() >= 0.7
    assert down[:, 0, 0].mean() < 10 * -down[:, 1, 0].abs().mean()
    assert down[:, 0, 0].mean() < 10 * -down[:, 0, 1].abs().mean()


@pytest.mark.slow
def test_amplifying_raises_the_probability_where_it_is_not_near_one_already(biographies):
    model, _ = biographies
    facts = open_world("biographies").forget.facts
    asked = make_queries(model.tokenizer, facts, "heldout", distractors=False)
    unsure = tuple(f for f, p in zip(facts, scaled_probability(model, asked, [])[0], strict=True) if p < 0.9)
    assert len(unsure) >= 10
    effects = neuron_effects_per_fact(model, refine(neuron_scores(model, unsure, steps=10)), which="heldout").values
    up = effects[~effects[:, 1, 0, 0].isnan(), 1]
    assert (up[:, 0, 0] > 0).float().mean() >= 0.7
    assert (up[:, 0, 0] > up[:, 1, 0]).float().mean() >= 0.7
    assert up[:, 0, 0].mean() > 0.01 > up[:, 1, 0].mean()
