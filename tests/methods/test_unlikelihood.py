"""Unlikelihood: its loss from its formula, finite where an answer is certain, and off below the floor."""

import pytest
import torch

from mech_unlearn.methods.unlikelihood import log_not, unlikelihood_loss
from mech_unlearn.training.rows import AnswerTokens


def tokens(logits, wanted, at):
    return AnswerTokens(logits, torch.tensor(wanted), torch.tensor(at), torch.zeros(0, logits.shape[1]))


def test_the_loss_is_minus_the_log_probability_of_everything_else():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    wanted, at = [1, 0, 6, 2, 2], [0, 0, 1, 1, 1]
    p = logits.double().softmax(1)[range(5), wanted]
    each = -(1 - p).log()
    slow = (each[:2].mean() + each[2:].mean()) / 2
    torch.testing.assert_close(unlikelihood_loss(tokens(logits, wanted, at)).double(), slow, atol=1e-5, rtol=1e-5)


def test_a_certain_answer_has_a_finite_loss_with_a_gradient():
    logits = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    naive = -torch.log1p(-logits.softmax(1)[0, 0])
    assert naive.isinf()
    loss = unlikelihood_loss(tokens(logits, [0], [0]))
    loss.backward()
    assert loss.item() == pytest.approx(60 - torch.tensor(2.0).log().item(), rel=1e-4)
    assert logits.grad[0, 0] == pytest.approx(1.0)


def test_a_token_below_the_floor_counts_as_zero_and_stays_in_the_mean():
    logits = torch.tensor([[0.0, 8.0], [0.0, 0.0]], requires_grad=True)
    loss = unlikelihood_loss(tokens(logits, [0, 0], [0, 0]), floor=-5.0)
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item() / 2)
    loss.backward()
    assert logits.grad[0].abs().sum() == 0 and logits.grad[1].abs().sum() > 0
    unbounded = unlikelihood_loss(tokens(logits, [0, 0], [0, 0]))
    assert unbounded > loss


def test_several_tokens_may_be_hit_at_once():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    hit = torch.zeros(3, 6, dtype=torch.bool)
    hit[:, [1, 4]] = True
    slow = (1 - logits.softmax(1)[:, [1, 4]].sum(1)).log()
    torch.testing.assert_close(log_not(logits, hit), slow, atol=1e-5, rtol=1e-5)
