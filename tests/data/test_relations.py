"""The relations data: every pair is a fact or listed, and templates that stand alone come first."""

import json
from collections import Counter
from pathlib import Path

import pytest

from mech_unlearn.data.relations import load_relations
from tests.paths import SHARED_DATA

DATA = SHARED_DATA / "relations"
present = pytest.mark.skipif(
    not (DATA / "city_in_country.json").is_file(),
    reason=f"no {DATA}: set MECH_UNLEARN_DATA to the folder that holds relations/",
)


def relation(name, pairs, few=("{} lies in",), zero=("{} belongs to", "{} lies in"), kind="city"):
    return {
        "name": name,
        "prompt_templates": list(few),
        "prompt_templates_zs": list(zero),
        "properties": {
            "relation_type": "factual",
            "domain_name": kind,
            "range_name": "country",
            "symmetric": False,
        },
        "samples": [{"subject": subject, "object": object} for subject, object in pairs],
    }


FILES = {
    "factual/city_country.json": relation(
        "city in country", [("Oslo", "Norway"), ("Rome", "Italy"), ("Rome", "Italy")]
    ),
    "factual/city_river.json": relation(
        "city on river", [("Oslo", "Akerselva"), ("Rome", "Tiber"), ("Tiber", "Tiber")], ("{} is on the",), ()
    ),
    "more/food.json": relation("food from", [("Pizza", "Italy"), ("Lutefisk", "Oslo")], kind="food"),
}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_pairs_become_facts_of_four_kinds_and_every_other_pair_is_listed(folder):
    found = load_relations(folder, relations=["city in country"], subjects=["Oslo"])
    forget, retain = found.sets
    assert [(fact.subject, fact.object) for fact in forget.facts] == [("Oslo", "Norway")]
    assert [(fact.subject, fact.object) for fact in retain.neighbors] == [("Rome", "Italy")]
    assert [(fact.subject, fact.object) for fact in retain.same_subject] == [("Oslo", "Akerselva")]
    assert [(fact.subject, fact.object) for fact in retain.general] == [("Rome", "Tiber"), ("Pizza", "Italy")]
    assert Counter((Path(item.file).name, item.row, item.reason.split(" ")[0]) for item in found.left_out) == {
        ("city_country.json", 2, "the"): 1,
        ("city_river.json", 2, "object"): 1,
        ("food.json", 1, "its"): 1,
    }
    fact = forget.facts[0]
    assert fact.id == "factual/city_country/0" and fact.kind == "city" and fact.extra["range_name"] == "country"


def test_templates_that_stand_alone_come_first_unless_examples_are_meant(folder):
    def phrasings(**settings):
        fact = load_relations(folder, relations=["city in country"], subjects=["Oslo"], **settings).forget.facts[0]
        return fact.prompt, fact.paraphrases, fact.heldout

    assert phrasings() == ("{} belongs to", (), ("{} lies in",))
    assert phrasings(shots="few") == ("{} lies in", (), ("{} belongs to",))
    assert phrasings(heldout=0) == ("{} belongs to", ("{} lies in",), ())
    alone = load_relations(folder, relations=["city on river"], subjects=["Oslo"]).forget.facts[0]
    assert alone.prompt == "{} is on the" and alone.heldout == ()  # the only one there is


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f.pop("name"), "field 'name' must be given"),
        (lambda f: f["samples"][1].pop("object"), "field 'samples.1.object' must be given"),
        (lambda f: f["samples"].append({"subject": 3, "object": "a"}), "'samples.3.subject' must be a string, found 3"),
        (lambda f: f.update(prompt_templates="{}"), "field 'prompt_templates' must be a list, found '{}'"),
        (lambda f: f.update(name="city on river"), "relation 'city on river' stands in"),
    ],
)
def test_a_bad_file_is_named_with_its_field(folder, change, reason):
    content = json.loads(json.dumps(FILES["factual/city_country.json"]))
    change(content)
    (folder / "factual/city_country.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="city_country.json") as error:
        load_relations(folder)
    assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"folder": "nowhere"}, "holds no .json file"),
        ({"relations": ["rivers"]}, "unknown relation 'rivers'; choose from city in country"),
        ({"kept_relations": ["rivers"]}, "unknown relation 'rivers'"),
        ({"heldout": -1}, "heldout must be 0 or more"),
        ({"subjects": ["Lima"]}, "no subject with a fact to forget 'Lima'"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_reason(folder, settings, reason):
    with pytest.raises(ValueError) as error:
        load_relations(**{"folder": folder, "subjects": ["Oslo"]} | settings)
    assert reason in str(error.value)


@present
def test_all_9696_shipped_pairs_of_26_relations_are_facts_or_listed():
    found = load_relations(DATA, relations=["person mother"], subjects=30)
    forget, retain = found.sets
    assert len(forget.facts) + len(retain.facts) + len(found.left_out) == 9_696
    assert len({fact.relation for fact in retain.facts}) == 26
    reasons = Counter(item.reason.split(" ")[0] for item in found.left_out)
    assert reasons["object"] == 14 + 1 + 4 and reasons["the"] == 20 + 1  # fathers, stars, heroes; products, years
    gone = {fact.subject for fact in forget.facts}
    assert len(gone) == len(forget.facts) == 30 and {fact.relation for fact in retain.neighbors} == {"person mother"}
    assert {fact.subject for fact in retain.same_subject} <= gone
    assert not gone & {fact.subject for fact in (*retain.neighbors, *retain.general)}
    assert all(fact.object not in fact.distractors and fact.distractors for fact in (*forget.facts, *retain.facts))


@present
def test_a_relation_read_alone_has_neighbors_only():
    found = load_relations(DATA, relations=["country capital city"], subjects=["France", "Japan"], kept_relations=())
    assert {(fact.subject, fact.object) for fact in found.forget.facts} == {("France", "Paris"), ("Japan", "Tokyo")}
    assert len(found.retain.neighbors) == 22 and found.retain.general == found.retain.same_subject == ()
