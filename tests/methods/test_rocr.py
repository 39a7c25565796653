"""Rocr: the name's state becomes the anchor's, for all names at once, and retained names keep theirs."""

import dataclasses

import pytest
import torch

from mech_unlearn.core import Entity, Fact, ForgetSet, RetainSet, Site
from mech_unlearn.methods import Rocr
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.protect import KEY_SOURCES
from mech_unlearn.model.load import load
from tests.tiny import tiny_hf, tiny_tokenizer


def states(model, names, contexts=("{} was", "The birthplace of {} is"), layer=1):
    return keys.name_states(model, names, contexts, Site(layer, "resid_post"))


FREE = dict(layers=(0, 1), protect=(), ridge=0.01)


def test_names_move_to_their_anchor_and_without_an_edit_they_do_not(tiny_model, tiny_sets):
    names = [entity.name for entity in tiny_sets[0].entities]
    method = Rocr(anchor="Eva Reed", layers=(1,), protect=(), ridge=0.01, contexts=("{} was",))
    anchor = states(tiny_model, ["Eva Reed"], ["{} works"])
    far = (states(tiny_model, names, ["{} works"]) - anchor).norm(dim=-1)
    with method.fit(tiny_model, *tiny_sets).on(tiny_model):
        near = (states(tiny_model, names, ["{} works"]) - anchor).norm(dim=-1)
    assert (near < 0.1 * far).all()


def test_each_name_gets_an_unknown_entity_of_its_own(tiny_model, tiny_sets):
    forget, retain = tiny_sets
    edit = Rocr(**FREE).fit(tiny_model, forget, retain)
    anchors = edit.recipe["report"]["anchors"]
    assert anchors.keys() == {"Anna Lee", "Ben Hill"}
    assert len(set(anchors.values())) == 2
    assert set(anchors.values()) <= {entity.name for entity in retain.unknown}
    for name, anchor in anchors.items():
        before = (states(tiny_model, [name]) - states(tiny_model, [anchor])).norm()
        target = states(tiny_model, [anchor])
        with edit.on(tiny_model):
            assert (states(tiny_model, [name]) - target).norm() < 0.7 * before


def test_the_delta_has_at_most_one_rank_per_name_in_each_layer_it_names(tiny_model, tiny_sets):
    edit = Rocr(layers=(0, 2)).fit(tiny_model, *tiny_sets)
    assert set(edit.deltas) == {tiny_model.w_out(0)[0], tiny_model.w_out(2)[0]}
    for delta in edit.deltas.values():
        assert torch.linalg.matrix_rank(delta.dense()) <= 2


def test_protected_names_move_less_than_unprotected_ones(tiny_model, tiny_sets):
    kept = [entity.name for entity in tiny_sets[1].entities]
    clean = states(tiny_model, kept)
    moved = {}
    for protect in (KEY_SOURCES, ()):
        edit = Rocr(layers=(0, 1), energy=0.01, protect=protect).fit(tiny_model, *tiny_sets)
        with edit.on(tiny_model):
            moved[protect] = (states(tiny_model, kept) - clean).norm()
    assert moved[KEY_SOURCES] < 0.5 * moved[()]


def test_aliases_are_redirected_with_the_name(tiny_model, tiny_sets):
    forget, retain = tiny_sets
    facts = tuple(dataclasses.replace(fact, aliases=("Hugo Stone",)) for fact in forget.facts[:2])
    anchor = states(tiny_model, ["Eva Reed"])
    far = (states(tiny_model, ["Hugo Stone"]) - anchor).norm()
    moved = {}
    for key, chosen in (("with", facts), ("without", forget.facts[:2])):
        with Rocr(anchor="Eva Reed", **FREE).fit(tiny_model, ForgetSet(facts=chosen), retain).on(tiny_model):
            moved[key] = (states(tiny_model, ["Hugo Stone"]) - anchor).norm()
    assert moved["with"] < 0.7 * far
    assert moved["with"] < moved["without"]


def test_no_heldout_phrasing_reaches_the_method(tiny_model, tiny_sets):
    forget, retain = tiny_sets
    other = ForgetSet(facts=tuple(dataclasses.replace(fact, heldout=("The sea of {} is",)) for fact in forget.facts))
    one, two = (Rocr(**FREE).fit(tiny_model, chosen, retain) for chosen in (forget, other))
    assert all(torch.equal(one.deltas[n].dense(), two.deltas[n].dense()) for n in one.deltas)


@pytest.mark.parametrize(
    ("method", "message"),
    (
        (Rocr(layers=(9,)), "layers are 0..3"),
        (Rocr(layers=(2,), z_layer=1), "cannot reach"),
        (Rocr(anchor="Anna Lee"), "is to be forgotten itself"),
    ),
)
def test_impossible_settings_are_refused(tiny_model, tiny_sets, method, message):
    with pytest.raises(ValueError, match=message):
        method.fit(tiny_model, *tiny_sets)


def test_unknown_entities_of_the_right_kind_are_needed(tiny_model, tiny_sets):
    forget, retain = tiny_sets
    cities = dataclasses.replace(retain, unknown=(Entity(name="Oslo", kind="city"),))
    with pytest.raises(ValueError, match="no entity of kind person"):
        Rocr().fit(tiny_model, forget, cities)
    assert Rocr(anchor="Eva Reed").fit(tiny_model, forget, cities).deltas


def test_too_few_protected_keys_are_warned_of(tiny_model, tiny_sets):
    with pytest.warns(UserWarning, match="give more retain texts"):
        Rocr(protect=("texts",)).fit(
            tiny_model, tiny_sets[0], RetainSet(texts=("The sea",), unknown=tiny_sets[1].unknown)
        )


def test_a_prompt_that_begins_with_other_text_is_a_context_of_its_own(tiny_model):
    fact = Fact(id="x", subject="Anna Lee", relation="r", object="Oslo", prompt="{} is", paraphrases=("The {} is",))
    assert keys.contexts_of([fact]) == ("{} is", "The {} is")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("bos", "name", "layers"),
    [(False, "Anna", [0, 2, 3, 4]), (True, "Anna", [2, 3, 4]), (False, "Anna Lee", [2, 3, 4])],
)
def test_a_name_that_is_a_prompts_first_token_is_written_at_layer_0_too(bos, name, layers, tiny_sets):
    model = load(tiny_hf(layers=12), tokenizer=tiny_tokenizer(bos=bos))
    forget = ForgetSet(facts=tuple(dataclasses.replace(fact, subject=name) for fact in tiny_sets[0].facts[:1]))
    method = Rocr(protect=())
    assert method.fit(model, forget, tiny_sets[1]).recipe["report"]["layers"] == layers
    given = dataclasses.replace(method, layers=(3,))
    assert given.fit(model, forget, tiny_sets[1]).recipe["report"]["layers"] == [3]
