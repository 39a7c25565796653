"""Rna: another method's training with noise on the untrained model where retained rows are compared with it."""

import dataclasses

import pytest
import torch

from mech_unlearn.methods import GradAscent, Npo, Rmu, Rna, Rocr
from mech_unlearn.training.around import PLAIN
from mech_unlearn.training.schedule import Schedule

BASE = Npo(schedule=Schedule(lr=1e-3, epochs=1, batch_size=4))


def same(one, other):
    return one.deltas.keys() == other.deltas.keys() and all(
        torch.equal(one.deltas[name], other.deltas[name]) for name in one.deltas
    )


def test_without_variance_it_is_the_base_with_its_retained_rows_compared_by_kl(tiny_model, tiny_sets):
    base = BASE.fit(tiny_model, *tiny_sets, dataclasses.replace(PLAIN, retain="kl"))
    assert same(Rna(base=BASE, layer=1, nu=0.0).fit(tiny_model, *tiny_sets), base)
    assert not same(Rna(base=BASE, layer=1, nu=0.1).fit(tiny_model, *tiny_sets), base)
    assert not same(BASE.fit(tiny_model, *tiny_sets), base)


def test_a_base_that_compares_states_keeps_its_loss_and_gets_the_noise(tiny_model, tiny_sets):
    base = Rmu(schedule=Schedule(lr=1e-3, epochs=1, batch_size=4), layer=2, c=10.0, alpha=10.0)
    plain = base.fit(tiny_model, *tiny_sets)
    assert same(Rna(base=base, layer=2, nu=0.0).fit(tiny_model, *tiny_sets), plain)
    assert same(Rna(base=base, layer=1, nu=0.0).fit(tiny_model, *tiny_sets), plain)
    noisy = Rna(base=base, layer=2, nu=0.05).fit(tiny_model, *tiny_sets)
    assert not same(noisy, plain)
    with pytest.raises(ValueError, match="has no effect"):
        Rna(base=base, layer=3, nu=0.05).fit(tiny_model, *tiny_sets)


def test_the_noise_has_a_seed_of_its_own(tiny_model, tiny_sets):
    one, other = (Rna(base=BASE, layer=1, seed=seed).fit(tiny_model, *tiny_sets) for seed in (0, 1))
    assert not same(one, other)
    assert same(one, Rna(base=BASE, layer=1, seed=0).fit(tiny_model, *tiny_sets))


def test_the_recipe_has_the_settings_of_both(tiny_model, tiny_sets):
    edit = Rna(base=BASE, layer=1, nu=0.02).fit(tiny_model, *tiny_sets)
    settings = edit.recipe["settings"]
    assert (edit.recipe["method"], settings["nu"], settings["layer"]) == ("rna", 0.02, 1)
    assert settings["base"]["method"] == "npo" and settings["base"]["schedule"]["lr"] == 1e-3
    assert "npo" in edit.name and "rna" in edit.name
    assert "retain_kl" in edit.recipe["report"]["final_losses"]


@pytest.mark.parametrize(
    ("method", "message"),
    (
        (Rna(base=GradAscent(), layer=1), "retained rows"),
        (Rna(base=BASE, layer=9), "noise at layer 9"),
        (Rna(base=BASE, layer=1, nu=-0.1), "nu=-0.1"),
        (Rna(base=Rna(base=BASE, layer=1), layer=1), "retain|noise"),
    ),
)
def test_what_cannot_work_is_refused(tiny_model, tiny_sets, method, message):
    with pytest.raises(ValueError, match=message):
        method.fit(tiny_model, *tiny_sets)


def test_a_base_that_does_not_train_is_refused(tiny_model, tiny_sets):
    method = Rna(base=BASE, layer=1)
    object.__setattr__(method, "base", Rocr())
    with pytest.raises(ValueError, match="Rocr does not train"):
        method.fit(tiny_model, *tiny_sets)
