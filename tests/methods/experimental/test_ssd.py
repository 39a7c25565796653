"""Ssd: importances from each row by itself, and a step that only shrinks."""

import pytest
import torch

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.methods import Ssd
from mech_unlearn.methods.experimental.ssd import damping, weight_importance
from mech_unlearn.model.load import load
from mech_unlearn.training.rows import answer_rows
from mech_unlearn.training.trainee import trained_copy
from tests.planted import FORGOTTEN, fresh_planted_model, planted_facts
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

ALL = dict(samples=None, trainable="")


def slow_importance(model, facts, squared="each"):
    """Mean of squared gradients of -log p(answer), or the square of the mean gradient, by autograd on the model."""
    rows = answer_rows(model.tokenizer, facts)
    weights = list(model.held.values())
    grads = []
    for ids, start in rows:
        logp = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        loss = -sum(logp[t - 1, ids[t]] for t in range(start, len(ids))) / (len(ids) - start)
        grads.append(torch.autograd.grad(loss, weights))
    per_weight = [torch.stack(some) for some in zip(*grads)]
    return [(g**2).mean(0) if squared == "each" else g.mean(0) ** 2 for g in per_weight]


def test_importance_is_the_mean_of_squares_not_the_square_of_the_mean(tiny_model, tiny_sets):
    facts = tiny_sets[0].facts
    hf = trained_copy(tiny_model, "")
    got = weight_importance(hf, list(hf.parameters()), answer_rows(tiny_model.tokenizer, facts), 0, "forget")
    for ours, wanted in zip(got, slow_importance(tiny_model, facts), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-6)
    batched = slow_importance(tiny_model, facts, "mean")
    assert sum(x.sum() for x in got) > 1.5 * sum(x.sum() for x in batched)


def test_damping_is_the_equation():
    forget, whole = torch.tensor([1.0, 20.0, 20.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 3.0, 0.0, 0.0])
    torch.testing.assert_close(damping(forget, whole, 10.0, 1.0), torch.tensor([1.0, 0.05, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(damping(forget, whole, 10.0, 50.0), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_only_shrink_and_keep_their_sign(architecture, tiny_sets):
    model = load(tiny_hf(architecture, layers=2), tokenizer=tiny_tokenizer())
    edit = Ssd(alpha=1.0, trainable="").fit(model, *tiny_sets)
    changed = 0
    for name, delta in edit.deltas.items():
        before, after = model.held[name].detach(), model.held[name].detach() + delta
        assert (after.abs() <= before.abs() + 1e-7).all() and (after * before >= -1e-9).all()
        changed += int((delta != 0).sum())
    report = edit.recipe["report"]
    assert 0 < changed <= report["dampened"] and 0 < report["share"] < 1
    assert report["n_backward"] == 2 * (len(tiny_sets[0].facts) + len(tiny_sets[1].facts)) + len(tiny_sets[1].texts)


def test_the_change_is_that_of_the_equations(tiny_model, tiny_sets):
    forget, kept = tiny_sets[0].facts, tiny_sets[1].neighbors
    edit = Ssd(alpha=2.0, lambda_=0.5, **ALL).fit(tiny_model, tiny_sets[0], RetainSet(neighbors=kept))
    ours, theirs = slow_importance(tiny_model, forget), slow_importance(tiny_model, kept)
    for (name, weight), f, d in zip(tiny_model.held.items(), ours, theirs, strict=True):
        wanted = weight * torch.where(f > 2 * d, (0.5 * d / f).clamp(max=1), torch.ones_like(f)) - weight
        near = (f / (2 * d) - 1).abs() < 1e-3  # at the bound, where rounding decides
        torch.testing.assert_close(
            edit.deltas.get(name, torch.zeros_like(weight))[~near], wanted.detach()[~near], rtol=1e-2, atol=1e-5
        )


def test_where_both_sets_are_one_nothing_changes(tiny_model, tiny_sets):
    facts = tiny_sets[0].facts
    same = Ssd(alpha=1.0, **ALL).fit(tiny_model, tiny_sets[0], RetainSet(neighbors=facts))
    assert not same.deltas and same.recipe["report"]["dampened"] == 0


def test_counting_the_forget_rows_in_dampens_less(tiny_model, tiny_sets):
    apart = Ssd(alpha=1.5, **ALL).fit(tiny_model, *tiny_sets).recipe["report"]["dampened"]
    inside = Ssd(alpha=1.5, include_forget=True, **ALL).fit(tiny_model, *tiny_sets).recipe["report"]["dampened"]
    assert 0 < inside < apart


def test_the_planted_units_of_the_forgotten_names_are_dampened_and_no_others():
    model, facts = fresh_planted_model(), planted_facts()
    edit = Ssd().fit(model, ForgetSet(facts=facts[:FORGOTTEN]), RetainSet(neighbors=facts[FORGOTTEN:]))
    moved = edit.deltas["model.layers.2.mlp.down_proj.weight"].abs().sum(0)
    assert (moved[:FORGOTTEN] > 0).all() and (moved[FORGOTTEN:] == 0).all()


def test_only_a_sample_of_the_retained_rows_is_read_and_the_pattern_chooses_the_weights(tiny_model, tiny_sets):
    edit = Ssd(alpha=1.0, samples=5).fit(tiny_model, *tiny_sets)
    assert edit.recipe["report"]["n_backward"] == 2 * len(tiny_sets[0].facts) + 5
    assert edit.deltas and all(".mlp." in n for n in edit.deltas)


def test_settings_out_of_range_and_nothing_retained_are_refused(tiny_model, tiny_sets):
    for method, retain, message in (
        (Ssd(alpha=0.0), tiny_sets[1], "alpha must be positive"),
        (Ssd(samples=0), tiny_sets[1], "samples must be"),
        (Ssd(trainable="nothing"), tiny_sets[1], "nothing would be trained"),
        (Ssd(), RetainSet(), "neither facts nor texts"),
    ):
        with pytest.raises(ValueError, match=message):
            method.fit(tiny_model, tiny_sets[0], retain)
