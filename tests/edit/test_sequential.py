"""Requests one after another: earlier edits in force, none retained against another, and one edit that does it all."""

import pytest
import torch

from mech_unlearn.core import Entity, ForgetSet, RetainSet, Site
from mech_unlearn.edit.edit import Edit
from mech_unlearn.edit.sequential import fit_sequence, requests, without
from mech_unlearn.methods import GradDiff, Memit, Npo, Rocr
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.questions import Optimize
from mech_unlearn.metrics import recall
from mech_unlearn.model.load import load
from mech_unlearn.training.schedule import Schedule
from tests.planted import FORGOTTEN, fresh_planted_model, planted_facts
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer

FAST = Schedule(lr=1e-3, epochs=1, batch_size=4)
FEW = Optimize(steps=5, max_prompts=4, n_prefixes=0)
PEOPLE = ["Anna Lee", "Ben Hill", "Cara Moss", "Dan Park", "Eva Reed", "Finn Stone"]
UNKNOWN = tuple(Entity(name=name, kind="person") for name in ("Gina Vale", "Hugo West", "Gina West", "Hugo Vale"))


@pytest.mark.parametrize(("size", "counts"), ((1, [1] * 8), (3, [3, 3, 2]), (10, [8]), (50, [8])))
def test_requests_hold_so_many_entities_and_every_fact_once(size, counts):
    facts = tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss", "Dan Park", "Eva Reed", "Finn Stone", "Gina Vale", "Hugo"])
    mixed = facts[::2] + facts[1::2]
    parts = requests(ForgetSet(facts=mixed), size)
    assert [len(part.entities) for part in parts] == counts
    assert sorted(f.id for part in parts for f in part.facts) == sorted(f.id for f in facts)
    with pytest.raises(ValueError, match="at least 1 entity"):
        requests(ForgetSet(facts=facts), 0)


class Spy:
    """A method that remembers what it was given and in what state the model was."""

    def __init__(self, method):
        self.method, self.seen = method, []

    def fit(self, model, forget, retain):
        self.seen.append((model.hash(), forget, retain))
        return self.method.fit(model, forget, retain)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_each_request_is_fitted_on_what_the_earlier_ones_left_and_the_model_ends_as_it_was(dtype, tiny_sets):
    model = load(tiny_hf("llama").to(dtype), tokenizer=tiny_tokenizer())
    before, spy, told = model.hash(), Spy(GradDiff(schedule=FAST)), []
    parts = requests(tiny_sets[0], 1)
    whole = fit_sequence(spy, model, parts, tiny_sets[1], lambda *args: told.append((*args, model.hash())))
    assert model.hash() == before and whole.base == before
    assert [i for i, *_ in told] == [0, 1] and {h for *_, h in told} == {before}
    assert spy.seen[0][0] == before
    with told[0][2].on(model):
        assert model.hash() == spy.seen[1][0] == told[1][1].base != before
    assert [forget for _, forget, _ in spy.seen] == list(parts)


