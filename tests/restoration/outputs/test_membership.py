"""Membership scores: worked examples, a slow reference, and groups that were and were not trained on."""

import math
import zlib

import pytest
import torch

from mech_unlearn.core import Entity
from mech_unlearn.metrics.membership import min_k, privleak, text_scores
from mech_unlearn.model.load import load
from mech_unlearn.restoration.outputs import membership
from tests.planted import UNKNOWN, planted_case, planted_model
from tests.tiny import tiny_hf, tiny_tokenizer

UNKNOWNS = tuple(Entity(name=name) for name in UNKNOWN)


def test_min_k_of_a_worked_example_and_of_a_single_token():
    logprobs = torch.tensor([-0.1, -2.0, -0.5, -3.0, -0.2])
    assert min_k(logprobs, 0.4).item() == pytest.approx(2.5)
    assert min_k(torch.tensor([-1.5]), 0.4).item() == 1.5  # floor(0.4) = 0 tokens would be no mean at all


def test_auc_counts_members_below_and_ties_half_and_is_no_number_where_a_score_is_none():
    auc = lambda *sides: membership._auc(*(torch.tensor(x) for x in sides))  # noqa: E731
    assert auc([1.0, 2.0], [3.0, 4.0]) == 1
    assert auc([3.0, 4.0], [1.0, 2.0]) == 0
    assert auc([1.0, 2.0], [1.0, 2.0]) == 0.5
    assert auc([1.0, 2.0], [float("inf"), 3.0]) == 1
    assert math.isnan(auc([1.0, float("nan")], [1.0, 2.0]))
    a, b = torch.randn(9), torch.randn(13)
    assert membership._auc(a, b) == pytest.approx((a[:, None] < b).double().mean().item(), abs=1e-12)


def test_privleak_is_zero_at_the_retrained_auc_and_negative_for_a_member():
    assert privleak(0.52, 0.52) == 0
    assert privleak(1.0, 0.5) == pytest.approx(-100)
    assert privleak(0.25, 0.5) == pytest.approx(50)


@pytest.mark.parametrize("architecture", ("gpt2", "llama"))
def test_scores_are_those_of_a_plain_model_token_by_token(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    text = "Anna Lee was born in Paris"
    found = text_scores(model, [text, "rain falls on the hills"])
    ids = tiny_tokenizer()(text)["input_ids"]
    with torch.no_grad():
        table = tiny_hf(architecture)(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).double()
    picked = [table[t, ids[t + 1]].item() for t in range(len(ids) - 1)]
    loss = -sum(picked) / len(picked)
    assert found["loss"][0].item() == pytest.approx(loss, rel=1e-4)
    assert found["zlib"][0].item() == pytest.approx(loss / len(zlib.compress(text.encode())), rel=1e-4)
    mean = (table.exp() * table).sum(-1)
    sigma = ((table.exp() * table**2).sum(-1) - mean**2).sqrt()
    z = sorted(((p - m) / s).item() for p, m, s in zip(picked, mean, sigma))[: int(0.4 * len(picked))]
    assert found["min_k_pp"][0].item() == pytest.approx(-sum(z) / len(z), rel=1e-3)


def test_gradient_norms_are_those_of_autograd():
    model, text = load(tiny_hf("llama"), tokenizer=tiny_tokenizer()), "Anna Lee was born in Paris"
    plain, ids = tiny_hf("llama"), tiny_tokenizer()(text, return_tensors="pt")["input_ids"]
    plain(ids, labels=ids).loss.backward()
    want = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
    torch.testing.assert_close(membership.gradient_norms(model, [text])[0], want, rtol=1e-3, atol=1e-5)


def test_the_full_model_knows_its_members_and_a_retrained_one_does_not():
    case = planted_case(sae=None, unknown=UNKNOWNS)
    ready = membership.prepare(case, grad_norm=True)
    full = membership.audit(case, ready, planted_model(), "full")
    assert full.columns["auc_loss"][0] > 0.9 and full.columns["kappa_loss"][0] == pytest.approx(1.0)
    assert full.columns["auc_reference"][0] > 0.9 and full.columns["kappa_reference"][0] == pytest.approx(1.0)
    retrained = membership.audit(case, ready, case.retrained[0], "R")
    assert abs(retrained.columns["kappa_loss"][0].item()) < 0.3 and abs(retrained.columns["privleak"][0].item()) < 30
    early = membership.audit(case, ready, planted_model("early"), "early")
    assert early.columns["kappa_loss"][0] < 0.5  # what outputs do not show, this test cannot see
    assert set(full.columns) >= {f"auc_{a}" for a in ("loss", "zlib", "min_k", "min_k_pp", "reference", "grad_norm")}


def test_it_never_speaks_of_a_single_fact():
    case = planted_case(sae=None, unknown=UNKNOWNS)
    found = membership.audit(case, membership.prepare(case), planted_model("late"), "late")
    assert found.recoverability.isnan().all() and all("group_level_only" in f for f in found.flags)
    assert all(len(values.unique()) == 1 or values.isnan().all() for values in found.columns.values())


def test_non_members_are_said_of_nobody_known_or_are_false():
    case = planted_case(sae=None, unknown=UNKNOWNS)
    assert not {f.subject for f in membership.strangers(case)} & {f.subject for f in case.facts}
    false = membership.strangers(planted_case(sae=None))
    assert all(a.subject == b.subject and a.object != b.object for a, b in zip(false, case.facts))


def test_without_retrained_models_the_scores_stand_alone_with_grade_b():
    case = planted_case(sae=None, retrained=(), unknown=UNKNOWNS)
    found = membership.audit(case, membership.prepare(case), planted_model(), "full")
    assert found.grade == "B" and "privleak" not in found.columns and found.columns["auc_loss"][0] > 0.9
