"""Emphasis: nothing at beta zero, attention stays a causal distribution and moves to the subject, prompts name it."""

import pytest
import torch

from mech_unlearn.model.load import load
from mech_unlearn.model.scores import score
from mech_unlearn.model.tokens import make_queries
from mech_unlearn.restoration import Case
from mech_unlearn.restoration.engine.levels import make_query_set
from mech_unlearn.restoration.prompts import keyword
from tests.planted import planted_case, planted_model
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer


def people_case(retrained=(1, 2)):
    models = [load(tiny_hf("llama", seed=s), tokenizer=tiny_tokenizer()) for s in (0, *retrained)]
    return Case(full=models[0], retrained=tuple(models[1:]), facts=tiny_facts(["Anna Lee", "Ben Hill"]))


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "opt"])
def test_beta_moves_attention_to_the_subject_and_keeps_it_causal_and_summing_to_one(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    queries = make_queries(model.tokenizer, tiny_facts(["Anna Lee"]), "prompt", distractors=False)[:1]
    a, b = queries[0].span
    seen = {}

    def shares(beta):
        def read(pattern, batch):
            seen["pattern"] = pattern

        score(model, queries, {**keyword.attend(model, beta), "blocks.1.attn.hook_pattern": read})
        return seen["pattern"][0]

    plain, more = shares(0.0), shares(2.0)
    torch.testing.assert_close(more.sum(-1), torch.ones_like(more.sum(-1)))
    assert more.triu(1).abs().max() == 0
    assert (more[:, b:, a:b].sum(-1) > plain[:, b:, a:b].sum(-1)).float().mean() > 0.9
    unchanged = score(model, queries, keyword.attend(model, 0.0)).logprob
    torch.testing.assert_close(unchanged, score(model, queries).logprob)
    assert (score(model, queries, keyword.attend(model, 2.0)).logprob - unchanged).abs().max() > 1e-4


def test_a_model_that_does_not_read_the_written_scores_is_refused():
    case = Case(full=load(tiny_hf("opt"), tokenizer=tiny_tokenizer()), facts=tiny_facts(["Anna Lee"]))
    with pytest.raises(ValueError, match="leave keyword_attention out"):
        keyword.prepare_attention(case)


def test_beta_zero_brings_nothing_back_and_models_without_attention_give_nothing():
    case = planted_case(sae=None)
    ready = keyword.prepare_attention(case, betas=(0.0, 2.0))
    for truth in ("full", "late", "early", "retrained"):
        found = keyword.audit_attention(case, ready, planted_model(truth), truth)
        assert (found.recoverability < 1e-3).all() and (found.curves["rho"][0] == 0).all()
    assert found.curve_axes["rho"] == (0.0, 2.0) and found.test == "keyword_attention"


def test_every_operator_names_the_subject_and_never_the_answer():
    case = people_case()
    for rewrite in keyword.OPERATORS.values():
        for query in make_query_set(case, "test").queries:
            prompt = rewrite(query).prompt
            assert query.fact.subject.lower() in prompt.lower() and query.fact.object not in prompt
    twice = keyword.OPERATORS["twice"](make_query_set(case, "test").queries[0]).prompt
    assert twice.count("Anna Lee") == 2


def test_emphasis_gives_full_and_retrained_models_nothing_where_the_last_token_decides():
    case = planted_case(sae=None)
    ready = keyword.prepare(case)
    for model in (planted_model(), planted_model("late"), case.retrained[0]):
        assert (keyword.audit(case, ready, model, "m").recoverability < 0.05).all()


@pytest.mark.slow
def test_focus_is_all_on_the_subject_where_nothing_else_is_read():
    case = planted_case(sae=None)
    ready = keyword.prepare(case, focus_too=True)
    found = keyword.audit(case, ready, planted_model(), "full")
    torch.testing.assert_close(found.columns["focus"], torch.ones(4))
    assert torch.equal(found.columns["focus"], found.columns["focus_F"])
    assert (keyword.focus(people_case().full, people_case().facts) < 0.9).any()


def test_without_retrained_models_the_grade_is_b():
    case = planted_case(sae=None, retrained=())
    found = keyword.audit_attention(case, keyword.prepare_attention(case), planted_model("late"), "late")
    assert found.grade == "B" and (found.recoverability < 1e-3).all()
