"""KnowledgeNeuronErase: the planted neurons are found and zeroed, and nothing else; thresholds as in the paper."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.locate.neurons.neuron_attribution import neuron_attribution
from mech_unlearn.methods import KnowledgeNeuronErase
from mech_unlearn.methods.knowledge_neuron_update import Refinement
from mech_unlearn.metrics.recall import recall
from mech_unlearn.model.tokens import make_queries
from tests.planted import FORGOTTEN, WRITER, fresh_planted_model, planted_facts
from tests.tiny import tiny_facts

PLANTED = ForgetSet(facts=planted_facts()[:FORGOTTEN])


def refined_slowly(model, fact, threshold, sharing, min_prompts):
    """From the paper's sections 3.2 and 3.3: per phrasing what reaches the threshold, per fact what phrasings share."""
    queries = make_queries(model.tokenizer, [fact], distractors=False)
    counts = Counter()
    for values in neuron_attribution(model, queries):
        counts.update(map(tuple, ((values >= threshold * values.max()) & (values > 0)).nonzero().tolist()))
    return {x for x, n in counts.items() if n >= sharing * len(queries) and n >= min_prompts}


def erased(edit):
    return {tuple(x) for x in edit.recipe["report"]["neurons"]}


def test_each_planted_fact_loses_its_own_neuron_and_is_forgotten_while_others_stay():
    model = fresh_planted_model()
    edit = KnowledgeNeuronErase().fit(model, PLANTED, RetainSet())
    assert erased(edit) == {(WRITER, e) for e in range(FORGOTTEN)}
    assert (recall(model, PLANTED.facts).value, recall(model, planted_facts()[FORGOTTEN:]).value) == (1, 1)
    with edit.on(model):
        assert recall(model, PLANTED.facts).value == 0
        assert recall(model, planted_facts()[FORGOTTEN:]).value == 1
        weight = model.held[model.w_out(WRITER)[0]].detach()
        assert not weight[:, :FORGOTTEN].any() and weight[:, FORGOTTEN : 2 * FORGOTTEN].any(0).all()
    assert edit.recipe["report"]["forget_recall_before"] == 1 and edit.recipe["report"]["forget_recall_after"] == 0


def test_the_neurons_are_those_of_the_papers_thresholds(tiny_model):
    facts = tuple(
        replace(f, paraphrases=(*f.paraphrases, "the sea and {} in", "Rivers run to {} and"))
        for f in tiny_facts(["Anna Lee", "Ben Hill"], ("born",))
    )
    edit = KnowledgeNeuronErase(refinement=Refinement(threshold=0.15, min_prompts=2)).fit(
        tiny_model, ForgetSet(facts=facts), RetainSet()
    )
    rate = edit.recipe["report"]["sharing"]["born"]  # moved, as fewer than 2 neurons per fact reach 0.7
    wanted = [refined_slowly(tiny_model, fact, 0.15, rate - 1e-9, 2) for fact in facts]
    assert erased(edit) == set.union(*wanted) and erased(edit)


def test_a_relation_gives_its_most_frequent_neurons(tiny_model):
    facts = tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss"])
    forget, refinement = ForgetSet(facts=facts), Refinement(min_prompts=1)
    all_of_them = KnowledgeNeuronErase(which="relation", share=0.0, refinement=refinement).fit(
        tiny_model, forget, RetainSet()
    )
    two = KnowledgeNeuronErase(which="relation", n=2, refinement=refinement).fit(tiny_model, forget, RetainSet())
    assert len(erased(two)) <= 4 < len(erased(all_of_them))
    sets = refinement.sets(tiny_model, facts)
    for relation in ("born", "works"):
        counts = Counter(x for f in facts if f.relation == relation for x in sets.neurons[f.id])
        best = sorted(counts.values(), reverse=True)[:2]
        own = [counts[x] for x in erased(two) if x in counts]
        assert sorted(own, reverse=True)[:2] >= best or sum(own) >= sum(best)


def test_given_neurons_are_erased_without_any_attribution(tiny_model, tiny_sets):
    edit = KnowledgeNeuronErase(neurons=((0, 3), (0, 4), (3, 63))).fit(tiny_model, *tiny_sets)
    with edit.on(tiny_model):
        for layer, gone in ((0, [3, 4]), (3, [63])):
            weight = tiny_model.held[tiny_model.w_out(layer)[0]].detach()
            assert (~weight.any(0)).nonzero().flatten().tolist() == gone
    assert edit.recipe["report"]["n_backward"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "has 2 phrasings, needs 3"),
        ({"neurons": ((9, 0),)}, "layers 0..3"),
        ({"n": 0}, "n must be 1"),
    ],
)
def test_bad_input_is_refused(tiny_model, tiny_sets, settings, message):
    with pytest.raises(ValueError, match=message):
        KnowledgeNeuronErase(**settings).fit(tiny_model, *tiny_sets)
    assert torch.isfinite(tiny_model.held[tiny_model.w_out(0)[0]]).all()
