"""Ablating sites against plain hooks, on a planted neuron, and where nothing is to be found."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Site
from mech_unlearn.locate.acting.act import act, act_per_fact
from mech_unlearn.locate.lenses.direct_logit_attribution import direct_logit_attribution_per_fact
from mech_unlearn.locate.neurons.knowledge_neurons import knowledge_neurons_per_fact
from mech_unlearn.locate.patching.activation_patching import activation_patching_per_fact
from mech_unlearn.locate.patching.causal_trace import causal_trace_per_fact
from mech_unlearn.locate.patching.pairs import make_pairs
from mech_unlearn.locate.patching.token_classes import CLASSES
from mech_unlearn.model.answers import answer_rows
from mech_unlearn.model.load import load
from mech_unlearn.testbed import open_world
from tests.planted import WRITER, planted_facts, planted_model
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer

FACTS = tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss"])
PLANTED = planted_facts()


def table(shape, axes, labels, at, facts=()):
    """A result whose values are 1 at the given cells and fall from 0 elsewhere."""
    values = -torch.arange(torch.Size(shape).numel()).float().view(shape) / 1000
    for cell in at:
        values[cell] = 1.0
    if facts:
        values, axes = values.expand(len(facts), *shape), ("fact", *axes)
        labels = {"fact": tuple(f.id for f in facts), **labels}
    return Attribution(name="given", values=values, axes=axes, labels=labels, unit="", n=max(1, len(facts)))


@torch.no_grad()
def plain(model, pair, sites, ablation):
    """Fall of the answer's log-probability with (site, positions, part) ablated, by whole passes with hooks."""
    own, other = (torch.tensor([q.full[:-1]]) for q in (pair.own, pair.other))
    kept = {}
    with model.hooks(*((site, lambda x, site=site: kept.__setitem__(site, x)) for site, _, _ in sites)):
        model.logits(other)

    def write(site, places, part):
        def run(x):
            x = x.clone()
            new = kept[site] if ablation == "resample" else torch.zeros_like(kept[site])
            if part is None:
                x[:, places] = new[:, places]
            else:
                x[:, places, part] = new[:, places, part]
            return x

        return site, run

    def logprob(*writes):
        with model.hooks(*writes):
            out = model.logits(own).log_softmax(-1)[0]
        rows = answer_rows([pair.own])
        return torch.stack([out[p, t] for p, t in zip(rows, pair.own.answers[0], strict=True)]).mean()

    return (logprob() - logprob(*(write(*site) for site in sites))).item()


def asked(fact):
    return [replace(fact, prompt=t, paraphrases=(), heldout=()) for t in fact.paraphrases]


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fall_at_the_top_sites_equals_whole_passes_with_hooks(architecture):
    model = load(tiny_hf(architecture, layers=3), tokenizer=tiny_tokenizer())
    labels = {"token": CLASSES, "layer": (0, 1, 2)}
    result = table((6, 3), ("token", "layer"), labels, [(2, 0), (5, 2)])
    for ablation in ("resample", "zero"):
        found = act_per_fact(model, FACTS[:2], result, k=2, kind="mlp_out", ablation=ablation, others=FACTS)
        pairs = make_pairs(model, [a for f in FACTS[:2] for a in asked(f)], FACTS)
        for value, pair in zip(found.values[:, 0].tolist(), pairs, strict=True):
            query = pair.own
            # "The birthplace of Anna Lee is": the last subject token, and the last of the prompt
            sites = [
                (Site(0, "mlp_out"), [query.span[1] - 1], None),
                (Site(2, "mlp_out"), [len(query.prompt) - 1], None),
            ]
            assert value == pytest.approx(plain(model, pair, sites, ablation), abs=2e-5)
        assert found.values[:, 0].abs().max() > 1e-3


