"""KnowledgeNeuronUpdate: the update of the paper's equation, and what is left alone."""

import pytest
import torch

from mech_unlearn.core import Entity, ForgetSet, RetainSet
from mech_unlearn.locate.neurons.neuron_sets import NeuronSets
from mech_unlearn.methods import KnowledgeNeuronUpdate
from mech_unlearn.methods.knowledge_neuron_update import Refinement, rare
from mech_unlearn.metrics.recall import recall
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import make_queries
from tests.planted import FORGOTTEN, OBJECTS, WRITER, fresh_planted_model, planted_facts
from tests.tiny import tiny_hf, tiny_tokenizer

FACTS = planted_facts()
ONE = ForgetSet(facts=FACTS[:1])


def answer(model, fact):
    (query,) = make_queries(model.tokenizer, [fact], "prompt")
    return model.tokenizer.decode(model.logits(torch.tensor([query.prompt]))[0, -1].argmax())


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ("gpt2", "gpt_neox", "llama", "gemma2", "olmo2"))
def test_the_update_is_that_of_the_equation(architecture, tiny_sets):
    forget = ForgetSet(facts=tiny_sets[0].facts[:1])
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    edit = KnowledgeNeuronUpdate(max_share=1.0, others=0, refinement=Refinement(min_prompts=1)).fit(
        model, forget, tiny_sets[1]
    )
    (pair,), (own,) = edit.recipe["report"]["tokens"].values(), edit.recipe["report"]["neurons"].values()
    assert pair[0] == forget.facts[0].object and pair[1] in forget.facts[0].distractors and own
    head = model.hf.get_output_embeddings().weight.detach()
    old, new = (head[model.tokenizer.convert_tokens_to_ids(word)] for word in pair)
    for layer, j in own:
        name, first = model.w_out(layer)
        gain = torch.ones(32)
        if architecture in ("gemma2", "olmo2"):  # what the residual stream receives is gain * v, up to a length
            last = "post_feedforward_layernorm"
            weight = model.held[f"model.layers.{layer}.{last}.weight"].detach()
            gain = weight + 1 if architecture == "gemma2" else weight
        v = model.held[name].detach()[j] if first else model.held[name].detach()[:, j]
        e_old, e_new = old / gain, new / gain
        wanted = v - v.norm() / e_old.norm() * e_old + 8 * v.norm() / e_new.norm() * e_new
        with edit.on(model):
            after = model.held[name].detach()[j] if first else model.held[name].detach()[:, j]
            torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-4)


def test_a_planted_fact_gets_the_new_answer_and_others_keep_theirs():
    model = fresh_planted_model()
    edit = KnowledgeNeuronUpdate(to="text", text="Oslo").fit(model, ONE, RetainSet(neighbors=FACTS[1:]))
    assert edit.recipe["report"]["neurons"] == {FACTS[0].id: [[WRITER, 0]]}
    with edit.on(model):
        assert answer(model, FACTS[0]) == "Oslo" != FACTS[0].object
        assert recall(model, FACTS[1:]).value == 1
    opposite = KnowledgeNeuronUpdate(to="text", text="Oslo", lambda_old=0.0, lambda_new=0.0).fit(
        model, ONE, RetainSet()
    )
    with opposite.on(model):
        assert answer(model, FACTS[0]) == FACTS[0].object


def test_the_new_answer_can_be_what_the_model_says_of_an_unknown_entity():
    model = fresh_planted_model()
    retain = RetainSet(unknown=(Entity(name="Lee", kind="person"),))
    edit = KnowledgeNeuronUpdate(to="unknown").fit(model, ONE, retain)
    (query,) = make_queries(model.tokenizer, ONE.facts, "prompt")
    prompt = torch.tensor([[*query.prompt[:-1], model.tokenizer.convert_tokens_to_ids("Lee")]])
    said = model.tokenizer.decode(model.logits(prompt)[0, -1].argmax())
    assert edit.recipe["report"]["tokens"][FACTS[0].id] == [FACTS[0].object, said]


def test_a_distractor_is_drawn_by_the_seed():
    model, drawn = fresh_planted_model(), set()
    for seed in range(6):
        edit = KnowledgeNeuronUpdate(seed=seed).fit(model, ONE, RetainSet())
        drawn.add(edit.recipe["report"]["tokens"][FACTS[0].id][1])
    assert len(drawn) > 1 and drawn <= set(OBJECTS) - {FACTS[0].object}


def test_neurons_that_more_than_a_tenth_of_the_other_facts_use_are_left_alone():
    facts = FACTS  # 8 facts of one relation: one other is 1/7 > 10 %, none is 0
    neurons = {f.id: ((1, 0),) for f in facts} | {facts[0].id: ((1, 0), (1, 1)), facts[1].id: ((1, 1), (1, 2))}
    sets = NeuronSets(facts=facts, neurons=neurons, sharing={"born": 0.7}, n_layers=2, d_mlp=8)
    assert rare(sets, facts[0], 0.1) == ()
    assert rare(sets, facts[1], 0.1) == ((1, 2),)
    assert rare(sets, facts[0], 1 / 7) == ((1, 1),)
    assert rare(sets, facts[0], 1.0) == ((1, 0), (1, 1))
    alone = NeuronSets(facts=facts[:1], neurons=neurons, sharing={"born": 0.7}, n_layers=2, d_mlp=8)
    assert rare(alone, facts[0], 0.1) == ((1, 0), (1, 1))  # its own use does not count against it


def test_a_forget_fact_without_a_neuron_of_its_own_is_named():
    model = fresh_planted_model()
    with pytest.raises(ValueError, match="no forget fact has a neuron of its own"):
        same = tuple(f for f in FACTS if f.id != FACTS[0].id)
        twin = type(FACTS[0])(**{**vars(FACTS[0]), "id": "twin"})
        KnowledgeNeuronUpdate().fit(model, ONE, RetainSet(neighbors=(twin, *same)))
    edit = KnowledgeNeuronUpdate().fit(model, ForgetSet(facts=FACTS[:FORGOTTEN]), RetainSet())
    assert edit.recipe["report"]["unchanged"] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "text"}, "text= with"),
        ({"text": "Oslo"}, "text= with"),
        ({"max_share": 2.0}, "max_share=2.0"),
        ({"to": "unknown"}, "no entity of kind"),
        ({"to": "text", "text": "zürich"}, "no token for the new answer"),
    ],
)
def test_bad_input_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KnowledgeNeuronUpdate(**settings).fit(fresh_planted_model(), ONE, RetainSet())
