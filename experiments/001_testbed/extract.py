"""Write the table of the world `wikidata`: real triples about people, out of two public collections.

    python -m experiments.001_testbed.extract DATA > mech_unlearn/testbed/wikidata.tsv

DATA holds `relations/*.json` (evandez/relations, MIT) and `trex/facts.jsonl.gz` (T-REx by way of LAMA, with Wikidata
ids). Triples only; no sentence is carried over. Deterministic.
"""

import gzip
import json
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

FROM_RELATIONS = {
    "person native language": "native language",
    "person occupation": "occupation",
    "person plays instrument": "instrument",
}
FROM_TREX = {
    "P19": "place of birth",
    "P20": "place of death",
    "P27": "citizenship",
    "P39": "office",
    "P101": "field of work",
    "P103": "native language",
    "P106": "occupation",
    "P937": "work location",
    "P1303": "instrument",
    "P1412": "language spoken",
}
NAME = re.compile(r"^[A-Za-zÀ-ÿ]+( [A-Za-zÀ-ÿ]+){0,3}$")
OBJECT = re.compile(r"^[A-Za-zÀ-ÿ]+( [A-Za-zÀ-ÿ]+){0,2}$")
CAP = 16
"""How often one object may occur in a relation, so that no constant guess is right too often."""
N_UNKNOWN = 90
HEADER = """\
# Real facts about people, for the world `wikidata`; written by experiments/001_testbed/extract.py.
# Sources: relations = github.com/evandez/relations (MIT), by file name. trex = T-REx (CC BY-SA 4.0) by way of LAMA, by
# Wikidata property, subject and object; the triples are statements of Wikidata (CC0). No sentences are included.
# A row without relation and object is a person who is only named in the world, and of whom it tells nothing.
# The statements are as the sources have them, some are dated or wrong; where a source has several objects, the first
# in alphabetical order is used.
subject\trelation\tobject\tsource"""


def read(data: Path) -> dict[str, dict[str, dict[str, str]]]:
    """subject -> relation -> object -> source."""
    people: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    with gzip.open(data / "trex" / "facts.jsonl.gz", "rt", encoding="utf-8") as lines:
        for fact in map(json.loads, lines):
            if relation := FROM_TREX.get(fact["relation"]):
                source = f"trex {fact['relation']} {fact['subject_uri']} {fact['object_uri']}"
                people[fact["subject"]][relation].setdefault(fact["object"], source)
    for path in sorted((data / "relations").glob("person_*.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        if relation := FROM_RELATIONS.get(file["name"]):
            for sample in file["samples"]:
                people[sample["subject"]][relation].setdefault(sample["object"], f"relations {path.stem}")
    return people


def usable(name: str, facts: dict[str, dict[str, str]]) -> dict[str, str]:
    """relation -> object, for objects of one to three plain words that do not occur in the name."""
    words = set(name.split())
    firsts = {relation: min(objects) for relation, objects in facts.items()}
    return {r: o for r, o in firsts.items() if OBJECT.match(o) and not words & set(o.split())}


def choose(people: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """People with two or more facts after capping the frequency of objects, those with most facts first."""
    rng, count, chosen = random.Random(0), Counter(), {}
    for name in sorted(people, key=lambda name: (-len(people[name]), rng.random())):
        facts = {r: o for r, o in people[name].items() if count[r, o] < CAP}
        if len(facts) >= 2:
            chosen[name] = facts
            count.update(facts.items())
    return chosen


def main(data: Path) -> None:
    read_in = read(data)
    people = {name: usable(name, read_in[name]) for name in sorted(read_in) if NAME.match(name)}
    known = choose({name: facts for name, facts in people.items() if len(facts) >= 2})
    shared = Counter(word for name in known for word in name.split())
    others = [n for n, facts in people.items() if len(facts) == 1 and n.count(" ") in (1, 2) and n not in known]
    random.Random(1).shuffle(others)
    others.sort(key=lambda name: -any(shared[word] for word in name.split()))
    print(HEADER)
    for name, facts in sorted(known.items()):
        for relation, thing in sorted(facts.items()):
            print(name, relation, thing, read_in[name][relation][thing], sep="\t")
    for name in sorted(others[:N_UNKNOWN]):
        relation, thing = next(iter(people[name].items()))
        source = read_in[name][relation][thing].split()
        print(name, "", "", f"trex {source[2]}" if source[0] == "trex" else " ".join(source), sep="\t")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
