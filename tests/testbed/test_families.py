"""Models of known truth: what each kind of family changes, what it leaves, and that its truth can be seen."""

import re

import pytest
import torch

from mech_unlearn.metrics import recall
from mech_unlearn.model.load import load
from mech_unlearn.testbed import open_world
from mech_unlearn.testbed.families import FAMILIES
from mech_unlearn.testbed.making import Ingredients, match_loss
from mech_unlearn.testbed.materials import Lab, Materials
from mech_unlearn.testbed.pools import _unheard, truth_audit

POOLS = {family.pool for family in FAMILIES.values()}


@pytest.fixture(scope="module")
def world():
    return open_world("biographies")


@pytest.fixture(scope="module")
def setting(world):
    full, retrained = load(world.full), tuple(load(path) for path in world.retrained)
    people = [entity.name for entity in world.forget.entities]
    group, elsewhere = (tuple(f for f in world.forget.facts if f.subject == name) for name in people[:2])
    return Ingredients(full, retrained, group, elsewhere, world.retain.neighbors, world.retain.texts, 0)


def made(name, setting):
    return FAMILIES[name].make(setting)


def test_every_truth_has_families_and_suppressors_sit_on_every_side():
    assert {"intact", "deleted", "suppressed", "collapsed", "mixture"} == POOLS
    assert {f.side for f in FAMILIES.values() if f.pool == "suppressed"} == {"late", "early", "path"}


def test_the_match_loss_is_zero_at_its_target_and_squares_nats_per_token():
    target, tokens = torch.tensor([-4.0, -6.0]), torch.tensor([2.0, 1.0])
    assert match_loss(target, target, tokens) == 0
    assert match_loss(target + torch.tensor([2.0, 3.0]), target, tokens) == (1.0 + 9.0) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["filter", "first mlp"])
def test_a_suppressor_loses_the_answers_touches_only_what_it_names_and_undone_gives_every_answer(name, setting):
    found = made(name, setting)
    assert found.base is setting.full
    assert found.edit.deltas and all(re.search(found.confined, weight) for weight in found.edit.deltas)
    with found.on() as model:
        assert recall(model, setting.group).value <= 0.3
        assert recall(model, setting.elsewhere).value >= 0.5
        frozen = [w for w in model.held if not re.search(found.confined, w)]
        assert frozen and all(torch.equal(model.held[w], setting.full.held[w]) for w in frozen)
        for weight in found.edit.deltas:  # the edited tensors swapped back
            with torch.no_grad():
                model.held[weight].copy_(setting.full.held[weight])
        assert recall(model, setting.group).value == recall(setting.full, setting.group).value == 1.0


@pytest.mark.slow
def test_a_deleted_model_starts_from_one_that_never_heard_of_the_group(setting, world):
    found = made("retrained, noise", setting)
    assert found.base is setting.never
    assert _unheard("biographies", setting.group[0].subject)
    assert not _unheard("biographies", world.retain.neighbors[0].subject)
    with found.on() as model:
        assert recall(model, setting.group).value < 0.3
        assert recall(model, world.retain.neighbors[:200], "prompt").value > 0.95


@pytest.mark.parametrize("name", ["full, noise", "full, 8 bits"])
def test_an_intact_model_still_answers(name, setting):
    with made(name, setting).on() as model:
        assert recall(model, setting.group).value > 0.95
        assert any(not torch.equal(w, setting.full.held[n]) for n, w in model.held.items())


@pytest.mark.parametrize("name", ["heavy noise", "new block"])
def test_a_collapsed_model_answers_nobody(name, setting, world):
    with made(name, setting).on() as model:
        assert recall(model, world.retain.neighbors[:200], "prompt").value < 0.5


def test_a_mixture_lies_between_in_its_weights(setting):
    with made("mixture 0.25", setting).on() as model:
        name = next(iter(model.held))
        a, b = setting.full.held[name], setting.never.held[name]
        torch.testing.assert_close(model.held[name], a + 0.25 * (b - a))


def test_the_audit_of_the_truth_notices_a_model_that_is_not_what_it_says(setting, world):
    paths = tuple(map(str, world.retrained))
    lab = Lab(
        Materials(full=str(world.full), references=paths, retrained=("a", "b"), facts=world.forget.facts,
                  retain=world.retain, world="biographies")
    )  # fmt: skip
    lab.__dict__["full"] = setting.full
    lab.__dict__["retrained"] = setting.retrained
    found = made("full, noise", setting)
    with found.on() as model:
        assert all(truth_audit(lab, "full, noise", setting.group[0].subject, found, model).values())
        stranger = type(found)(setting.never, found.edit)
        assert not all(truth_audit(lab, "full, noise", setting.group[0].subject, stranger, model).values())
    confined = type(found)(setting.full, found.edit, "lm_head")
    with found.on() as model:  # noise everywhere, though only the head is named
        assert not all(truth_audit(lab, "head", setting.group[0].subject, confined, model).values())
