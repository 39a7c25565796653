"""Lat: the attack it trains against, the loss it trains with, and what is left for an attack afterwards."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.methods import Lat
from mech_unlearn.methods.lat import away_loss, log_not, worst_shift
from mech_unlearn.model.load import load
from mech_unlearn.training.around import PLAIN
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import AnswerTokens, answer_rows, collate, nll, score_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import _trainee
from tests.planted import FORGOTTEN, planted_facts, planted_model
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

CPU = torch.device("cpu")
LAYER = 1


def tokens(logits, wanted, at):
    return AnswerTokens(logits, torch.tensor(wanted), torch.tensor(at), torch.zeros(0, logits.shape[1]))


def trained(model, rows, repeats=1):
    return _trainee(model, rows, rows, Objective(lambda _: nll, 1.0, repeats=repeats), "", PLAIN)


def test_the_loss_is_minus_the_log_probability_of_everything_else():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    wanted, at = [1, 0, 6, 2, 2], [0, 0, 1, 1, 1]
    p = logits.double().softmax(1)[range(5), wanted]
    each = -(1 - p).log()
    slow = (each[:2].mean() + each[2:].mean()) / 2
    torch.testing.assert_close(away_loss(tokens(logits, wanted, at)).double(), slow, atol=1e-5, rtol=1e-5)


def test_a_certain_answer_has_a_finite_loss_with_a_gradient():
    logits = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    naive = -torch.log1p(-logits.softmax(1)[0, 0])
    assert naive.isinf()
    loss = away_loss(tokens(logits, [0], [0]))
    loss.backward()
    assert loss.item() == pytest.approx(60 - torch.tensor(2.0).log().item(), rel=1e-4)
    assert logits.grad[0, 0] == pytest.approx(1.0)


def test_a_token_below_the_floor_counts_as_zero_and_stays_in_the_mean():
    logits = torch.tensor([[0.0, 8.0], [0.0, 0.0]], requires_grad=True)
    loss = away_loss(tokens(logits, [0, 0], [0, 0]), floor=-5.0)
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item() / 2)
    loss.backward()
    assert logits.grad[0].abs().sum() == 0 and logits.grad[1].abs().sum() > 0
    unbounded = away_loss(tokens(logits, [0, 0], [0, 0]))
    assert unbounded > loss


def test_several_tokens_may_be_hit_at_once():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    hit = torch.zeros(3, 6, dtype=torch.bool)
    hit[:, [1, 4]] = True
    slow = (1 - logits.softmax(1)[:, [1, 4]].sum(1)).log()
    torch.testing.assert_close(log_not(logits, hit), slow, atol=1e-5, rtol=1e-5)


def test_the_attack_finds_the_corner_of_its_ball_and_moves_free_tokens_only():
    direction = torch.randn(4, generator=torch.Generator().manual_seed(0))
    free = torch.tensor([[True, False, True]])
    shift = worst_shift(lambda d: -(d @ direction).sum(), free, 4, eps=0.3, lr=0.05, steps=60)
    assert shift[0, 1].abs().sum() == 0
    assert (shift.norm(dim=-1)[free] <= 0.3 + 1e-6).all() and (shift.norm(dim=-1)[free] > 0.29).all()
    assert torch.nn.functional.cosine_similarity(shift[0, 0], direction, dim=0) > 0.8
    short = worst_shift(lambda d: -(d @ direction).sum(), free, 4, eps=0.3, lr=0.05, steps=1)
    assert short.norm(dim=-1).max() < 0.3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_attack_makes_answers_likelier_and_leaves_when_it_ends(architecture, tiny_sets):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    rows = answer_rows(model.tokenizer, tiny_sets[0].facts)
    run, members = trained(model, rows), [0, 3, 2]
    clean = run.forget_loss(members).item()
    attack = Lat(eps=1.0)._attack(run, members, LAYER, model.d_model)
    with attack():
        attacked = run.forget_loss(members).item()
    assert attacked < clean - 0.1
    assert run.forget_loss(members).item() == clean
    relative = Lat(eps=1e-4, relative=True)._attack(run, members, LAYER, model.d_model)
    with relative():
        assert abs(run.forget_loss(members).item() - clean) < 0.1 * (clean - attacked)


def test_by_default_only_the_prompts_tokens_are_shifted(tiny_model, tiny_sets):
    rows = answer_rows(tiny_model.tokenizer, tiny_sets[0].facts)
    run, members = trained(tiny_model, rows), [0, 1]
    batch = collate(rows, members, 0, CPU)
    assert batch.mask.sum(1)[0] != batch.mask.sum(1)[1]  # one row is padded
    seen = []

    def watch(where):
        attack = Lat(where=where, eps=0.5)._attack(run, members, LAYER, tiny_model.d_model)
        handle = run.block(LAYER + 1).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        try:
            run.forget_loss(members)
            with attack():
                run.forget_loss(members)
        finally:
            handle.remove()
        clean, attacked = seen[-2:]
        return (attacked - clean).norm(dim=-1) > 1e-6

    moved = watch("prompt")
    assert torch.equal(moved, batch.ordinary & ~batch.answer)
    moved = watch("all")
    assert not moved[~batch.mask.bool()].any() and moved.sum() <= batch.mask.sum()


def test_the_counts_are_those_of_attack_and_steps(tiny_model, tiny_sets):
    report = (
        Lat(schedule=Schedule(lr=1e-4, epochs=1, batch_size=4), pgd_steps=3, repeats=2)
        .fit(tiny_model, *tiny_sets)
        .recipe["report"]
    )
    assert report["steps"] == 2
    assert report["n_backward"] == report["steps"] * (3 + 2 * 2)
    assert report["n_forward"] == report["steps"] * (3 + 2 * 2) + 2  # and recall before and after


def recovered(model, facts, eps, steps=25):
    """NLL (nats per answer token) at best under a shift of each prompt token: gradient descent with projection, which
    is another attack than the one that is trained against. The rows are of one length."""
    rows = answer_rows(model.tokenizer, facts)
    ids, start = torch.tensor([row for row, _ in rows]), rows[0][1]
    best = torch.full((len(rows),), float("inf"))
    delta = torch.zeros(*ids.shape, model.d_model, requires_grad=True)
    for _ in range(steps):
        with model.hooks((f"blocks.{LAYER}.hook_resid_post", lambda x, delta=delta: x + delta)):
            logp = model.logits(ids).log_softmax(-1)[:, start - 1 : -1]
        loss = -logp.gather(2, ids[:, start:, None])[..., 0].mean(1)
        best = torch.minimum(best, loss.detach())
        (g,) = torch.autograd.grad(loss.sum(), [delta])
        with torch.no_grad():
            g[:, start:] = 0
            delta -= 0.2 * eps * g / g.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            delta *= (eps / delta.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    return best.mean().item()


def test_an_attack_recovers_less_after_lat_than_after_the_same_ascent_without_an_attack():
    model, facts = planted_model(), planted_facts()
    forget, retain = ForgetSet(facts=facts[:FORGOTTEN]), RetainSet(neighbors=facts[FORGOTTEN:])
    schedule = Schedule(lr=4e-3, epochs=5, batch_size=20)
    settings = dict(schedule=schedule, attack_layer=LAYER, pgd_lr=0.1, floor=-30.0, pgd_steps=8)
    questions = tuple(replace(fact, paraphrases=()) for fact in forget.facts)
    left, kept = {}, {}
    for eps in (0.5, 1e-6):
        edit = Lat(eps=eps, **settings).fit(model, forget, retain)
        with edit.on(model):
            clean, other = (
                nll(score_rows(model.hf, answer_rows(model.tokenizer, some), 0, CPU)).item()
                for some in (questions, retain.facts)
            )
            left[eps] = clean, recovered(model, questions, 0.5)
            kept[eps] = other
    assert left[0.5][1] > left[1e-6][1] + 0.5, left
    assert min(clean for clean, _ in left.values()) > 2.0 and max(kept.values()) < 1.5


@pytest.mark.parametrize(
    ("method", "message"),
    ((Lat(eps=0.0), "eps must be positive"), (Lat(attack_layer=7), "not in"), (Lat(pgd_steps=0), "pgd_steps must")),
)
def test_settings_that_cannot_work_are_refused(tiny_model, tiny_sets, method, message):
    with pytest.raises(ValueError, match=message):
        method.fit(tiny_model, *tiny_sets)
