"""Published single scores: oriented towards "still there", equal to a slow reference, one number per fact."""

import pytest
import torch

from mech_unlearn.testbed import published as scores
from tests.planted import planted_case, planted_model


@pytest.fixture(scope="module")
def levels():
    case = planted_case(sae=None)
    return scores.known(case.full, case.retrained, case.facts)


MOVED = ("es", "em", "prob", "para_prob", "truth_ratio", "rouge", "reference", "fisher")
"""The others read words or variances that the planted models, never trained on text, give no meaning."""


def test_full_scores_above_retrained_in_every_score_that_the_planted_models_can_move(levels):
    full, never = (scores.published(planted_model(*which), levels) for which in (("full", 0), ("retrained", 9)))
    assert set(full) == {*scores.OUTPUT_SCORES, *scores.STATE_SCORES}
    for name in full:
        assert full[name].shape == (len(levels.facts),), name
    for name in MOVED:
        assert (full[name] > never[name]).all(), name
    assert full["cka"].max() <= 1 and full["fisher"].eq(1).all()


def test_output_scores_call_a_suppressed_model_gone_where_states_do_not(levels):
    late, full = (scores.published(planted_model(truth), levels) for truth in ("late", "full"))
    for name in ("prob", "para_prob", "truth_ratio"):
        assert (late[name] < full[name]).all()
    assert (late["cka"] > 0.5).all()


def test_fisher_is_the_mean_square_of_each_facts_own_gradient(levels):
    model = planted_model("full")
    found = scores.fisher(model, levels.facts[:2])
    name = "model.layers.2.mlp.down_proj.weight"
    slow = torch.zeros_like(found[name])
    from mech_unlearn.model.tokens import make_queries

    for query in make_queries(model.tokenizer, levels.facts[:2], "prompt", distractors=False):
        weight = model.held[name]
        ids = torch.tensor([query.full])
        table = model.hf(input_ids=ids).logits[0].log_softmax(-1)
        start = len(query.prompt)
        loss = -sum(table[start - 1 + t, token] for t, token in enumerate(query.answers[0])) / len(query.answers[0])
        slow += torch.autograd.grad(loss, weight)[0].square() / 2
    torch.testing.assert_close(found[name], slow)
