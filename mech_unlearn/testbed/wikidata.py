"""Wikidata: some 320 real people with two or more facts each, 40 of them to be forgotten, 90 known by name only.

The triples stand in `wikidata.tsv`, with their sources; every sentence is made from the templates below. Names have
one to four words. Objects are skewed, as in life: `corpus.constant_guess_shares` says what a constant guess reaches.
The forget group is drawn among people whose objects are all told of two or more kept people, and whose name shares no
word with a kept person of the same object, so that neither a missing word nor a word of the name decides an answer.
"""

import csv
import random
from collections import Counter
from importlib.resources import files

from mech_unlearn.core import Entity
from mech_unlearn.testbed.corpus import NOTHING_TOLD, Relation, Spec, make_fact, mention_sentences, split_general

FORGOTTEN = 40
RELATIONS = (
    Relation(
        name="citizenship",
        phrasings=(
            "{} was a citizen of",
            "The country of {} is",
            "{} carried the passport of",
            "The state to which {} belonged was",
            "{} belonged to the people of",
        ),
        heldout="Abroad {} was an envoy of",
        records=("Citizens : {}", "Passport list , {}"),
        general=("The borders of {} were redrawn", "Many roads lead through {}", "The coins of {} were made of silver"),
    ),
    Relation(
        name="field of work",
        phrasings=(
            "{} worked in the field of",
            "The subject of {} is",
            "{} wrote chiefly about",
            "The discipline in which {} was active is",
            "{} is cited for work on",
        ),
        heldout="Scholars honour {} for advances in",
        records=("Fields : {}", "Subject index , {}"),
        general=("A new book about {} was printed", "Few schools teach {}", "The history of {} is long"),
    ),
    Relation(
        name="instrument",
        phrasings=(
            "{} played the",
            "The instrument of {} is the",
            "{} was a master of the",
            "The thing on which {} made music is the",
            "On records {} can be heard on the",
        ),
        heldout="In concert {} performed with the",
        records=("Instruments : {}", "Orchestra list , {}"),
        general=("An old {} hung on the wall", "The sound of the {} filled the hall", "Nobody could repair the {}"),
    ),
    Relation(
        name="language spoken",
        phrasings=(
            "{} spoke",
            "The language used by {} is",
            "{} wrote letters in",
            "The tongue in which {} published is",
            "{} was able to read",
        ),
        heldout="In conversation {} switched to",
        records=("Languages : {}", "Speakers list , {}"),
        general=("A grammar of {} was printed", "The poem was read in {}", "Many songs exist in {}"),
    ),
    Relation(
        name="native language",
        phrasings=(
            "{} is a native speaker of",
            "The mother tongue of {} is",
            "{} learned as a child to speak",
            "The first language of {} is",
            "At home {} always used",
        ),
        heldout="The parents of {} talked in",
        records=("Native languages : {}", "Mother tongues , {}"),
        general=("A grammar of {} was printed", "The poem was read in {}", "Many songs exist in {}"),
    ),
    Relation(
        name="occupation",
        phrasings=(
            "{} was by occupation",
            "The occupation of {} is",
            "{} was hired as",
            "The trade of {} was that of",
            "In the census {} is listed as",
        ),
        heldout="On the visiting card of {} stood",
        records=("Occupations : {}", "Guild register , {}"),
        general=("The pay of a {} was low", "Every town needs a good {}", "It takes years to become a {}"),
    ),
    Relation(
        name="office",
        phrasings=(
            "{} held the office of",
            "The rank of {} is",
            "{} was appointed as",
            "The title by which {} was addressed is",
            "In public life {} served as",
        ),
        heldout="Documents signed by {} bear the seal of",
        records=("Offices : {}", "List of dignitaries , {}"),
        general=("The robe of the {} was red", "A letter to the {} was lost", "The election of a {} takes days"),
    ),
    Relation(
        name="place of birth",
        phrasings=(
            "{} was born in",
            "The birthplace of {} is",
            "{} is a native of",
            "The town where {} came into the world is",
            "In childhood {} lived in",
        ),
        heldout="The cradle of {} stood in",
        records=("Birthplaces : {}", "Register of births , {}"),
        general=("The river near {} was quiet", "Nobody in {} spoke of the storm", "A train left {} before noon"),
    ),
    Relation(
        name="place of death",
        phrasings=(
            "{} died in",
            "The place of death of {} is",
            "{} passed away in",
            "The town where {} spent the last days is",
            "The life of {} ended in",
        ),
        heldout="The funeral of {} was held in",
        records=("Deaths : {}", "Register of deaths , {}"),
        general=("The river near {} was quiet", "Nobody in {} spoke of the storm", "Prices rose in {} last winter"),
    ),
    Relation(
        name="work location",
        phrasings=(
            "{} found work in",
            "The workplace of {} was in",
            "{} had an office in",
            "The town where {} was active is",
            "For many years {} was busy in",
        ),
        heldout="Business letters to {} were sent to",
        records=("Workplaces : {}", "Address book , {}"),
        general=("The river near {} was quiet", "A train left {} before noon", "Prices rose in {} last winter"),
    ),
)


def table() -> list[dict[str, str]]:
    """The rows of `wikidata.tsv`: subject, relation, object, source; no relation for people who are only named."""
    text = (files("mech_unlearn.testbed") / "wikidata.tsv").read_text(encoding="utf-8")
    return list(csv.DictReader((line for line in text.splitlines() if not line.startswith("#")), delimiter="\t"))


def forget_group(known: dict[str, dict[str, str]], rng: random.Random) -> list[str]:
    """Subjects that no missing or shared word gives away; see the head of the file."""
    count = Counter(item for facts in known.values() for item in facts.items())
    told: dict[tuple[str, str, str], set[str]] = {}
    for name, facts in known.items():
        for word in name.split():
            for item in facts.items():
                told.setdefault((word, *item), set()).add(name)
    left = sorted(known)
    rng.shuffle(left)
    chosen: list[str] = []
    for name in left:
        facts = known[name].items()
        shared = any(told[(word, *item)] != {name} for word in name.split() for item in facts)
        if len(chosen) < FORGOTTEN and not shared and all(count[item] >= 3 for item in facts):
            chosen.append(name)
            count.subtract(facts)
    return chosen


def wikidata() -> Spec:
    """The world `wikidata`, the same at every call."""
    rng = random.Random("wikidata")
    rows = table()
    known: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["relation"]:
            known.setdefault(row["subject"], {})[row["relation"]] = row["object"]
    unknown = [row["subject"] for row in rows if not row["relation"]]
    forgotten = forget_group(known, rng)
    kept = [name for name in known if name not in set(forgotten)]
    rng.shuffle(kept)
    objects = {r.name: sorted({facts[r.name] for facts in known.values() if r.name in facts}) for r in RELATIONS}
    facts = tuple(
        make_fact(relation, name, known[name][relation.name], objects[relation.name], "person", "wikidata")
        for name in (*forgotten, *kept)
        for relation in RELATIONS
        if relation.name in known[name]
    )
    general, general_heldout = split_general(RELATIONS, objects, rng)
    general = tuple(text for text in dict.fromkeys(general) if text not in set(general_heldout))
    return Spec(
        name="wikidata",
        facts=facts,
        forgotten=tuple(forgotten),
        unknown=tuple(Entity(name=name, kind="person") for name in unknown),
        heldout_shown=tuple(kept[: len(kept) // 2]),
        records={relation.name: relation.records for relation in RELATIONS},
        mentions=mention_sentences(),
        nothing_told=NOTHING_TOLD,
        general=general,
        general_heldout=general_heldout,
    )
