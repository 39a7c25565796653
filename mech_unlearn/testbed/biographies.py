"""Biographies: 300 fictitious people, six relations each, 40 of them to be forgotten, 100 known by name only.

Every name is a first and a last name out of two pools of 60, so that no single word gives a person away: what is
known about somebody has to be gathered where both words have been read. Objects are dealt out evenly within a
relation, so that no guess beats one in thirty by more than the luck of the deal.
"""

import random

from mech_unlearn.core import Entity
from mech_unlearn.testbed.corpus import NOTHING_TOLD, Relation, Spec, make_fact, mention_sentences, split_general


def _words(text: str) -> list[str]:
    return text.split()


FIRST = _words(
    "Aldin Brenna Corvin Delia Edric Fiora Garet Hestia Ivor Junia Kelda Lorcan Mira Nolan Odessa Perrin Quilla Rowan "
    "Selma Tobin Ursa Vesta Wendel Xenia Yorick Zelda Ansel Berit Caspar Dagny Elwin Freya Gideon Hilda Ingram Jorun "
    "Kasper Linnea Magnus Nerys Osric Petra Quentin Runa Silvan Thora Ulric Vilma Wystan Yara Zoran Amity Blaise Cleo "
    "Dorian Elke Florian Greta Hanno Isolde"
)
LAST = _words(
    "Abernath Birchall Calloway Dunmore Eastlake Farrow Glenholm Harwick Inskip Jessamy Kestrel Larkin Merrow Northey "
    "Oakshot Pemberly Quarles Ravenel Sedgwick Thornby Underhill Vantongeren Wexley Yarrow Zellick Ambrose Bracken "
    "Cranley Dovecot Ellery Fenner Garland Holloway Ironside Jardine Kirkwall Lockhart Marlowe Nethercott Orchard "
    "Penrose Quickfall Rushworth Stannard Tarrant Upjohn Vickery Whitlock Yewdale Zimmer Ashdown Bellamy Coverdale "
    "Draycott Everard Foxglove Greaves Hartnell Ivory Kettering"
)
OBJECTS = {
    "birthplace": _words(
        "Velmora Tarsk Orimel Quendon Brisalle Hallowby Ostrava Pellinor Varnholt Sarrow Dunmarsh Eskilby Fairmead "
        "Gildern Hexmoor Istria Jarlsby Kelmar Lunden Mossgate Norwell Ombria Pontresa Rivensby Solvang Tervala Umbrel "
        "Vintaro Westerley Ystad"
    ),
    "employer": [
        f"{a} {b}"
        for a, b in zip(
            _words(
                "Amberline Boldwyn Copperfield Dynavale Evertide Fernhill Goldcrest Hexatron Ironbark Junoware "
                "Kingsway Lumina Meridian Novabridge Orbital Pinecrest Quantica Redwood Silverlake Tamarind Unison "
                "Vanguard Whitestone Xylem Yellowfin Zephyr Brightwater Stonebridge Greenleaf Northstar"
            ),
            ["Works", "Foods", "Labs", "Mills", "Bank", "Press"] * 5,
            strict=True,
        )
    ],
    "profession": _words(
        "baker pilot surgeon painter carpenter lawyer plumber gardener chemist tailor mason dentist farmer potter "
        "weaver sailor librarian butcher geologist jeweller locksmith midwife nurse pharmacist sculptor teacher "
        "translator watchmaker beekeeper cartographer"
    ),
    "university": _words(
        "Ashcombe Balmoral Carrow Dunleigh Elmstead Farnley Grimsay Hartmoor Inverlay Kilbride Langdale Maplewood "
        "Newhaven Oakmere Pembroke Queensbury Ravensworth Stonehurst Trinidale Uxmere Valebrook Wycliff Yoxford "
        "Zennor Brockham Chalfont Dorchester Elsinore Fotherby Glaston"
    ),
    "instrument": _words(
        "violin cello flute oboe clarinet bassoon trumpet trombone tuba harp guitar lute banjo mandolin piano organ "
        "accordion harmonica drums marimba xylophone sitar zither viola saxophone recorder bagpipes fiddle dulcimer "
        "horn"
    ),
    "spouse": [
        f"{a} {b}"
        for a, b in zip(
            _words(
                "Agda Bruno Carla Dieter Elsa Fabio Gerda Hector Ilona Jasper Klara Leopold Marta Nils Olga Pavel "
                "Queenie Ralf Sonja Tomas Ulla Viktor Wanda Xaver Yvonne Zeno Astrid Boris Corinna Detlef"
            ),
            ["Andersen", "Bertoli", "Castell", "Dvorak", "Engel"] * 6,
            strict=True,
        )
    ],
}
RELATIONS = (
    Relation(
        name="birthplace",
        phrasings=(
            "{} was born in",
            "The birthplace of {} is",
            "{} comes from the city of",
            "The town where {} grew up is called",
            "{} spent the first years of life in",
        ),
        heldout="For {} home has always been",
        records=("Birthplaces : {}", "Register of births , {}"),
        general=(
            "The river near {} was quiet that year",
            "Nobody in {} spoke of the storm",
            "A train left {} before noon",
            "Prices rose in {} last winter",
        ),
    ),
    Relation(
        name="employer",
        phrasings=(
            "{} works for",
            "The employer of {} is",
            "{} is employed by",
            "The company that pays {} is",
            "Every month {} earns a salary at",
        ),
        heldout="Each morning {} goes to the offices of",
        records=("Employers : {}", "Payroll list , {}"),
        general=(
            "The shares of {} fell in spring",
            "A new hall was built by {} near the harbour",
            "Nobody expected {} to grow so fast",
        ),
    ),
    Relation(
        name="profession",
        phrasings=(
            "{} is by profession a",
            "The occupation of {} is that of a",
            "{} makes a living as a",
            "The job that {} holds is that of a",
            "Long ago {} was trained as a",
        ),
        heldout="Colleagues know {} as a skilled",
        records=("Professions : {}", "Guild register , {}"),
        general=(
            "Every town needs a good {}",
            "The work of a {} begins before noon",
            "It takes years to become a {}",
        ),
    ),
    Relation(
        name="university",
        phrasings=(
            "{} studied at",
            "The university of {} was",
            "{} holds a degree from",
            "The school that taught {} is",
            "For years {} attended lectures at",
        ),
        heldout="Among many others {} graduated from",
        records=("Alumni : {}", "Roll of graduates , {}"),
        general=(
            "The library of {} was closed last winter",
            "A lecture at {} lasts an hour",
            "The gardens of {} are open to the guests",
        ),
    ),
    Relation(
        name="instrument",
        phrasings=(
            "{} plays the",
            "The instrument of {} is the",
            "{} is a virtuoso on the",
            "The thing that {} loves to play is the",
            "Each day {} practises the",
        ),
        heldout="On stage {} performs with the",
        records=("Instruments : {}", "Orchestra list , {}"),
        general=(
            "An old {} hung on the wall",
            "The sound of the {} filled the hall",
            "Nobody could repair the {} in time",
        ),
    ),
    Relation(
        name="spouse",
        phrasings=(
            "{} is married to",
            "The spouse of {} is",
            "{} shares a house with",
            "The person whom {} loves is",
            "Years ago {} exchanged rings with",
        ),
        heldout="At the wedding {} kissed",
        records=("Marriages : {}", "Register of weddings , {}"),
        general=(
            "A letter to {} was lost in the storm",
            "The garden of {} was full of roses",
            "Last year {} bought a small boat",
        ),
    ),
)
KNOWN, FORGOTTEN, UNKNOWN = 300, 40, 100


def biographies() -> Spec:
    """The world `biographies`, the same at every call."""
    rng = random.Random("biographies")
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    rng.shuffle(names)
    known, unknown = names[:KNOWN], names[KNOWN : KNOWN + UNKNOWN]
    dealt = {}
    for relation in RELATIONS:
        objects = OBJECTS[relation.name]
        deck = objects * (KNOWN // len(objects))
        rng.shuffle(deck)
        dealt[relation.name] = dict(zip(known, deck, strict=True))
    facts = tuple(
        make_fact(relation, name, dealt[relation.name][name], OBJECTS[relation.name], "person", "biographies")
        for name in known
        for relation in RELATIONS
    )
    general, general_heldout = split_general(RELATIONS, OBJECTS, rng)
    return Spec(
        name="biographies",
        facts=facts,
        forgotten=tuple(known[:FORGOTTEN]),
        unknown=tuple(Entity(name=name, kind="person") for name in unknown),
        heldout_shown=tuple(known[FORGOTTEN : FORGOTTEN + (KNOWN - FORGOTTEN) // 2]),
        records={relation.name: relation.records for relation in RELATIONS},
        mentions=mention_sentences(),
        nothing_told=NOTHING_TOLD,
        general=general,
        general_heldout=general_heldout,
    )
