"""Anonymised steering: zero strength, anonymous against anonymous, what is steered and what is not, planted truth."""

import pytest
import torch

from mech_unlearn.core import Entity
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import score
from mech_unlearn.restoration import Case
from mech_unlearn.restoration.engine.levels import make_query_set
from mech_unlearn.restoration.profiles import steering_anonymised as steering
from mech_unlearn.restoration.profiles.steering_anonymised import Push
from tests.planted import UNKNOWN, fresh_planted_model, planted_case, planted_model
from tests.tiny import longer, tiny_facts, tiny_hf, tiny_tokenizer

NAMES = tuple(Entity(name=n) for n in UNKNOWN)


def test_at_strength_zero_samples_and_scores_are_those_of_the_plain_model():
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    case = Case(full=model, facts=tiny_facts(["Anna Lee", "Ben Hill"]), unknown=NAMES)
    queries = make_query_set(case, "test").true
    found = steering.vectors(case, model, queries, [1])
    zero, strong = (Push(found[1], c) for c in (0.0, 20.0))
    plain = steering.sample(model, queries, None, 5, 0)
    assert steering.sample(model, queries, (1, zero), 5, 0) == plain
    assert steering.sample(model, queries, (1, strong), 5, 0) != plain
    (same,) = steering.steered_scores(model, queries, [(1, zero)])
    torch.testing.assert_close(same.logprob, score(model, queries).logprob, atol=1e-5, rtol=1e-5)


def test_samples_do_not_depend_on_batches_and_end_where_the_text_ends():
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    case = Case(full=model, facts=tiny_facts(["Anna Lee", "Ben Hill", "Hugo Vale"]), unknown=NAMES)
    queries = make_query_set(case, "test").true
    together, alone = (steering.sample(model, queries, None, 4, 0, max_tokens=n) for n in (8192, 1))
    assert together == alone and together[0] != together[2]
    tokens = model.tokenizer("Rome . Oslo")["input_ids"][1:]
    end = model.tokenizer.eos_token_id
    assert steering.text_of(model.tokenizer, [*tokens[:2], end, tokens[2]]) == "Rome."
    assert steering.text_of(model.tokenizer, tokens) == "Rome. Oslo" and steering.text_of(model.tokenizer, [end]) == ""
    assert [steering.first_word(t) for t in ("Rome, in", " Rome", "'Rome'", "")] == ["Rome", "Rome", "Rome", ""]


def test_only_the_first_token_is_steered():
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    case = Case(full=model, facts=longer(tiny_facts(["Anna Lee", "Ben Hill"])), unknown=NAMES)
    queries = make_query_set(case, "test").true
    assert all({len(a) for a in query.answers} == {1, 2, 3} for query in queries)
    push = Push(steering.vectors(case, model, queries, [2])[2], 4.0)
    (got,) = steering.steered_scores(model, queries, [(2, push)])
    hf = tiny_hf("llama")
    for i, query in enumerate(queries):
        for c, answer in enumerate(query.answers):

            def add(m, a, out, i=i, query=query):
                out = out.clone()
                out[0, len(query.prompt) - 1] += 4.0 * push.vectors[i]
                return out

            with torch.no_grad():
                ids = torch.tensor([[*query.prompt, *answer[:-1]]])
                plain = hf(ids).logits[0].log_softmax(-1)
                handle = hf.model.layers[2].register_forward_hook(add)
                pushed = hf(ids).logits[0].log_softmax(-1)
                handle.remove()
            start = len(query.prompt) - 1
            terms = [(pushed if t == 0 else plain)[start + t, token] for t, token in enumerate(answer)]
            assert got.logprob[i, c].item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-4)


def test_the_vector_is_the_state_minus_the_mean_over_anonymous_names():
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    names = (Entity(name="Hugo West"), Entity(name="Gina Vale"))
    case = Case(full=model, facts=tiny_facts(["Anna Lee"]), unknown=names)
    queries = make_query_set(case, "test").true
    got, hf = steering.vectors(case, model, queries, [1])[1], tiny_hf("llama")

    def state(text):
        with torch.no_grad():
            ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
            return hf(ids, output_hidden_states=True).hidden_states[2][0, -1]

    for i, query in enumerate(queries):
        want = state(query.template.replace("{}", "Anna Lee")) - torch.stack(
            [state(query.template.replace("{}", entity.name)) for entity in names]
        ).mean(0)
        torch.testing.assert_close(got[i], want, atol=1e-5, rtol=1e-4)


def test_anonymous_against_anonymous_gives_nothing():
    case = planted_case(sae=None, unknown=NAMES)
    queries = make_query_set(case, "test").true
    model = planted_model("late")
    shuffled = Push(torch.zeros(len(queries), 64), 4.0)  # the mean of anonymous states minus itself
    both = [steering._caf(case, steering.sample(model, queries, p, 50, 0), queries) for p in (None, (2, shuffled))]
    assert torch.equal(both[0], both[1])


@pytest.mark.slow
def test_planted_truth():
    """The late block outweighs the object at strength 1 only: pushed towards the name's state it comes back."""
    case = planted_case(sae=None, unknown=NAMES)
    ready = steering.prepare(case, samples=4)
    late = steering.audit(case, ready, planted_model("late"), "late")
    assert (late.recoverability > 0.5).all() and (late.columns["caf"] >= late.columns["caf_plain"]).all()
    assert late.alpha in steering.STRENGTHS and f"x{late.alpha:g} layer {late.layer}" in late.flags_of(0)[-1]
    for name, model in (("full", case.full), ("early", planted_model("early")), ("R", case.retrained[0])):
        assert (steering.audit(case, ready, model, name).recoverability < 0.2).all(), name
    full = steering.audit(case, ready, case.full, "full")
    assert full.kappa is not None and (full.kappa > 0.9).all() and full.null.shape == (3, 4)
    assert {"caf", "caf_plain", "caf_R", "dcaf_rho", "confidence", "top_right"} <= set(full.columns)


def test_without_retrained_models_and_without_unknown_names_it_still_runs_and_bad_settings_are_refused():
    case = planted_case(sae=None, retrained=())
    ready = steering.prepare(case, samples=2, strengths=(2.0,))
    result = steering.audit(case, ready, planted_model("late"), "late")
    assert result.grade == "B" and "caf_R" not in result.columns and (result.recoverability > 0.3).all()
    with pytest.raises(ValueError, match="samples=0"):
        steering.prepare(case, samples=0)
    with pytest.raises(ValueError, match="layers in 0..3"):
        steering.prepare(case, layers=[7])


@pytest.mark.slow
def test_models_and_random_state_are_left_alone_and_the_seed_decides():
    case, late = planted_case(sae=None, unknown=NAMES), fresh_planted_model("late")
    state, before = torch.get_rng_state(), late.hash()
    ready = steering.prepare(case, samples=3, strengths=(2.0,))
    a, b = (steering.audit(case, ready, late, "late").columns["caf"] for _ in range(2))
    assert torch.equal(a, b) and late.hash() == before and torch.equal(state, torch.get_rng_state())
