"""Lat: the attack it trains against, the loss it trains with, and what is left for an attack afterwards."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.methods import IdkDpo, Lat, Npo, Rmu, Rocr, Unlikelihood
from mech_unlearn.methods.lat import worst_shift
from mech_unlearn.model.load import load
from mech_unlearn.training.around import PLAIN
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import answer_rows, collate, nll, score_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import _trainee
from tests.planted import FORGOTTEN, planted_facts, planted_model
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

CPU = torch.device("cpu")
LAYER = 1


def trained(model, rows):
    return _trainee(model, rows, rows, Objective(lambda _: nll, 1.0), "", PLAIN)


def test_the_attack_finds_the_corner_of_its_ball_and_moves_free_tokens_only():
    direction = torch.randn(4, generator=torch.Generator().manual_seed(0))
    free = torch.tensor([[True, False, True]])
    shift = worst_shift(lambda d: -(d @ direction).sum(), free, 4, eps=0.3, lr=0.05, steps=60)
    assert shift[0, 1].abs().sum() == 0
    assert (shift.norm(dim=-1)[free] <= 0.3 + 1e-6).all() and (shift.norm(dim=-1)[free] > 0.29).all()
    assert torch.nn.functional.cosine_similarity(shift[0, 0], direction, dim=0) > 0.8
    short = worst_shift(lambda d: -(d @ direction).sum(), free, 4, eps=0.3, lr=0.05, steps=1)
    assert short.norm(dim=-1).max() < 0.3


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_attack_makes_answers_likelier_and_leaves_when_it_ends(architecture, tiny_sets):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    rows = answer_rows(model.tokenizer, tiny_sets[0].facts)
    run, members = trained(model, rows), [0, 3, 2]
    clean = run.forget_loss(members).item()
    attack = Lat(eps=1.0, relative=False)._attack(run, members, LAYER, model.d_model)
    with attack():
        attacked = run.forget_loss(members).item()
    assert attacked < clean - 0.1
    assert run.forget_loss(members).item() == clean
    relative = Lat(eps=1e-4)._attack(run, members, LAYER, model.d_model)
    with relative():
        assert abs(run.forget_loss(members).item() - clean) < 0.1 * (clean - attacked)


def test_by_default_only_the_prompts_tokens_are_shifted(tiny_model, tiny_sets):
    rows = answer_rows(tiny_model.tokenizer, tiny_sets[0].facts)
    run, members = trained(tiny_model, rows), [0, 1]
    batch = collate(rows, members, 0, CPU)
    assert batch.mask.sum(1)[0] != batch.mask.sum(1)[1]  # one row is padded
    seen = []

    def watch(where):
        attack = Lat(where=where, eps=0.5, relative=False)._attack(run, members, LAYER, tiny_model.d_model)
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
        Lat(base=Unlikelihood(schedule=Schedule(lr=1e-4, epochs=1, batch_size=4)), pgd_steps=3, repeats=2)
        .fit(tiny_model, *tiny_sets)
        .recipe["report"]
    )
    assert report["steps"] == 2
    assert report["n_backward"] == report["steps"] * (3 + 2 * 2)
    assert report["n_forward"] == report["steps"] * (1 + 3 + 2 * 2) + 2  # norms before, recall before and after


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


@pytest.mark.slow
def test_an_attack_recovers_less_after_lat_than_after_the_same_ascent_without_an_attack():
    model, facts = planted_model(), planted_facts()
    forget, retain = ForgetSet(facts=facts[:FORGOTTEN]), RetainSet(neighbors=facts[FORGOTTEN:])
    schedule = Schedule(lr=4e-3, epochs=5, batch_size=20)
    base = Unlikelihood(schedule=schedule, floor=-30.0)
    settings = dict(base=base, attack_layer=LAYER, pgd_lr=0.1, relative=False, pgd_steps=8)
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
    (
        (Lat(eps=0.0), "eps must be positive"),
        (Lat(attack_layer=7), "not in"),
        (Lat(pgd_steps=0), "pgd_steps must"),
        (Lat(base=Rmu()), "lat attacks answers"),
        (Lat(base=Rocr()), "Rocr does not train"),
        (Lat(base=Lat()), "already sets 'adversary'"),
    ),
)
def test_settings_that_cannot_work_are_refused(tiny_model, tiny_sets, method, message):
    with pytest.raises(ValueError, match=message):
        method.fit(tiny_model, *tiny_sets)


def test_any_method_that_trains_answers_can_be_the_base(tiny_model, tiny_sets):
    schedule = Schedule(lr=1e-3, epochs=1, batch_size=4)
    for base in (Npo(schedule=schedule), IdkDpo(schedule=schedule, refusals=("the sea",))):
        plain = base.fit(tiny_model, *tiny_sets)
        faint, strong = (
            Lat(base=base, eps=eps, pgd_steps=4, repeats=1).fit(tiny_model, *tiny_sets) for eps in (1e-9, 1.0)
        )
        assert (
            strong.recipe["method"] == "lat" and strong.recipe["settings"]["base"]["method"] == plain.recipe["method"]
        )
        for name, delta in plain.deltas.items():
            torch.testing.assert_close(faint.deltas[name], delta, atol=2e-4, rtol=0)
        assert any((strong.deltas[name] - delta).abs().max() > 5e-4 for name, delta in plain.deltas.items())
