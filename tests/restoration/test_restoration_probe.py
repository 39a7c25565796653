"""Probes: what they must and must not find in made-up states, the code length, and planted truth."""

import math

import pytest
import torch
from planted import fresh_planted_model, planted_case, planted_model

from mech_unlearn.restoration import probe
from mech_unlearn.restoration.probe_fit import code_lengths, fit_linear, fit_mlp, make_fit
from mech_unlearn.restoration.probe_tasks import make_setup


def made_up(n=240, classes=4, d=24, noise=0.6, seed=0):
    """States in which the class is written along one direction each: (rows [1, n, d], labels, subjects)."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (n,), generator=generator)
    x = noise * torch.randn(n, d, generator=generator)
    x[torch.arange(n), label] += 3.0
    return x[None], label, torch.arange(n)


def accuracy(fit, x, label, subject, cut=160):
    table = fit(x[:, :cut], label[:cut], subject[:cut], x[:, cut:], int(label.max()) + 1)
    assert torch.allclose(table.exp().sum(-1), torch.ones(len(x), len(label) - cut), atol=1e-4)
    return (table.argmax(-1) == label[cut:]).float().mean().item()


@pytest.mark.parametrize("kind", ("linear", "mlp"))
def test_a_planted_attribute_is_found_and_shuffled_labels_are_not(kind):
    fit = make_fit(kind, 0.1, 0)
    x, label, subject = made_up()
    assert accuracy(fit, x, label, subject) > 0.9
    shuffled = label[torch.randperm(len(label), generator=torch.Generator().manual_seed(1))]
    chance, n = 0.25, 80
    assert abs(accuracy(fit, x, shuffled, subject) - chance) < 3.5 * math.sqrt(chance * (1 - chance) / n)


def test_only_the_mlp_finds_what_is_not_linear():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 600, 6, generator=generator)
    label, subject = ((x[0, :, 0] * x[0, :, 1]) > 0).long(), torch.arange(600)
    assert accuracy(fit_mlp, x, label, subject, 450) > 0.8
    assert accuracy(fit_linear, x, label, subject, 450) < 0.65


def test_a_random_projection_to_as_many_dimensions_changes_little():
    x, label, subject = made_up(noise=1.2, n=800)
    mix = torch.randn(24, 48, generator=torch.Generator().manual_seed(3)) / 48**0.5
    a, b = (accuracy(make_fit("linear", 1.0, 0), y, label, subject, 400) for y in (x, x @ mix))
    assert abs(a - b) <= 0.02


def test_places_are_fitted_by_themselves_and_a_class_never_shown_has_probability_zero():
    x, label, subject = made_up()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    for fit in (fit_linear, fit_mlp):
        table = fit(torch.cat([x, noise])[:, :160], label[:160], subject[:160], torch.cat([x, noise])[:, 160:], 5)
        hits = (table.argmax(-1) == label[160:]).float().mean(1)
        assert hits[0] > 0.9 > 0.5 > hits[1] and (table[..., 4] == -torch.inf).all()
    one = fit_linear(x[:, :5], torch.zeros(5, dtype=torch.long), subject[:5], x[:, 5:9], 3)
    assert (one.argmax(-1) == 0).all()


def test_code_length_is_short_for_what_is_written_and_no_shorter_than_the_prior_for_noise():
    x, label, subject = made_up(n=200)
    known, coded = (x[:, :120], label[:120], subject[:120]), (x[:, 120:], label[120:], subject[120:])
    order = list(range(120, 200))
    fit = make_fit("linear", 0.1, 0)
    short = code_lengths(fit, known, coded, 4, order)
    assert short.mean() < 0.5 and (short > 0).all()
    noise = torch.randn(1, 200, 24, generator=torch.Generator().manual_seed(5))
    long = code_lengths(fit, (noise[:, :120], *known[1:]), (noise[:, 120:], *coded[1:]), 4, order)
    assert long.mean() > 0.9 * math.log2(4)


def test_no_label_is_seen_before_it_is_coded():
    x, label, subject = made_up(n=60)
    known, rows = (x[:, :30], label[:30], subject[:30]), x[:, 30:]
    order, fit = list(range(30, 60)), make_fit("linear", 0.1, 0)
    changed = label[30:].clone()
    changed[-6:] = (changed[-6:] + 1) % 4  # the last block
    a, b = (code_lengths(fit, known, (rows, y, subject[30:]), 4, order) for y in (label[30:], changed))
    assert torch.equal(a[:-6], b[:-6]) and not torch.equal(a[-6:], b[-6:])
    early = label[30:].clone()
    early[:3] = (early[:3] + 1) % 4  # the first block: later codes are fitted to it
    assert not torch.equal(a[3:], code_lengths(fit, known, (rows, early, subject[30:]), 4, order)[3:])


@pytest.mark.parametrize("kind", ("linear", "mlp"))
def test_planted_truth(kind):
    case = planted_case(sae=None)
    ready = probe.prepare(case, kind=kind)
    got = {t: probe.audit(case, ready, planted_model(t), t) for t in ("late", "early", "full")}
    assert (got["full"].recoverability == 1).all() and (got["full"].columns["accuracy"] == 1).all()
    assert (got["late"].recoverability > 0.8).all() and got["late"].layer == 2
    assert (got["early"].recoverability < 0.2).all()
    retrained = probe.audit(case, ready, case.retrained[0], "R")
    assert (retrained.recoverability < 0.35).all() and retrained.null.shape == (3, 4)
    assert {"accuracy_R", "control_accuracy", "selectivity", "mdl_bits_R"} <= set(retrained.columns)
    assert (got["full"].columns["mdl_bits"] < retrained.columns["mdl_bits"]).all()


def test_forgotten_answers_never_train_the_probe():
    """Exchanging all forgotten objects exchanges what counts as right, and nothing about the fitted probes."""
    case = planted_case(sae=None)
    x = probe.features(case.full, (setup := make_setup(case)))
    task = setup.tasks[0]
    gone = {fact.subject for fact in case.facts}
    assert not any(setup.queries[i].fact.subject in gone for i in task.kept.tolist())
    assert all(setup.queries[i].fact.subject in gone for i in task.asked.tolist())
    assert set(task.subject.tolist()).isdisjoint(task.owner.tolist())
    assert x.shape == (2 * case.full.n_layers, len(setup.queries), case.full.d_model)


def test_kappa_of_the_accuracy_is_one_for_full_and_has_an_interval():
    case = planted_case(sae=None)
    ready = probe.prepare(case)
    kappa = probe.accuracy_kappa(probe.audit(case, ready, case.full, "full"))
    assert kappa.value == pytest.approx(1.0) and kappa.ci == (pytest.approx(1.0), pytest.approx(1.0)) and kappa.n == 4
    early = probe.accuracy_kappa(probe.audit(case, ready, planted_model("early"), "early"))
    assert early.value < 0.5


def test_without_retrained_models_sham_facts_give_the_level():
    case = planted_case(sae=None, retrained=())
    ready = probe.prepare(case)
    late = probe.audit(case, ready, planted_model("late"), "late")
    assert late.grade == "B" and (late.recoverability > 0.8).all()
    assert (probe.audit(case, ready, planted_model("early"), "early").recoverability < 0.35).all()


def test_no_kept_facts_and_unknown_kinds_are_refused_and_models_are_left_alone():
    with pytest.raises(ValueError, match="others"):
        probe.prepare(planted_case(sae=None, others=()))
    with pytest.raises(ValueError, match="linear or mlp"):
        probe.prepare(planted_case(sae=None), kind="tree")
    case, model = planted_case(sae=None), fresh_planted_model("late")
    state, before = torch.get_rng_state(), model.hash()
    ready = probe.prepare(case)
    a, b = (probe.audit(case, ready, model, "late").recoverability for _ in range(2))
    assert (
        torch.equal(a.nan_to_num(), b.nan_to_num())
        and torch.equal(state, torch.get_rng_state())
        and model.hash() == before
    )
