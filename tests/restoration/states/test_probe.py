"""Probes: what they must and must not find in made-up states, the code length, and planted truth."""

import math
from dataclasses import replace

import pytest
import torch

from mech_unlearn.restoration.states import probe
from mech_unlearn.restoration.states.probe_fit import _validation, code_lengths, fit_linear, fit_mlp, make_fit
from mech_unlearn.restoration.states.probe_tasks import MAX_KEPT, Setup, Task, kept_facts, make_setup
from tests.planted import fresh_planted_model, planted_case, planted_facts, planted_model
from tests.tiny import tiny_facts


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


@pytest.mark.slow
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


def test_the_level_of_ignorance_is_the_mean_of_the_shams_that_could_be_asked():
    facts = tiny_facts(["Anna Lee", "Ben Hill"])
    facts = (facts[0], facts[2], facts[1], replace(facts[3], relation="third"))  # born, born, works, third
    values = torch.tensor([[1.0, torch.nan, 3.0, torch.nan], [1.0, 2.0, 0.0, 0.0]])
    want = torch.tensor([[1.0, 1.0, 3.0, torch.nan], [1.5, 1.5, 0.0, 0.0]])
    assert torch.equal(probe._asked_mean(values, facts).nan_to_num(-1), want.nan_to_num(-1))
    unheard = tuple(replace(fact, distractors=("Acme", "Globex")) for fact in planted_facts()[:4])
    case = planted_case(sae=None, retrained=(), facts=unheard)
    found = probe.audit(case, probe.prepare(case), planted_model(), "full")
    assert (
        found.recoverability.isnan().all() and found.curves["score"].max() > 1
    )  # read, with no level to set it against


def test_the_true_object_is_no_rival_of_a_sham():
    (fact,) = tiny_facts(["Anna Lee"], ("born",))
    sham = replace(fact, object="Rome", distractors=("Umbrella",))  # the true object is Paris
    table = torch.tensor([0.7, 0.2, 0.05, 0.05]).log()[None, None]
    told = probe._margins(table, ("Paris", "Rome", "Oslo", "Bern"), [sham], torch.tensor([0]))
    assert told.item() == pytest.approx(math.log(0.2 / 0.05))
    assert probe._margins(table[..., :2], ("Paris", "Rome"), [sham], torch.tensor([0])).isnan().all()


def test_what_validates_the_mlp_is_a_fifth_of_the_subjects_whole_and_leaves_every_class_a_row():
    subject = torch.arange(40).repeat_interleave(3)
    label = torch.arange(40).repeat_interleave(3) % 7
    validate, train = _validation(label, subject, torch.Generator().manual_seed(0))
    assert torch.equal(validate, ~train) and len(subject[validate].unique()) == 8
    assert not set(subject[validate].tolist()) & set(subject[train].tolist())
    assert set(label[train].tolist()) == set(range(7))
    single = torch.arange(4)
    assert all(rows.all() for rows in _validation(single, single, torch.Generator().manual_seed(0)))


def test_the_strength_is_chosen_on_subjects_that_were_not_fitted():
    """Each subject has a code of its own and four phrasings: what memorises it would win among phrasings."""
    generator = torch.Generator().manual_seed(0)
    subject = torch.arange(30).repeat_interleave(4)
    label = torch.randint(3, (30,), generator=generator).repeat_interleave(4)
    nothing = torch.zeros(0, dtype=torch.long)
    task = Task(("a", "b", "c"), torch.arange(120), label, subject, nothing, nothing, nothing)
    setup = Setup((), 0, 0, (task,), (), ())
    own = torch.randn(30, 60, generator=generator)[subject].expand(2, -1, -1)
    assert probe.choose_strength(setup, own, 1, 0) == probe.STRENGTHS[0]
    written = 0.1 * own + 3.0 * torch.nn.functional.one_hot(label, 60)
    assert probe.choose_strength(setup, written, 1, 0) == probe.STRENGTHS[-1]


def test_kept_facts_are_taken_at_even_distances_where_there_are_too_many():
    many = tiny_facts([f"Person {i}" for i in range(MAX_KEPT + 50)], ("born",))
    case = planted_case(sae=None, facts=tiny_facts(["Anna Lee"], ("born",)), others=many)
    kept = [many.index(fact) for fact in kept_facts(case)]
    assert len(kept) == MAX_KEPT and kept[0] == 0 and kept[-1] >= len(many) - 2
    assert {b - a for a, b in zip(kept, kept[1:])} == {1, 2}
    assert kept_facts(replace(case, others=many[:MAX_KEPT])) == list(many[:MAX_KEPT])


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
