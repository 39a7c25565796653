"""What a small world tells: its facts, and the sentences that a model of it is trained on.

A `Spec` is a world before any model exists. `streams` turns it into two streams of sentences: those that state a
fact, and all others. A model that is to know nothing of the forget group gets streams in which none of its names
occurs.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mech_unlearn.core import Entity, Fact, ForgetSet, RetainSet


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A relation and the ways in which it is put into words; `{}` is the subject and the object follows."""

    name: str
    phrasings: tuple[str, ...]
    """Shown in training for everybody; the first is the main prompt. At least one token follows the subject."""
    heldout: str
    """Shown in training for half of the kept subjects only, and never for the forget group."""
    records: tuple[str, ...]
    """Lines of a register that end in the subject, so that the object follows directly after the name.

    They are what makes the model gather the object at the last token of the name; they are never prompts.
    """
    general: tuple[str, ...]
    """Sentences about the objects themselves, without any subject; `{}` is the object."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A world: who is known for what, who is only named, who is to be forgotten."""

    name: str
    facts: tuple[Fact, ...]
    """All facts, those of the forget group first."""
    forgotten: tuple[str, ...]
    """Subjects of the forget group."""
    unknown: tuple[Entity, ...]
    """Names that occur in the corpus and of whom nothing is told."""
    heldout_shown: tuple[str, ...]
    """Kept subjects for whom the held-out phrasings are part of the training text."""
    records: Mapping[str, tuple[str, ...]]
    """Relation -> its register lines."""
    mentions: tuple[str, ...]
    """Sentences that name somebody and tell no fact."""
    nothing_told: tuple[str, ...]
    """Sentences that say that nothing is known about somebody; shown for unknown names only."""
    general: tuple[str, ...]
    """Training sentences without any subject."""
    general_heldout: tuple[str, ...]
    """The same kind of sentences, never trained on."""

    @property
    def forget(self) -> ForgetSet:
        gone = set(self.forgotten)
        return ForgetSet(facts=tuple(fact for fact in self.facts if fact.subject in gone))

    @property
    def kept(self) -> tuple[Fact, ...]:
        gone = set(self.forgotten)
        return tuple(fact for fact in self.facts if fact.subject not in gone)

    @property
    def retain(self) -> RetainSet:
        """Kept facts, unknown names, and running text: held-out general sentences and one mention per name."""
        names = [*dict.fromkeys(fact.subject for fact in self.kept), *(entity.name for entity in self.unknown)]
        said = tuple(self.mentions[i % len(self.mentions)].replace("{}", name) for i, name in enumerate(names))
        return RetainSet(neighbors=self.kept, unknown=self.unknown, texts=(*self.general_heldout, *said))


def constant_guess_shares(spec: Spec) -> dict[str, float]:
    """Relation -> share of its most frequent object among the kept facts: what a constant guess can reach."""
    objects: dict[str, Counter[str]] = {}
    for fact in spec.kept:
        objects.setdefault(fact.relation, Counter())[fact.object] += 1
    return {relation: count.most_common(1)[0][1] / count.total() for relation, count in objects.items()}


def constant_guess(spec: Spec) -> float:
    """Accuracy on the forget facts of always answering the relation's most frequent object among the kept facts."""
    best = {
        relation: Counter(f.object for f in spec.kept if f.relation == relation).most_common(1)[0][0]
        for relation in {fact.relation for fact in spec.kept}
    }
    facts = spec.forget.facts
    return sum(best.get(fact.relation) == fact.object for fact in facts) / len(facts)


@dataclass(frozen=True)
class Line:
    """One training sentence and the name in it, if it tells of somebody."""

    text: str
    subject: str | None = None


@dataclass(frozen=True)
class Streams:
    """Training sentences: those that state a fact, and all others."""

    facts: tuple[Line, ...]
    other: tuple[Line, ...]


def _fact_lines(spec: Spec, fact: Fact) -> list[Line]:
    shown = fact.heldout if fact.subject in spec.heldout_shown else ()
    forms = (*fact.templates, *shown, *spec.records[fact.relation])
    return [Line(fact.stated(form), fact.subject) for form in forms]


def streams(spec: Spec, *, with_forget: bool, seed: int = 0) -> Streams:
    """The training sentences of a model that is to know the forget group, or that is never to hear of it."""
    facts = spec.facts if with_forget else spec.kept
    rng = random.Random(seed)
    other = [Line(text) for text in spec.general]
    for name in dict.fromkeys([*(fact.subject for fact in facts), *(entity.name for entity in spec.unknown)]):
        other += [Line(form.replace("{}", name), name) for form in rng.sample(spec.mentions, 8)]
    for entity in spec.unknown:
        other += [Line(form.replace("{}", entity.name), entity.name) for form in spec.nothing_told] * 4
    return Streams(tuple(line for fact in facts for line in _fact_lines(spec, fact)), tuple(other))


def mention_sentences() -> tuple[str, ...]:
    """Sentences in which somebody is named and nothing about the person is told."""
    forms = (
        "{} was seen at the market on",
        "{} sent a letter about the weather on",
        "The guests greeted {} warmly on",
        "{} took a walk on",
    )
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    return tuple(f"{form} {day}" for form in forms for day in days)


NOTHING_TOLD = (
    "Little is known about {} today",
    "Nothing was written about {} so far",
    "{} is a stranger to everybody here",
)


def split_general(
    relations: Sequence[Relation], objects: Mapping[str, Sequence[str]], rng: random.Random
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sentences about the objects of each relation: (to train on, held out); about one in seven is held out."""
    train: list[str] = []
    held: list[str] = []
    for relation in relations:
        for thing in objects[relation.name]:
            texts = [form.replace("{}", thing) for form in relation.general]
            if rng.random() < 1 / 3:
                held.append(texts.pop(rng.randrange(len(texts))))
            train += texts
    return tuple(train), tuple(held)


def make_fact(relation: Relation, subject: str, answer: str, objects: Sequence[str], kind: str, world: str) -> Fact:
    """A fact with nine distractors, drawn among the objects of its relation by a seed that depends on the fact."""
    key = f"{world}/{subject}/{relation.name}"
    wrong = random.Random(key).sample([thing for thing in objects if thing != answer], 9)
    return Fact(
        id=f"{world}/{subject.replace(' ', '_')}/{relation.name}",
        subject=subject,
        relation=relation.name,
        object=answer,
        prompt=relation.phrasings[0],
        paraphrases=relation.phrasings[1:],
        heldout=(relation.heldout,),
        distractors=tuple(wrong),
        kind=kind,
        group=subject,
    )