def test_the_composed_edit_does_what_its_parts_do_in_turn_up_to_rounding(tiny_model, tiny_sets):
    own = []
    forget = ForgetSet(facts=tiny_facts(["Anna Lee", "Ben Hill", "Hugo West"]))
    whole = fit_sequence(
        GradDiff(schedule=FAST), tiny_model, requests(forget, 1), tiny_sets[1], lambda _, e, __: own.append(e)
    )
    ids = torch.tensor([[2, 4, 12, 30, 31]])
    with whole.on(tiny_model):
        at_once = {n: w.detach().clone() for n, w in tiny_model.held.items()}
        logits = tiny_model.logits(ids)
    with own[0].on(tiny_model), own[1].on(tiny_model), own[2].on(tiny_model):
        for name, weight in tiny_model.held.items():
            torch.testing.assert_close(at_once[name], weight.detach(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(tiny_model.logits(ids), logits, atol=1e-4, rtol=1e-4)
    first = {n: d for n, d in own[0].deltas.items()}
    assert any(not torch.equal(whole.deltas[n], first[n]) for n in first)


def test_a_fact_of_any_request_is_never_retained_under_whatever_id(tiny_model, tiny_sets):
    from dataclasses import replace

    forget, retain = tiny_sets
    hidden = RetainSet(
        neighbors=(*retain.neighbors, forget.facts[0]),
        same_subject=(replace(forget.facts[2], id="another id"),),
        general=(forget.facts[3],),
        texts=retain.texts,
    )
    spy = Spy(Npo(schedule=FAST))
    fit_sequence(spy, tiny_model, requests(forget, 1), hidden)
    assert all(kept == RetainSet(neighbors=retain.neighbors, texts=retain.texts) for _, _, kept in spy.seen)
    assert without(retain, ()) == retain


def test_one_request_is_the_method_itself(tiny_model, tiny_sets):
    one = fit_sequence(Npo(schedule=FAST), tiny_model, requests(tiny_sets[0], 50), tiny_sets[1])
    plain = Npo(schedule=FAST).fit(tiny_model, *tiny_sets)
    assert one.deltas.keys() == plain.deltas.keys()
    assert all(torch.equal(one.deltas[n], plain.deltas[n]) for n in plain.deltas)


def test_the_recipe_adds_up_and_the_edit_can_be_saved(tiny_model, tiny_sets, tmp_path):
    edit = fit_sequence(Rocr(layers=(1,)), tiny_model, requests(tiny_sets[0], 1), tiny_sets[1])
    parts = edit.recipe["composed_of"]
    assert edit.recipe["method"] == "rocr" and edit.recipe["report"]["requests"] == len(parts) == 2
    assert edit.recipe["report"]["n_forward"] == sum(p["report"]["n_forward"] for p in parts)
    edit.save(tmp_path / "edit.safetensors")
    assert Edit.load(tmp_path / "edit.safetensors", tiny_model).recipe["report"]["requests"] == 2


def test_planted_facts_forgotten_one_by_one_stay_forgotten():
    model, facts = fresh_planted_model(), planted_facts()
    forget, retain = ForgetSet(facts=facts[:FORGOTTEN]), RetainSet(neighbors=facts[FORGOTTEN:])
    so_far = []
    where = r"layers\.2\.mlp\.down"  # where the names are told apart
    method = GradDiff(schedule=Schedule(lr=1e-2, epochs=20, batch_size=5, stop_recall=0.0), trainable=where)
    fit_sequence(method, model, requests(forget, 1), retain, lambda _, __, all_of: so_far.append(all_of))
    for i, edit in enumerate(so_far):
        with edit.on(model):
            assert recall(model, facts[i : i + 1]).value <= 0.2
            assert recall(model, facts[: i + 1]).value < 0.5  # a later request may wake an earlier answer a little
            assert recall(model, facts[FORGOTTEN:]).value >= 0.8
    assert recall(model, facts).value == 1.0


def test_no_request_is_refused(tiny_model, tiny_sets):
    with pytest.raises(ValueError, match="no request"):
        fit_sequence(Npo(schedule=FAST), tiny_model, (), tiny_sets[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", (Rocr(layers=(0, 1), protect=()), Memit(layers=(0, 1), optimize=FEW)))
def test_requests_before_are_named_to_a_method_that_can_keep_them_and_drift_less(method, tiny_model):
    facts = tiny_facts(PEOPLE)
    retain = RetainSet(neighbors=tiny_facts(["Cara West", "Dan Stone"]), unknown=UNKNOWN)
    first, site = [PEOPLE[0]], Site(1, "resid_post")
    contexts = keys.contexts_of(facts)

    def drift(method):
        states = []

        def look(_, __, so_far):
            with so_far.on(tiny_model):
                states.append(keys.name_states(tiny_model, first, contexts, site))

        whole = fit_sequence(method, tiny_model, requests(ForgetSet(facts=facts), 1), retain, look)
        return (states[-1] - states[0]).norm(), whole.recipe

    told, recipe = drift(method)
    alone, _ = drift(Spy(method))  # whose settings nobody sees
    assert told < 0.5 * alone
    assert [part["settings"]["earlier"] for part in recipe["composed_of"]] == [tuple(PEOPLE[:i]) for i in range(6)]