def test_heads_and_neurons_are_ablated_alone_at_the_tokens_that_are_named(tiny_model):
    pairs = make_pairs(tiny_model, [a for f in FACTS[:2] for a in asked(f)], FACTS)
    heads = table((4, 4), ("layer", "head"), {"layer": (0, 1, 2, 3), "head": (0, 1, 2, 3)}, [(1, 3)])
    neurons = {"layer": (0, 1, 2, 3), "neuron": tuple(range(64))}
    one = table((4, 64), ("layer", "neuron"), neurons, [(2, 7)])
    by_head = act_per_fact(tiny_model, FACTS[:2], heads, k=1, at="subject", others=FACTS).values[:, 0]
    by_neuron = act_per_fact(tiny_model, FACTS[:2], one, k=1, others=FACTS).values[:, 0]
    for i, pair in enumerate(pairs):
        span = list(range(*pair.own.span))
        assert by_head[i].item() == pytest.approx(
            plain(tiny_model, pair, [(Site(1, "z"), span, 3)], "resample"), abs=2e-5
        )
        end = answer_rows([pair.own])
        expected = plain(tiny_model, pair, [(Site(2, "mlp_post"), end, 7)], "resample")
        assert by_neuron[i].item() == pytest.approx(expected, abs=2e-5)


def test_each_fact_is_ablated_at_its_own_top_sites_and_a_mean_result_at_the_same(tiny_model):
    labels = {"layer": (0, 1, 2, 3), "head": (0, 1, 2, 3)}
    first, second = (table((4, 4), ("layer", "head"), labels, [cell]) for cell in ((0, 0), (3, 2)))
    both = replace(
        first, values=torch.stack([first.values, second.values]), axes=("fact", "layer", "head"),
        labels={"fact": (FACTS[0].id, FACTS[1].id), **labels},
    )  # fmt: skip
    settings = dict(k=1, at="all", others=FACTS)
    own = act_per_fact(tiny_model, FACTS[:2], both, **settings).values[:, 0]
    expected = [act_per_fact(tiny_model, FACTS[:2], r, **settings).values[i, 0] for i, r in enumerate((first, second))]
    torch.testing.assert_close(own, torch.stack(expected))


def test_a_mean_over_prompts_that_are_all_alike_changes_nothing(tiny_model):
    same = [replace(FACTS[0], id=f"copy {i}") for i in range(3)]
    result = table((6, 4), ("token", "layer"), {"token": CLASSES, "layer": (0, 1, 2, 3)}, [(2, 1)])
    found = act_per_fact(tiny_model, same, result, k=1, kind="resid_post", ablation="mean", others=FACTS)
    assert found.values.abs().max() < 1e-5


