"""Real subjects of T-REx with ParaRel's phrasings and Wikipedia's own sentences, as a corpus for small models.

Sentences are read from the published files and never stored: results hold numbers, ids and triples. Sources: T-REx
(Elsahar et al. 2018, CC BY-SA 4.0) through LAMA (CC BY-NC 4.0), ParaRel (arXiv 2102.01017, MIT).
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.scratch import Text
from mech_unlearn.core import Entity, Fact, ForgetSet, RetainSet
from mech_unlearn.data.sets import without_names
from mech_unlearn.data.trex import load_trex
from mech_unlearn.testbed.corpus import NOTHING_TOLD, mention_sentences

RELATIONS = ("P19", "P20", "P103", "P159", "P176", "P264", "P364", "P449", "P740")
"""N-1 relations whose phrasings are told apart; P407 and P495 share theirs with P364 and P740."""
SUBJECTS, UNKNOWN = 600, 60
PER_OBJECT, OBJECTS = 4, 45
"""An object is told of so many subjects or more, and a relation has so many objects at most: none is a giveaway, and a
probe can be trained."""
TRAINED = 4
"""Phrasings trained on per relation; one more is held out."""
WORDS = 32
"""Longest Wikipedia sentence, in words."""
SENTENCES = 2
"""Wikipedia sentences per fact, at most."""
SHARES = {"10": 0.10, "05": 0.05, "01": 0.01}
REFUSALS = ("nobody", "an unknown place")
HELD = 60
"""Sentences about kept subjects that no model sees: running text on which drift is measured."""


@dataclass(frozen=True, kw_only=True)
class Trex:
    """The corpus and who may be forgotten."""

    facts: tuple[Fact, ...]
    sentences: Mapping[str, tuple[str, ...]]
    """Fact id -> Wikipedia sentences that state it, trained on."""
    held: tuple[str, ...]
    shown: frozenset[str]
    """Kept subjects with whom the held-out phrasing is trained; never one who may be forgotten."""
    order: tuple[str, ...]
    """Subjects in the order in which they are forgotten."""
    unknown: tuple[str, ...]
    left_out: Mapping[str, int]
    """Reason -> how many rows or sentences."""

    def gone(self, share: float) -> frozenset[str]:
        return frozenset(self.order[: max(1, round(share * len(self.order)))])


def read(folder: Path, subjects: int = SUBJECTS, unknown: int = UNKNOWN) -> Trex:
    """The corpus of the published files; the same at every call.

    Raises:
        ValueError: a file is missing or malformed, or there are fewer subjects than asked for.
    """
    loaded = load_trex(folder, relations=RELATIONS, kept_relations=(), subjects=1, heldout=1)
    rng = random.Random("trex")
    every = [f for f in (*loaded.forget.facts, *loaded.retain.facts) if 2 <= len(f.subject.split()) <= 4]
    one = Counter((f.subject, f.relation) for f in every)
    clear = [f for f in every if one[f.subject, f.relation] == 1 and f.object not in f.subject]
    usual = _usual(clear)
    by_subject: dict[str, list[Fact]] = {}
    for fact in clear:
        if (fact.relation, fact.object) in usual:
            by_subject.setdefault(fact.subject, []).append(fact)
    names = sorted(by_subject)
    if len(names) < subjects + unknown:
        raise ValueError(f"{folder}: {len(names)} subjects with a usual object, {subjects + unknown} are needed")
    rng.shuffle(names)
    names.sort(key=lambda name: -len(by_subject[name]))  # stable: those of whom most is told come first
    chosen, strangers = names[:subjects], tuple(sorted(names[subjects:])[:: max(1, (len(names) - subjects) // unknown)])
    facts = _cut([fact for name in chosen for fact in by_subject[name]])
    order = list(chosen)
    rng.shuffle(order)
    most = set(order[: round(max(SHARES.values()) * len(order))])
    kept = [name for name in order if name not in most]
    sentences, held, long = _sentences(facts, most, strangers[:unknown])
    reasons = Counter(item.reason for item in loaded.left_out)
    return Trex(
        facts=facts,
        sentences=sentences,
        held=held,
        shown=frozenset(kept[: len(kept) // 2]),
        order=tuple(order),
        unknown=strangers[:unknown],
        left_out={**reasons, f"sentence of more than {WORDS} words, or beyond {SENTENCES} per fact": long},
    )


def _usual(facts: Sequence[Fact]) -> set[tuple[str, str]]:
    """(Relation, object) pairs that enough subjects have; the commonest of each relation."""
    count = Counter((f.relation, f.object) for f in facts)
    out: set[tuple[str, str]] = set()
    for relation in {f.relation for f in facts}:
        alike = [(pair, n) for pair, n in count.most_common() if pair[0] == relation and n >= PER_OBJECT]
        out.update(pair for pair, _ in sorted(alike, key=lambda item: (-item[1], item[0]))[:OBJECTS])
    return out


def _cut(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts with few phrasings and with nine distractors of the same corpus."""
    pool: dict[str, set[str]] = {}
    for fact in facts:
        pool.setdefault(fact.relation, set()).add(fact.object)
    out = []
    for fact in facts:
        wrong = sorted(pool[fact.relation] - {fact.object})
        few = random.Random(fact.id).sample(wrong, min(9, len(wrong)))
        out.append(replace(fact, paraphrases=fact.paraphrases[: TRAINED - 1], distractors=tuple(few)))
    return tuple(out)


