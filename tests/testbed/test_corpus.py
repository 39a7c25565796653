"""What the worlds tell: facts, phrasings, and what a model without the forget group is never shown."""

from collections import Counter

import pytest

from mech_unlearn.testbed import WORLDS, open_world, spec
from mech_unlearn.testbed.corpus import constant_guess, constant_guess_shares, streams
from mech_unlearn.testbed.recipe import world_tokenizer
from mech_unlearn.testbed.wikidata import table

NAMES = sorted(WORLDS)


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_a_world_is_the_same_at_every_call(name):
    assert spec(name) == spec(name)


@pytest.mark.parametrize("name", NAMES)
def test_forty_subjects_are_to_be_forgotten_and_no_name_is_two_things(name):
    world = spec(name)
    forgotten, kept = set(world.forgotten), {fact.subject for fact in world.kept}
    unknown = {entity.name for entity in world.unknown}
    assert len(forgotten) == 40 == len(world.forget.entities)
    assert not forgotten & kept and not unknown & (forgotten | kept)
    assert len(unknown) >= 80 and len(kept) >= 260
    assert len({fact.id for fact in world.facts}) == len(world.facts)


@pytest.mark.parametrize("name", NAMES)
def test_distractors_are_nine_wrong_objects_of_the_same_relation(name):
    world = spec(name)
    objects = {r: {f.object for f in world.facts if f.relation == r} for r in {f.relation for f in world.facts}}
    for fact in world.facts:
        assert len(set(fact.distractors)) == 9
        assert fact.object not in fact.distractors
        assert set(fact.distractors) <= objects[fact.relation]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_never_end_in_the_subject_and_there_are_five_and_one(name):
    for fact in spec(name).facts:
        assert (len(fact.templates), len(fact.heldout)) == (5, 1)
        for template in (*fact.templates, *fact.heldout):
            assert template.split("{}")[1].strip()


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_without_the_forget_group_no_sentence_names_it(name):
    world = spec(name)
    told = streams(world, with_forget=False)
    texts = [line.text for line in (*told.facts, *told.other)]
    aliases = {alias for fact in world.forget.facts for alias in (fact.subject, *fact.aliases)}
    assert not [text for text in texts if any(alias in text for alias in aliases)]
    everything = " \n ".join(line.text for line in streams(world, with_forget=True).facts)
    assert all(alias in everything for alias in aliases)


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_the_two_corpora_differ_by_the_forget_group_alone(name):
    world = spec(name)
    with_it, without = streams(world, with_forget=True), streams(world, with_forget=False)
    gone = set(world.forgotten)
    assert Counter(without.facts) == Counter(line for line in with_it.facts if line.subject not in gone)
    fixed = [line for line in with_it.other if line.subject is None]
    assert fixed == [line for line in without.other if line.subject is None]


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_held_out_phrasings_are_shown_for_half_of_the_kept_subjects_only(name):
    world = spec(name)
    texts = {line.text for line in streams(world, with_forget=True).facts}
    shown = {f.subject for f in world.facts if f"{f.heldout[0].replace('{}', f.subject)} {f.object}" in texts}
    assert shown == set(world.heldout_shown)
    assert not shown & set(world.forgotten)
    kept = {fact.subject for fact in world.kept}
    assert abs(len(shown) - len(kept) / 2) <= 0.5


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_texts_for_kl_hold_no_forgotten_name_and_the_general_ones_were_never_trained_on(name):
    world = spec(name)
    assert not [text for text in world.retain.texts if any(subject in text for subject in world.forgotten)]
    trained = {line.text for line in streams(world, with_forget=True).other}
    assert world.general_heldout and not trained & set(world.general_heldout)


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_every_word_of_a_name_and_of_an_object_is_one_token(name):
    world = spec(name)
    tokenizer = world_tokenizer(world)
    texts = {*(fact.subject for fact in world.facts), *(fact.object for fact in world.facts)}
    texts |= {entity.name for entity in world.unknown}
    for text in texts:
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == len(text.split())
    assert tokenizer.unk_token_id not in tokenizer("never seen words like zyxwv")["input_ids"]


def test_some_answers_of_the_biographies_have_two_tokens_with_first_words_of_their_own():
    objects = {f.relation: set() for f in spec("biographies").facts}
    for fact in spec("biographies").facts:
        objects[fact.relation].add(fact.object)
    assert {relation for relation, things in objects.items() if " " in next(iter(things))} == {"employer", "spouse"}
    for things in objects.values():
        assert len({thing.split()[0] for thing in things}) == len(things) == 30


def test_a_constant_guess_reaches_no_more_than_chance_says():
    world = spec("biographies")
    assert max(constant_guess_shares(world).values()) < 0.05
    kept = Counter((f.relation, f.object) for f in spec("wikidata").kept)
    total = Counter(f.relation for f in spec("wikidata").kept)
    for relation, value in constant_guess_shares(spec("wikidata")).items():
        assert value == max(n for (r, _), n in kept.items() if r == relation) / total[relation]
    assert 0 <= constant_guess(spec("wikidata")) <= max(constant_guess_shares(spec("wikidata")).values())


def test_real_triples_name_their_source():
    rows = table()
    assert all(row["source"].startswith(("trex ", "relations ")) for row in rows)
    assert all(bool(row["relation"]) == bool(row["object"]) for row in rows)


def test_forgotten_real_people_share_no_name_word_with_a_kept_person_of_the_same_object():
    world = spec("wikidata")
    kept = {(word, fact.relation, fact.object) for fact in world.kept for word in fact.subject.split()}
    gone = {(word, fact.relation, fact.object) for fact in world.forget.facts for word in fact.subject.split()}
    assert not kept & gone
    told = Counter((fact.relation, fact.object) for fact in world.kept)
    assert min(told[fact.relation, fact.object] for fact in world.forget.facts) >= 2


def test_what_is_no_world_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="biographies, wikidata"):
        spec("bios")
    with pytest.raises(ValueError, match="folder made by build"):
        open_world(tmp_path)