def test_the_planted_neuron_hurts_and_random_neurons_do_not():
    """The planted model has no attention, so that the name is also the place where the answer is read."""
    model = planted_model()
    found = knowledge_neurons_per_fact(model, PLANTED, which="prompt")
    assert all(found.values[i].argmax() // found.values.shape[2] == WRITER for i in range(len(PLANTED)))
    for ablation in ("resample", "zero"):
        fall = act(model, PLANTED, found, k=1, ablation=ablation)
        value = dict(zip(fall.labels["sites"], fall.values.tolist(), strict=True))
        low = dict(zip(fall.labels["sites"], fall.low.tolist(), strict=True))
        assert value["top"] > 1 and abs(value["anywhere"]) < 0.2
        assert low["top - anywhere"] > 0 and low["top - same layers"] > 0
        assert fall.n == len(PLANTED) and "8 groups" in fall.note


def test_values_drawn_at_random_point_nowhere():
    model = planted_model()
    found = knowledge_neurons_per_fact(model, PLANTED, which="prompt")
    noise = torch.rand(found.values.shape, generator=torch.Generator().manual_seed(0))
    fall = act(model, PLANTED, replace(found, values=noise), k=4, random_draws=40)
    at = fall.labels["sites"].index("top - anywhere")
    assert fall.low[at] <= 0 <= fall.high[at]


@pytest.mark.slow
def test_in_the_world_acting_where_tracing_points_hurts_and_where_it_points_least_does_not():
    world = open_world("biographies")
    model, facts, others = load(world.full), world.forget.facts[::20], world.retain.neighbors
    seen = [replace(f, paraphrases=(), heldout=()) for f in facts]
    traced = causal_trace_per_fact(model, seen, kind="mlp_out", window=1, samples=4)
    settings = dict(k=2, kind="mlp_out", others=others, which="heldout", random_draws=8)
    top, bottom = (act(model, facts, traced, rank=rank, **settings) for rank in ("high", "low"))
    controls = [i for i, name in enumerate(top.labels["sites"]) if name.startswith("top - ")]
    assert len(controls) == 3 and (top.low[controls] > 1).all()
    assert bottom.values[0] < 0.3


def test_components_and_results_with_unmeasured_cells_can_be_acted_on(tiny_model):
    parts = direct_logit_attribution_per_fact(tiny_model, FACTS, by="layer")
    found = act_per_fact(tiny_model, FACTS, parts, k=2, others=FACTS)
    assert found.labels["sites"] == ("top", "anywhere", "same layers", "top - anywhere", "top - same layers")
    assert not found.values[:, :2].isnan().any()
    torch.testing.assert_close(found.values[:, 3], found.values[:, 0] - found.values[:, 1])
    heads = direct_logit_attribution_per_fact(tiny_model, FACTS, by="head")
    assert not act_per_fact(tiny_model, FACTS, heads, k=3, others=FACTS).values[:, :2].isnan().any()
    wide = activation_patching_per_fact(tiny_model, FACTS, others=FACTS)
    assert "subject" in wide.labels["token"]
    assert act_per_fact(tiny_model, FACTS, wide, k=2, kind="resid_post", others=FACTS).values.shape == (6, 7)


def test_the_same_seed_gives_the_same_falls_whatever_the_batch(tiny_model):
    result = table((6, 4), ("token", "layer"), {"token": CLASSES, "layer": (0, 1, 2, 3)}, [(2, 1)])
    state = torch.get_rng_state()
    settings = dict(k=2, kind="attn_out", others=FACTS, random_draws=5)
    one, small = (act_per_fact(tiny_model, FACTS, result, **settings, max_tokens=n).values for n in (10_000, 30))
    torch.testing.assert_close(one, small, atol=1e-5, rtol=1e-4)
    other = act_per_fact(tiny_model, FACTS, result, **settings, seed=1).values
    assert torch.equal(torch.get_rng_state(), state) and not torch.allclose(one[:, 1], other[:, 1])


def test_bad_settings_are_refused(tiny_model):
    result = table((6, 4), ("token", "layer"), {"token": CLASSES, "layer": (0, 1, 2, 3)}, [])
    for settings, message in (
        (dict(kind=None), "give kind="),
        (dict(kind="z"), "sites of axes"),
        (dict(at="nowhere"), "choose one of first subject"),
        (dict(ablation="noise"), "choose resample"),
        (dict(rank="best"), "choose high"),
        (dict(k=0), "at least one"),
        (dict(k=40), "lower k"),
    ):
        with pytest.raises(ValueError, match=message):
            act(tiny_model, FACTS, result, **{"k": 1, "kind": "mlp_out", "others": FACTS, **settings})
    with pytest.raises(ValueError, match="has no values for fact"):
        act(
            tiny_model,
            FACTS,
            table((6, 4), ("token", "layer"), dict(result.labels), [], FACTS[:1]),
            k=1,
            kind="mlp_out",
        )
    with pytest.raises(ValueError, match="has no phrasing of kind 'paraphrases'"):
        act(tiny_model, [replace(f, paraphrases=()) for f in FACTS], result, k=1, kind="mlp_out")
    with pytest.raises(ValueError, match="acting needs"):
        act(tiny_model, FACTS, replace(result, axes=("layer", "token"), values=result.values.T), k=1)
