"""Patchscopes: the identity, an independent reference, what each reader is blind to, and planted truth."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import Entity
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import score
from mech_unlearn.restoration import Case
from mech_unlearn.restoration.engine.levels import make_query_set
from mech_unlearn.restoration.states import patchscopes
from mech_unlearn.restoration.states.patchscopes import PatchPoint, PatchQueries
from tests.planted import UNKNOWN, fresh_planted_model, planted_case, planted_model
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ("gpt2", "llama", "gemma2", "gpt_neox"))
def test_the_same_model_prompt_position_and_layer_change_nothing(architecture):
    models = [load(tiny_hf(architecture, seed=s), tokenizer=tiny_tokenizer()) for s in (0, 1)]
    case = Case(full=models[0], retrained=(models[1],), facts=tiny_facts(["Anna Lee", "Ben Hill"]))
    queries = make_query_set(case, "test").true
    same = PatchQueries(case.facts, queries, {"relation": queries})
    places = [PatchPoint(layer, "relation", layer) for layer in range(case.full.n_layers)]
    margin, _ = patchscopes.read(same, case.full, case.full, places)
    plain = score(case.full, queries).margin.clamp(min=0)
    torch.testing.assert_close(margin, plain.expand_as(margin), atol=2e-5, rtol=0)
    crossed, _ = patchscopes.read(same, case.full, case.full, [PatchPoint(0, "relation", 2)])
    assert (crossed - plain).abs().max() > 1e-3


def test_a_state_put_elsewhere_agrees_with_plain_transformers_hooks():
    models = [load(tiny_hf("llama", seed=s), tokenizer=tiny_tokenizer()) for s in (0, 1)]
    facts = tiny_facts(["Anna Lee", "Ben Hill"])
    case = Case(full=models[0], retrained=(models[1],), facts=facts, unknown=(Entity(name="Hugo West"),))
    asked = patchscopes.make_asked(case, make_query_set(case, "test").true, facts, ("relation",))
    got, _ = patchscopes.read(asked, case.retrained[0], case.full, [PatchPoint(3, "relation", 1)])
    source, target = tiny_hf("llama", seed=1), tiny_hf("llama", seed=0)
    for i, (query, into) in enumerate(zip(asked.queries, asked.targets["relation"], strict=True)):
        kept = {}
        first = source.model.layers[3].register_forward_hook(lambda m, a, out, k=kept: k.__setitem__("h", out.clone()))
        with torch.no_grad():
            source(torch.tensor([query.prompt]))
        first.remove()

        def patch(m, a, out, at=into.span[1] - 1, h=kept["h"][0, query.span[1] - 1]):
            out = out.clone()
            out[0, at] = h
            return out

        handle = target.model.layers[1].register_forward_hook(patch)
        values = []
        for answer in into.answers:
            with torch.no_grad():
                table = target(torch.tensor([[*into.prompt, *answer[:-1]]])).logits[0].log_softmax(-1)
            start = len(into.prompt) - 1
            values.append(sum(table[start + t, token] for t, token in enumerate(answer)) / len(answer))
        handle.remove()
        margin = values[0] - torch.stack(values[1:]).logsumexp(0) + torch.tensor(float(len(values) - 1)).log()
        assert got[0, i].item() == pytest.approx(max(0.0, margin.item()), abs=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("target", ("full", "self"))
def test_planted_truth(target):
    case = planted_case(sae=None)
    ready = patchscopes.prepare(case, target=target)
    got = {t: patchscopes.audit(case, ready, planted_model(t), t) for t in ("late", "early", "full")}
    assert (got["full"].recoverability > 0.999).all() and (got["full"].columns["choice_F"] == 1).all()
    assert (got["early"].recoverability < 0.1).all()
    below = got["late"].curves["kappa"][:2]  # the name is there, its object not yet: who reads it decides
    assert (got["late"].recoverability > 0.7).all()
    assert (below > 0.9).all() if target == "full" else (below < 0.3).all()  # its own last layer blocks
    retrained = patchscopes.audit(case, ready, case.retrained[0], "R")
    assert (retrained.recoverability < 0.1).all() and (retrained.null < 0.1).all()


def test_the_prompts_are_made_of_the_cases_words_and_never_state_the_answer():
    case = planted_case(sae=None, unknown=tuple(Entity(name=n) for n in UNKNOWN))
    queries = make_query_set(case, "test").true
    for prompt in ("relation", "description"):
        for i, query in enumerate(queries):
            ask = patchscopes.target_ask(case, query, prompt, i)
            assert ask is not None and query.fact.object not in ask.prompt and query.fact.subject not in ask.prompt
            assert ask.prompt.endswith(UNKNOWN[i % 4])
    # every other object is a candidate here, so that there is no word left to repeat
    assert patchscopes.target_ask(case, queries[0], "identity", 0) is None
    case = Case(full=case.full, facts=tiny_facts(["Anna Lee"])[:1], others=tiny_facts(["Ben Hill", "Cara Moss"]))
    ask = patchscopes.target_ask(case, make_query_set(case, "test").true[0], "identity", 0)
    assert ask is not None and ask.prompt.split() == ["Acme", "Acme", "Globex", "Globex", "x"]


@pytest.mark.slow
def test_places_are_chosen_without_the_audited_model():
    case = planted_case(sae=None)
    a, b = patchscopes.prepare(case), patchscopes.prepare(case)
    assert a.places == b.places
    assert [p.source for p in a.places] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_prompt_that_lacks_words_for_one_fact_is_used_for_none_and_the_log_says_so():
    """`description` needs two other facts of the relation; only the last of twelve facts has none."""
    said: list[str] = []
    people = tiny_facts(
        [f"{a} {b}" for a in ("Anna", "Ben", "Cara") for b in ("Lee", "Hill", "Moss", "Park")], ("born",)
    )
    odd = tiny_facts(["Dan Reed"], ("works",))
    for facts in ((*people, *odd), (*odd, *people)):
        for retrained in ((load(tiny_hf("llama", seed=1), tokenizer=tiny_tokenizer()),), ()):
            model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
            others = tiny_facts(["Eva Lee", "Finn Hill", "Gina Moss", "Hugo Park"], ("born",))
            case = Case(full=model, retrained=retrained, facts=facts, others=others, log=said.append)
            ready = patchscopes.prepare(case, prompts=("relation", "description"))
            assert {place.prompt for place in ready.places} == {"relation"}
            assert any("description" in line for line in said)
            assert patchscopes.audit(case, ready, model, "full").score_raw.isfinite().all()
            said.clear()


@pytest.mark.slow
def test_the_facts_that_choose_the_places_are_drawn_with_the_seed(monkeypatch):
    seen: list[tuple[str, ...]] = []
    plain = patchscopes.pick_places

    def watched(case, asked, layers):
        seen.append(tuple(fact.id for fact in asked.facts))
        return plain(case, asked, layers)

    monkeypatch.setattr(patchscopes, "pick_places", watched)
    facts = tiny_facts(
        [f"{a} {b}" for a in ("Anna", "Ben", "Cara") for b in ("Lee", "Hill", "Moss", "Park")], ("born",)
    )
    for seed in (0, 0, 1):
        models = [load(tiny_hf("llama", seed=s), tokenizer=tiny_tokenizer()) for s in (0, 1)]
        case = Case(full=models[0], retrained=(models[1],), facts=facts, seed=seed)
        patchscopes.prepare(case, prompts=("relation",), target_layers=[0])
    assert seen[0] == seen[1] != seen[2] and len(seen[0]) == 10
    assert all(chosen != tuple(fact.id for fact in facts[:10]) for chosen in seen)


def test_without_retrained_models_sham_facts_give_the_level():
    case = planted_case(sae=None, retrained=())
    ready = patchscopes.prepare(case)
    late = patchscopes.audit(case, ready, planted_model("late"), "late")
    assert late.grade == "B" and (late.recoverability > 0.9).all()
    assert (patchscopes.audit(case, ready, planted_model("early"), "early").recoverability < 0.1).all()


@pytest.mark.slow
def test_bad_settings_are_refused_and_models_are_left_alone():
    case = planted_case(sae=None)
    with pytest.raises(ValueError, match="target layers"):
        patchscopes.prepare(case, target_layers=[9])
    with pytest.raises(ValueError, match="no prompt"):
        patchscopes.prepare(planted_case(sae=None, others=()), prompts=("description",))
    bare = (*case.facts[1:], replace(case.facts[0], distractors=()))
    with pytest.raises(ValueError, match="no distractors"):
        patchscopes.prepare(planted_case(sae=None, facts=bare))
    late, state = fresh_planted_model("late"), torch.get_rng_state()
    before, ready = late.hash(), patchscopes.prepare(case)
    a, b = (patchscopes.audit(case, ready, late, "late").recoverability for _ in range(2))
    assert torch.equal(a, b) and late.hash() == before and torch.equal(state, torch.get_rng_state())
