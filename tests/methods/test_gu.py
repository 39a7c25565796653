"""Gu: projected gradients against a slow reference in whitened coordinates, and the retain loss they leave alone."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import RetainSet
from mech_unlearn.methods import GradAscent, GradDiff, Gu, Npo, Wagle
from mech_unlearn.methods.gu import adam_metric, projected
from mech_unlearn.model.load import load
from mech_unlearn.training.around import Around
from mech_unlearn.training.schedule import Schedule
from tests.tiny import tiny_hf, tiny_tokenizer

FAST = Schedule(lr=1e-3, epochs=2, batch_size=4)


def drawn(n, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(n)]


def flat(tensors):
    return torch.cat([t.double().flatten() for t in tensors])


def test_projection_is_that_of_whitened_coordinates_onto_the_orthogonal_complement():
    g, *others = drawn(4, (5, 7), (11,))
    metric = [m.abs() + 0.01 for m in drawn(1, (5, 7), (11,), seed=1)[0]]
    got = flat(projected(g, others, metric))
    root = flat(metric).sqrt()
    white = torch.stack([flat(q) / root for q in others], 1)  # least squares, nothing of Gram-Schmidt
    target = flat(g) / root
    wanted = (target - white @ torch.linalg.lstsq(white, target).solution) * root
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


def test_it_is_not_the_euclidean_projection_nor_one_after_the_other():
    g, *others = drawn(3, (40,))
    metric = [torch.linspace(0.01, 3, 40)]
    got = projected(g, others, metric)[0]
    euclid = projected(g, others, [torch.ones(40)])[0]
    turn = projected(projected(g, others[:1], metric), others[1:], metric)[0]
    assert (got - euclid).norm() > 0.1 * got.norm() and (got - turn).norm() > 1e-3 * got.norm()


@pytest.mark.parametrize("closeness", (0.0, 1e-3))
def test_what_is_left_is_orthogonal_also_to_nearly_parallel_and_dependent_gradients(closeness):
    g, q, noise = (x[0] for x in drawn(3, (500,)))
    metric = [torch.rand(500, generator=torch.Generator().manual_seed(2)) + 1e-3]
    others = [[q], [q + closeness * noise], [torch.zeros(500)]]
    left = projected([g + 30 * q], others, metric)[0].double()
    h = metric[0].double()
    for (other,) in others[:2]:
        o = other.double()
        cosine = (left * o / h).sum() / ((left**2 / h).sum() * (o**2 / h).sum()).sqrt()
        assert cosine.abs() < 1e-5 if closeness else cosine.abs() < 1e-6


def test_the_metric_is_adams_second_moment_and_where_there_is_none_that_of_the_gradients_at_hand():
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    fresh = [[torch.tensor([3.0, 0.0, 0.0])], [torch.tensor([0.0, 2.0, 0.0])], [torch.tensor([0.0, 4.0, 0.0])]]
    torch.testing.assert_close(adam_metric([weight], optimizer, fresh)[0], torch.tensor([3.0, 10**0.5, 0.0]) + 1e-8)
    squares = 0.0
    for value in (1.0, 2.0):
        weight.grad = torch.tensor([value, 0.0, 0.0])
        optimizer.step()
        squares = 0.999 * squares + 0.001 * value**2
    wanted = torch.tensor([(squares / (1 - 0.999**2)) ** 0.5, 10**0.5, 0.0]) + 1e-8
    torch.testing.assert_close(adam_metric([weight], optimizer, fresh)[0], wanted)


class Spy:
    """Sees what a projection is given and gives back, and what the retain batches were."""

    def __init__(self, gu):
        self.gu, self.seen = gu, []

    def __call__(self, run, gradients, optimizer, masks):
        batches, take = [], run.next_kept
        run.next_kept = lambda: batches.append(take()) or batches[-1]
        out = self.gu._direct(run, gradients, optimizer, masks)
        run.next_kept = take
        theirs = [run.gradients(run.retain_loss(batch)) for batch in batches]
        metric = adam_metric(list(run.weights.values()), optimizer, [gradients, *theirs])
        self.seen.append((list(gradients), out, theirs, metric, dict(masks), list(run.weights)))
        return out


@pytest.mark.thorough
@pytest.mark.parametrize("scope", ("tensor", "global"))
def test_in_training_every_step_is_orthogonal_to_its_retain_gradients(tiny_model, tiny_sets, scope):
    spy = Spy(Gu(k=2, scope=scope))
    Npo(schedule=FAST).fit(tiny_model, *tiny_sets, around=Around(direct=spy, retained=True))
    assert len(spy.seen) == 4
    for before, after, theirs, metric, _, _ in spy.seen:
        h = flat(metric)
        for r in map(flat, theirs):
            scale = ((flat(before) ** 2 / h).sum() * (r**2 / h).sum()).sqrt()
            assert (flat(before) * r / h).sum().abs() > 1e-4 * scale
            assert (flat(after) * r / h).sum().abs() < 1e-6 * scale


def test_under_a_mask_the_step_is_orthogonal_in_what_the_mask_leaves(tiny_model, tiny_sets):
    spy, wagle = Spy(Gu(k=1, scope="global")), Wagle(rho=0.1)
    around = Around(direct=spy, retained=True, masks=(wagle._mask,))
    Npo(schedule=FAST).fit(tiny_model, *tiny_sets, around=around)
    for _, after, theirs, _, masks, names in spy.seen:
        assert set(masks) == set(names)
        assert all(not after[i][~masks[name]].any() for i, name in enumerate(names))
        kept = [r * masks[name] for r, name in zip(theirs[0], names)]
        fresh = adam_metric_of(spy.seen[0])
        if after is spy.seen[0][1]:
            h = flat(fresh)
            scale = ((flat(after) ** 2 / h).sum() * (flat(kept) ** 2 / h).sum()).sqrt()
            assert (flat(after) * flat(kept) / h).sum().abs() < 1e-5 * scale


def adam_metric_of(seen):
    """The metric of a first step: the squares of the masked gradients at hand."""
    before, _, theirs, _, masks, names = seen
    return [(g**2 + (r * masks[name]) ** 2).sqrt() + 1e-8 for g, r, name in zip(before, theirs[0], names, strict=True)]


def test_the_retain_loss_changes_by_the_square_of_the_step_and_without_projection_by_the_step(tiny_model, tiny_sets):
    """One step along H^-1 g, as Adam takes it, on a retain set of one batch."""
    forget, retain = tiny_sets
    retain = RetainSet(neighbors=retain.neighbors[:2])
    changes = {}

    def direct_of(project):
        def direct(run, gradients, optimizer, masks):
            batch = list(range(len(run.kept)))
            base = run.retain_loss(batch).item()
            theirs = run.gradients(run.retain_loss(batch))
            h = adam_metric(list(run.weights.values()), optimizer, [gradients, theirs])
            g = projected(gradients, [theirs], h) if project else gradients
            for size in (1e-4, 5e-5):
                with torch.no_grad():
                    for w, x, m in zip(run.weights.values(), g, h):
                        w.sub_(size * x / m)
                    changes[project, size] = run.retain_loss(batch).item() - base
                    for w, x, m in zip(run.weights.values(), g, h):
                        w.add_(size * x / m)
            return gradients

        return direct

    for project in (True, False):
        around = Around(direct=direct_of(project), retained=True)
        GradAscent(schedule=Schedule(lr=1e-6, epochs=1, batch_size=64)).fit(tiny_model, forget, retain, around=around)
    assert abs(changes[False, 1e-4]) > 5 * abs(changes[True, 1e-4])
    assert 1.7 < changes[False, 1e-4] / changes[False, 5e-5] < 2.3  # first order
    assert 3 < changes[True, 1e-4] / changes[True, 5e-5] < 5  # second order


def test_projection_keeps_retained_answers_better_at_equal_settings(tiny_model, tiny_sets):
    base = GradAscent(schedule=Schedule(lr=1e-3, epochs=3, batch_size=4))
    plain = base.fit(tiny_model, *tiny_sets)
    projected_edit = Gu(base=base, k=4).fit(tiny_model, *tiny_sets)
    assert projected_edit.deltas.keys() == plain.deltas.keys()
    from mech_unlearn.training.rows import answer_rows, nll, score_rows

    def kept(edit):
        rows = answer_rows(tiny_model.tokenizer, tiny_sets[1].facts)
        with edit.on(tiny_model):
            return nll(score_rows(tiny_model.hf, rows, 0, tiny_model.device)).item()

    assert kept(projected_edit) < kept(plain)


def test_the_retain_term_is_added_after_the_projection(tiny_model, tiny_sets):
    with_retain = Gu(base=GradDiff(schedule=FAST)).fit(tiny_model, *tiny_sets)
    without = Gu(base=replace(GradDiff(schedule=FAST), retain_weight=0.0)).fit(tiny_model, *tiny_sets)
    assert any(not torch.equal(with_retain.deltas[n], without.deltas[n]) for n in without.deltas)
    assert "retain_nll" in without.recipe["report"]["final_losses"]


@pytest.mark.parametrize("architecture", ("gpt2", "gpt_neox", "gemma2", "olmo2"))
def test_it_works_on_other_architectures_and_in_bfloat16(architecture, tiny_sets):
    model = load(tiny_hf(architecture, layers=2).to(torch.bfloat16), tokenizer=tiny_tokenizer())
    before = model.hash()
    assert Gu(base=Npo(schedule=Schedule(lr=1e-3, epochs=1, batch_size=8))).fit(model, *tiny_sets).deltas
    assert model.hash() == before


def test_settings_out_of_range_and_nothing_retained_are_refused(tiny_model, tiny_sets):
    for method, message in (
        (Gu(k=0), "k must be"),
        (Gu(base=GradAscent(schedule=FAST)), "neither facts nor texts"),
    ):
        with pytest.raises(ValueError, match=message):
            method.fit(tiny_model, tiny_sets[0], RetainSet())
