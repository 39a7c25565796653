"""Rmu, AdaptiveRmu, Srmu: what is steered, what is held, which tokens and features count, and which tensors move."""

import dataclasses

import pytest
import torch

from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.methods import AdaptiveRmu, Rmu, Srmu
from mech_unlearn.methods.experimental.srmu import measured, misdirected
from mech_unlearn.methods.rmu import steer_to, steered
from mech_unlearn.model.capture import stream
from mech_unlearn.model.load import load
from mech_unlearn.training.around import PLAIN
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import answer_rows, text_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.state_losses import (
    feature_importance,
    held,
    random_direction,
    row_means,
    row_norms,
    state_mse,
    states_of,
)
from mech_unlearn.training.training import _trainee
from tests.planted import FORGOTTEN, WRITER, planted_facts, planted_model
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer


def states_by_row(model, rows, layer):
    """resid_post after a layer, one tensor per row; each row runs alone, so that there is no padding at all."""
    site = Site(layer, "resid_post")
    return [next(iter(stream(model, [ids], [site]))).at[site].float() for ids, _ in rows]


def sets(seed=0):
    facts = planted_facts()
    return ForgetSet(facts=facts[:FORGOTTEN]), RetainSet(neighbors=facts[FORGOTTEN:])


def toy(lengths=(2, 5, 1), width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    at = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.randn(len(at), width, generator=generator), at


def test_a_squared_distance_is_a_mean_over_features_then_tokens_of_a_row_then_rows():
    now, at = toy()
    target = torch.randn(4, generator=torch.Generator().manual_seed(1))
    slow = sum(
        sum(sum((now[t, j] - target[j]) ** 2 for j in range(4)) / 4 for t in range(len(at)) if at[t] == row)
        / int((at == row).sum())
        for row in range(3)
    )
    torch.testing.assert_close(state_mse(now, target, at), slow / 3)


def test_rows_of_different_lengths_do_not_weigh_on_each_other():
    now, at = toy()
    each = now.square().mean(1)
    sums, counts = torch.zeros(3).index_add(0, at, each), torch.bincount(at)
    right = (sums / counts).mean()
    broadcast = (sums / counts[:, None]).mean()  # [b] / [b, 1]: each row is divided by the lengths of all
    torch.testing.assert_close(state_mse(now, torch.zeros(4), at), right)
    assert (broadcast - right).abs() > 0.05 * right
    assert (each.mean() - right).abs() > 0.02 * right  # over all tokens alike: long rows count for more


def test_a_batchs_loss_is_that_of_its_rows_without_any_padding(tiny_model, tiny_sets):
    forget, retain = tiny_sets
    rows = [*answer_rows(tiny_model.tokenizer, forget.facts), ((5, 6, 7), 2), (tuple(range(4, 30)), 20)]
    target = torch.randn(32, generator=torch.Generator().manual_seed(0))
    objective = Objective(steer_to(target), 1.0, retain=held, layer=2, logits=False, rows=rows)
    run = _trainee(tiny_model, rows, rows, objective, "", PLAIN)
    run.forget = objective.forget(None)
    each = zip(states_by_row(tiny_model, rows, 2), rows, strict=True)
    slow = torch.stack([(x[start:] - target).square().mean() for x, (_, start) in each]).mean()
    torch.testing.assert_close(run.forget_loss(range(len(rows))), slow, atol=1e-4, rtol=1e-4)
    assert run.retain_loss(range(len(rows))).item() == 0.0


def test_a_gaussian_direction_differs_by_seed_and_the_legacy_one_hardly_does():
    ones = torch.ones(512) / 512**0.5
    gaussian, uniform = ([random_direction(512, seed, legacy) for seed in range(4)] for legacy in (False, True))
    for one, other in zip(gaussian, gaussian[1:]):
        assert abs(one @ other) < 0.2 and abs(one @ ones) < 0.2
    for one, other in zip(uniform, uniform[1:]):
        assert 0.7 < one @ other < 0.8  # 3 / 4
        assert one @ ones == pytest.approx(3**0.5 / 2, abs=0.03)
    for u in (*gaussian, *uniform):
        assert u.norm() == pytest.approx(1)


def moved(model, edit, rows, layer):
    """Change of the states at every token of some rows."""
    before = torch.cat(states_by_row(model, rows, layer))
    with edit.on(model):
        return torch.cat(states_by_row(model, rows, layer)) - before, before


@pytest.mark.thorough
@pytest.mark.parametrize("legacy", (False, True))
def test_forgotten_states_turn_to_the_vector_and_retained_ones_stay(legacy):
    model, (forget, retain) = planted_model(), sets()
    settings = dict(layer=WRITER, layers=(WRITER,), schedule=Schedule(lr=5e-2, epochs=40, batch_size=20))
    method = Rmu(c=40.0, relative=False, alpha=10.0, legacy_u=legacy, **settings)
    edit = method.fit(model, forget, retain)
    u = random_direction(64, 0, legacy)
    names = [model.tokenizer.convert_tokens_to_ids(fact.subject) for fact in forget.facts]
    rows = [((2, name), 2) for name in names]
    with edit.on(model):
        now = torch.stack([x[-1] for x in states_by_row(model, rows, WRITER)])
    assert (now @ u / now.norm(dim=1)).min() > 0.95
    shift, _ = moved(model, edit, [((2, model.tokenizer.convert_tokens_to_ids(f.subject)), 2) for f in retain.facts], 2)
    assert shift.norm(dim=1).max() < 0.1 * 40.0


def test_without_the_retain_term_retained_states_are_not_held(tiny_model, tiny_sets):
    rows = answer_rows(tiny_model.tokenizer, tiny_sets[1].facts)
    settings = dict(layer=2, c=20.0, schedule=Schedule(lr=1e-2, epochs=6, batch_size=4))
    loose, tight = (Rmu(alpha=alpha, **settings).fit(tiny_model, *tiny_sets) for alpha in (1e-6, 100.0))
    assert moved(tiny_model, tight, rows, 2)[0].norm() < 0.3 * moved(tiny_model, loose, rows, 2)[0].norm()


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_mlp_output_matrices_of_the_layers_change(architecture, tiny_sets):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    edit = Rmu(schedule=Schedule(lr=1e-3, epochs=1, batch_size=4), layer=2, c=10.0, alpha=1.0).fit(model, *tiny_sets)
    assert set(edit.deltas) == {model.w_out(layer)[0] for layer in (0, 1, 2)}
    edit = Rmu(schedule=Schedule(lr=1e-3, epochs=1, batch_size=4), layer=2, layers=(1,), c=10.0, alpha=1.0).fit(
        model, *tiny_sets
    )
    assert set(edit.deltas) == {model.w_out(1)[0]}


def test_texts_are_forgotten_beside_the_facts(tiny_model, tiny_sets):
    texts = ("rain falls on Globex and Umbrella .",)
    rows = text_rows(tiny_model, texts)
    u = random_direction(32, 0)

    def along(given):
        edit = Rmu(schedule=Schedule(lr=1e-2, epochs=6, batch_size=4), layer=2, c=30.0, alpha=1.0, texts=given).fit(
            tiny_model, *tiny_sets
        )
        return (moved(tiny_model, edit, rows, 2)[0] @ u).mean(), edit.recipe["report"]

    with_texts, report = along(texts)
    without, bare = along(())
    assert with_texts > 1.2 * without
    assert (report["steps"], bare["steps"]) == (6 * 3, 6 * 2)  # eight phrasings, and one text


@pytest.mark.slow
def test_a_late_layer_is_steered_by_its_own_norm_where_the_papers_constant_does_nothing(tiny_model, tiny_sets):
    with torch.no_grad():
        tiny_model.held["model.embed_tokens.weight"].mul_(40)  # states as long as those of late layers
    schedule = Schedule(lr=3e-2, epochs=30, batch_size=8, clip=100.0)
    settings = dict(layer=3, layers=(3,), alpha=1e-3, schedule=schedule)
    rows, u = answer_rows(tiny_model.tokenizer, tiny_sets[0].facts), random_direction(32, 0)
    small = Rmu(c=6.5, relative=False, **settings).fit(tiny_model, *tiny_sets)
    plain = Rmu(c=5.0, **settings).fit(tiny_model, *tiny_sets)
    adaptive = AdaptiveRmu(beta=5.0, **settings).fit(tiny_model, *tiny_sets)
    first = AdaptiveRmu(beta=5.0, norm="first_batch", **settings).fit(tiny_model, *tiny_sets)
    along = []
    for edit in (small, plain, adaptive, first):
        shift, before = moved(tiny_model, edit, rows, 3)
        along.append((shift @ u).mean() / before.norm(dim=1).mean())
    assert along[0] < 0.25 < 0.7 < min(along[1:])


def test_the_adaptive_target_is_as_long_as_the_untrained_rows_states():
    states, at = toy(lengths=(2, 3))
    slow = [states[:2].norm(dim=1).mean()] * 2 + [states[2:].norm(dim=1).mean()] * 3
    torch.testing.assert_close(row_norms(states, at), torch.stack(slow))
    means = (states[:2].mean(0) + states[2:].mean(0)) / 2
    torch.testing.assert_close(row_means(states, at), means)


def test_importance_is_a_clipped_ratio_of_mean_one():
    forget, retain = torch.tensor([4.0, 1.0, 0.0, 9.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    raw = torch.tensor([4.0, 1.0, 0.0, 10.0])
    torch.testing.assert_close(feature_importance(forget, retain, w_max=10.0), raw / raw.mean(), atol=1e-4, rtol=1e-4)


def test_a_shut_gate_keeps_the_untrained_state():
    before, _ = toy()
    gate, direction = torch.tensor([0.0, 1.0, 0.5, 0.0]), torch.full((4,), 0.5)
    target = misdirected(before, gate, direction, c=3.0)
    assert torch.equal(target[:, [0, 3]], before[:, [0, 3]])
    torch.testing.assert_close(target[:, 1] - before[:, 1], 1.5 * before.norm(dim=1))


@pytest.mark.slow
def test_srmu_moves_the_features_of_the_forgotten_and_leaves_the_others():
    model, (forget, retain) = planted_model(), sets()
    schedule = Schedule(lr=3e-2, epochs=30, batch_size=20)
    settings = dict(layer=WRITER, layers=(WRITER,), alpha=1.0, schedule=schedule)
    method = Srmu(every=5, **settings)
    edit = method.fit(model, forget, retain)
    rows = answer_rows(model.tokenizer, forget.facts)
    forgotten, kept = (measured(model, answer_rows(model.tokenizer, s.facts), WRITER) for s in (forget, retain))
    order = feature_importance(forgotten.size, kept.size, method.w_max).argsort()
    change = moved(model, edit, rows, WRITER)[0].abs().mean(0)
    assert change[order[:32]].mean() < 0.1 * change[order[-6:]].mean()
    plain = Rmu(c=5.0, **settings).fit(model, forget, retain)
    everywhere = moved(model, plain, rows, WRITER)[0].abs().mean(0)
    assert everywhere[order[:32]].mean() > 0.3 * everywhere[order[-6:]].mean()


def test_importance_is_renewed_as_training_goes_on(tiny_model, tiny_sets):
    settings = dict(alpha=1.0, schedule=Schedule(lr=1e-2, epochs=4, batch_size=4))
    once, often, stiff = (
        Srmu(every=every, ema=ema, **settings).fit(tiny_model, *tiny_sets).recipe["report"]["gate"]
        for every, ema in ((1000, 0.9), (2, 0.9), (2, 1.0))
    )
    assert once != often and once == pytest.approx(stiff)


def test_states_that_nobody_asked_for_are_refused(tiny_model, tiny_sets):
    rows = answer_rows(tiny_model.tokenizer, tiny_sets[0].facts)
    run = _trainee(tiny_model, rows, rows, Objective(lambda _: held, 1.0, layer=1), "", PLAIN)
    with pytest.raises(ValueError, match="set Objective.layer, and teacher"):
        states_of(run.forward(rows, [0], teacher=False))


@pytest.mark.parametrize(
    ("method", "message"),
    (
        (Rmu(c=0.0), "c must be positive"),
        (Rmu(layer=9), "no layer|not in"),
        (Rmu(layer=1, layers=(2,)), "lies above"),
        (Srmu(ema=2.0), "ema=2.0"),
    ),
)
def test_settings_that_cannot_work_are_refused(tiny_model, tiny_sets, method, message):
    with pytest.raises((ValueError, KeyError), match=message):
        method.fit(tiny_model, *tiny_sets)


def test_nothing_retained_is_refused(tiny_model, tiny_sets):
    for method in (Rmu(), AdaptiveRmu(), Srmu()):
        with pytest.raises(ValueError, match="neither facts nor texts"):
            method.fit(tiny_model, tiny_sets[0], RetainSet())


@pytest.mark.thorough
@pytest.mark.parametrize("method", (Rmu(c=20.0, alpha=1.0), AdaptiveRmu(alpha=1.0), Srmu(alpha=1.0)))
def test_a_bfloat16_model_is_steered_too(tiny_sets, method):
    model = load(tiny_hf("gemma2").to(torch.bfloat16), tokenizer=tiny_tokenizer())
    edit = dataclasses.replace(method, schedule=Schedule(lr=1e-2, epochs=2, batch_size=4)).fit(model, *tiny_sets)
    assert {delta.dtype for delta in edit.deltas.values()} == {torch.float32}
    shift, before = moved(model, edit, answer_rows(model.tokenizer, tiny_sets[0].facts), steered(model, None, None)[0])
    assert shift.norm() > 0.02 * before.norm()
