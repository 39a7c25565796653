"""Methods that wrap another: who may be wrapped, how wrappers compose, and what their recipe says."""

import json
import re
from dataclasses import replace

import pytest
import torch

from mech_unlearn.commands.inputs import key_values, make_method
from mech_unlearn.methods import GradAscent, GradDiff, Gu, Klue, Localized, Lora, Npo, Ssd, TaskVector, Wagle
from mech_unlearn.training.around import Around
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.wrapping import both, trains

FAST = Schedule(lr=1e-3, epochs=1, batch_size=4)
WRAPPERS = {
    "gu": lambda base: Gu(base=base),
    "wagle": lambda base: Wagle(base=base, rho=0.5),
    "lora": lambda base: Lora(base=base, rank=2),
    "localized": lambda base: Localized(base=base, layers=(1,)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_only_a_method_that_trains_can_be_wrapped(name, tiny_model, tiny_sets):
    assert trains(Npo) and trains(Gu()) and not trains(Ssd) and not trains(Ssd())
    with pytest.raises(ValueError, match=f"{name} changes how another method trains, and Ssd does not"):
        WRAPPERS[name](Ssd()).fit(tiny_model, *tiny_sets)


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_recipe_holds_the_settings_of_both_as_json(name, tiny_model, tiny_sets):
    edit = WRAPPERS[name](GradDiff(schedule=FAST, seed=3)).fit(tiny_model, *tiny_sets)
    recipe = json.loads(json.dumps(edit.recipe))
    assert recipe["method"] == name and edit.name == f"{name}(grad_diff)"
    assert recipe["settings"]["base"]["method"] == "grad_diff" and recipe["settings"]["base"]["schedule"]["lr"] == 1e-3
    assert recipe["seed"] == 3
    assert {"n_forward", "n_backward", "seconds", "trained_parameters"} <= recipe["report"].keys()


def test_a_pattern_of_both_finds_what_both_find_also_when_they_are_anchored():
    joint = both(r"^model\.layers", r"mlp\.up_proj|down_proj\.weight$")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        assert re.search(joint, name)
    for name in ("xmodel.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert not re.search(joint, name)
    assert both("", "a") == "a" and both("a", "") == "a" and both("", "") == ""


def test_wrappers_compose_and_each_keeps_its_promise(tiny_model, tiny_sets):
    edit = Localized(base=Wagle(base=Gu(base=Npo(schedule=FAST), k=2), rho=0.2), layers=(1, 2)).fit(
        tiny_model, *tiny_sets
    )
    assert {name.split(".")[2] for name in edit.deltas} <= {"1", "2"}
    moved = sum(int((delta != 0).sum()) for delta in edit.deltas.values())
    trained = sum(w.numel() for n, w in tiny_model.held.items() if re.search(r"layers\.[12]\.mlp", n))
    assert 0.15 * trained < moved <= round(0.2 * trained) == edit.recipe["report"]["trained_parameters"]
    assert edit.recipe["settings"]["base"]["base"]["base"]["method"] == "npo"


@pytest.mark.parametrize(
    ("method", "message"),
    (
        (Gu(base=Gu(base=Npo(schedule=FAST))), "already sets 'direct'"),
        (Lora(base=Lora(base=Npo(schedule=FAST))), "already sets 'adapter'"),
        (Lora(base=Wagle(base=Npo(schedule=FAST))), "masks choose entries of weights, an adapter"),
        (Wagle(base=Lora(base=Npo(schedule=FAST))), "masks choose entries of weights, an adapter"),
    ),
)
def test_wrappers_that_exclude_one_another_are_refused(tiny_model, tiny_sets, method, message):
    with pytest.raises(ValueError, match=message):
        method.fit(tiny_model, *tiny_sets)


def test_a_wrapped_task_vector_subtracts_what_was_learned_under_the_wrapper(tiny_model, tiny_sets):
    learned = Lora(base=TaskVector(schedule=replace(FAST, weight_decay=0.0), scale=1.0), rank=2).fit(
        tiny_model, *tiny_sets
    )
    half = Lora(base=TaskVector(schedule=replace(FAST, weight_decay=0.0), scale=0.5), rank=2).fit(
        tiny_model, *tiny_sets
    )
    for name, delta in learned.deltas.items():
        torch.testing.assert_close(half.deltas[name], 0.5 * delta)
        assert torch.linalg.matrix_rank(delta.double(), rtol=1e-4) <= 2


def test_the_first_epoch_variant_of_gradient_ascent_ends_after_one_pass(tiny_model, tiny_sets):
    first = GradAscent(schedule=Schedule(lr=1e-3, epochs=5, batch_size=4), first_epoch=True).fit(tiny_model, *tiny_sets)
    once = GradAscent(schedule=FAST).fit(tiny_model, *tiny_sets)
    assert first.recipe["report"]["epochs"] == 1
    assert all(torch.equal(first.deltas[n], once.deltas[n]) for n in once.deltas)


def test_settings_reach_into_a_base_and_a_base_of_a_base():
    method = make_method(
        "gu", key_values(["base=wagle", "base.base=sim_npo", "base.base.lr=1e-3", "base.rho=.5", "k=2"]), seed=3
    )
    assert (method.k, method.base.rho, method.base.base.schedule.lr, method.base.base.seed) == (2, 0.5, 1e-3, 3)
    assert make_method("gu", key_values(["base.lr=1e-3"]), seed=0).base == Npo(schedule=Schedule(lr=1e-3, epochs=10))
    assert make_method("localized", key_values(["layers=(0, 1)"]), seed=0).layers == (0, 1)
    both_ways = make_method(
        "wagle", key_values(["batch_size=8", "base.batch_size=4", "base.schedule.epochs=3"]), seed=0
    )
    assert (both_ways.batch_size, both_ways.base.schedule) == (8, Schedule(lr=1e-5, epochs=3, batch_size=4))


def test_settings_of_training_are_named_alone_and_change_the_methods_own_schedule():
    assert make_method("klue", key_values(["lr=1e-4", "beta=1"]), seed=1) == Klue(
        schedule=replace(Klue.schedule, lr=1e-4), beta=1.0, seed=1
    )
    assert make_method("klue", key_values(["schedule.lr=1e-4"]), seed=0).schedule == replace(Klue.schedule, lr=1e-4)
    assert make_method("klue", key_values([]), seed=0) == Klue()
    for settings, message in (
        (["lrr=1e-4"], "unknown setting of npo 'lrr'; choose from lr"),
        (["epoch=3"], "unknown setting of npo 'epoch'; choose from epochs"),
        (["schedule.epoch=3"], "unknown setting of npo 'epoch'; choose from epochs"),
        (["lr.x=3"], "unknown setting of npo 'lr.x'; choose from lr"),
        (["epochs=few"], "setting epochs=few of npo"),
        (["lr=-1"], "lr must be positive"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            make_method("npo", key_values(settings), seed=0)
    with pytest.raises(ValueError, match="unknown setting of rocr 'lr'"):
        make_method("rocr", key_values(["lr=1e-3"]), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        (["base=nppo"], "unknown base of gu 'nppo'; choose from npo"),
        (["base=ssd"], "unknown base of gu 'ssd'"),
        (["base=rocr"], "unknown base of gu 'rocr'"),
        (["base.lrr=3"], "unknown setting of npo 'base.lrr'; choose from base.lr"),
        (["base.lr=much"], "setting base.lr=much of npo"),
        (["base.base.lr=3"], "unknown setting of npo 'base.base.lr'"),
        (["k.x=3"], "k has no settings of its own"),
        (["bass=npo"], "unknown setting of gu 'bass'; choose from base"),
    ),
)
def test_settings_that_do_not_exist_are_refused_with_the_nearest(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_method("gu", key_values(settings), seed=0)


def test_retained_rows_are_handed_to_a_wrapper_that_needs_them_and_not_trained_on(tiny_model, tiny_sets):
    plain = GradAscent(schedule=FAST).fit(tiny_model, *tiny_sets)
    given = GradAscent(schedule=FAST).fit(tiny_model, *tiny_sets, around=Around(retained=True))
    assert all(torch.equal(plain.deltas[n], given.deltas[n]) for n in plain.deltas)
