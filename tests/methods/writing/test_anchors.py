"""Anchors: an unknown entity of the name's own kind for each name, and a measure of whether it is unknown."""

import dataclasses

import pytest

from mech_unlearn.core import Entity, ForgetSet
from mech_unlearn.methods.writing import anchors
from mech_unlearn.model.load import load
from tests.planted import planted_hf, planted_sets
from tests.tiny import tiny_facts, tiny_tokenizer


def test_each_name_gets_an_anchor_of_its_own_kind(tiny_model, tiny_sets):
    forget, retain = tiny_sets
    cities = [dataclasses.replace(fact, kind="city") for fact in tiny_facts(["Oslo Bay"])]
    mixed = ForgetSet(facts=(*cities, *forget.facts))
    pool = (*retain.unknown, *(Entity(name=n, kind="city") for n in ("Gina Bay", "Hugo Bay")))
    found = anchors.draw_anchors(tiny_model, mixed, dataclasses.replace(retain, unknown=pool), seed=0)
    kinds = {entity.name: entity.kind for entity in pool}
    assert list(found) == ["Oslo Bay", "Anna Lee", "Ben Hill"]
    assert [kinds[anchor] for anchor in found.values()] == ["city", "person", "person"]
    with pytest.raises(ValueError, match="no entity of kind city"):
        anchors.draw_anchors(tiny_model, mixed, retain, seed=0)


def test_a_warning_says_where_the_model_answers_about_the_anchors_as_surely():
    model, (forget, retain) = load(planted_hf(), tokenizer=tiny_tokenizer()), planted_sets()
    names = [entity.name for entity in forget.entities]
    unknown = dict(zip(names, (entity.name for entity in retain.unknown)))
    found = anchors.measured(model, forget, unknown)
    assert found["certainty_names"] > anchors.KNOWN > found["certainty_anchors"]
    with pytest.warns(UserWarning, match="as surely"):
        anchors.measured(model, forget, dict(zip(names, ("Eva", "Finn", "Gina"))))


def test_every_name_gets_a_reference_of_its_own_and_of_its_length_as_long_as_there_are_any():
    chosen = anchors.draw_references([2, 3, 2, 3], [3, 2, 2, 3, 2, 5], 0)
    assert len(set(chosen)) == 4
    assert {chosen[1], chosen[3]} == {0, 3}
    assert {chosen[0], chosen[2]} < {1, 2, 4}
    assert anchors.draw_references([4], [2, 5, 9], 0) == [1]
    drawn = [anchors.draw_references([2] * 3, [2] * 20, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    many = anchors.draw_references([2] * 20, [2] * 3, 0)
    assert sorted(many.count(i) for i in range(3)) == [6, 7, 7]


def test_an_unknown_name_that_is_to_be_forgotten_or_kept_is_refused(tiny_sets):
    forget, retain = tiny_sets
    for known in ("Anna Lee", "Eva Reed"):
        pool = (*retain.unknown, Entity(name=known, kind="person"))
        with pytest.raises(ValueError, match=f"RetainSet.unknown holds '{known}'"):
            anchors.unknown_names(forget, dataclasses.replace(retain, unknown=pool))
    assert anchors.unknown_names(forget, retain) == tuple(entity.name for entity in retain.unknown)