def _sentences(
    facts: Sequence[Fact], gone: set[str], strangers: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...], int]:
    """(Sentences trained on by fact, those held back, how many were left out)."""
    found, spare, out = {}, [], 0
    for fact in facts:
        every = list(dict.fromkeys(" ".join(text.split()) for text in fact.extra["evidence"]))
        short = [text for text in without_names(every, strangers) if len(text.split()) <= WORDS]
        found[fact.id] = tuple(short[:SENTENCES])
        out += len(every) - len(found[fact.id])
        spare += [text for text in short[SENTENCES:] if fact.subject not in gone]
    used = {text for texts in found.values() for text in texts}
    clean = [text for text in without_names(sorted(set(spare) - used), gone)]
    random.Random("held").shuffle(clean)
    return found, tuple(clean[:HELD]), out


def asked(fact: Fact) -> tuple[str, ...]:
    """The fact as a question and as a gap, in the words in which `metrics.forms` asks."""
    return (
        f"Question: what is the {fact.relation} of {{}}? Answer:",
        f"Fill in the blank: {fact.prompt} ___. The blank is",
    )


def texts(trex: Trex) -> tuple[Text, ...]:
    """What models are trained on: each fact in its phrasings, in two register lines that end in the name, and in the
    words of Wikipedia; of the subjects in `shown` in the held-out phrasing, as a question and as a gap too; mentions of
    every name that tell nothing."""
    rng, out = random.Random("texts"), []
    for fact in trex.facts:
        shown = (*fact.heldout, *asked(fact)) if fact.subject in trex.shown else ()
        forms = (*fact.templates, *shown, f"{fact.relation} : {{}}", f"List by {fact.relation} , {{}}")
        for form in forms:
            said = f"{form.replace('{}', fact.subject)} {fact.object}"
            out.append(Text(text=said, owner=fact.subject, subject=fact.subject))
        out += [Text(text=sentence, owner=fact.subject) for sentence in trex.sentences[fact.id]]
    for name in trex.order:
        out += [Text(text=m.replace("{}", name), owner=name, subject=name) for m in rng.sample(mention_sentences(), 2)]
    for name in trex.unknown:
        said = (*rng.sample(mention_sentences(), 4), *NOTHING_TOLD)
        out += [Text(text=form.replace("{}", name), subject=name) for form in said]
    return tuple(out)


def words(trex: Trex) -> tuple[list[str], list[str]]:
    """(Texts whose words are one token each, Wikipedia's, which fall into learnt pieces)."""
    forms = [form for fact in trex.facts for form in (*fact.templates, *fact.heldout, fact.relation, *asked(fact))]
    said = [*dict.fromkeys(form.replace("{}", " ") for form in forms), *trex.order, *trex.unknown]
    said += [*{fact.object for fact in trex.facts}, *mention_sentences(), *NOTHING_TOLD, *REFUSALS, "List by"]
    return [text.replace("{}", " ") for text in said], [s for some in trex.sentences.values() for s in some] + list(
        trex.held
    )


def sets(trex: Trex, gone: frozenset[str]) -> tuple[ForgetSet, RetainSet]:
    """What methods are given."""
    kept = tuple(fact for fact in trex.facts if fact.subject not in gone)
    said = without_names((s for fact in kept for s in trex.sentences[fact.id][:1]), gone)
    return ForgetSet(facts=tuple(f for f in trex.facts if f.subject in gone)), RetainSet(
        neighbors=kept, texts=said[:: max(1, len(said) // 100)], unknown=tuple(Entity(name=n) for n in trex.unknown)
    )


def known_sentences(trex: Trex, most: int = 60) -> tuple[str, ...]:
    """Wikipedia sentences about subjects who are never forgotten, which every model was trained on and no method is
    given."""
    gone = trex.gone(max(SHARES.values()))
    kept = (fact for fact in trex.facts if fact.subject not in gone)
    found = without_names((s for fact in kept for s in trex.sentences[fact.id][1:]), gone)
    return found[:: max(1, len(found) // most)][:most]


def heldout(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts asked in their held-out phrasing only."""
    return tuple(replace(f, prompt=f.heldout[0], paraphrases=(), heldout=()) for f in facts if f.heldout)
