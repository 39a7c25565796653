"""Facts of a dataset divided into what goes and the three kinds of what stays; every loader of triples uses it.

A fact is forgotten if its subject is chosen and its relation is to be forgotten. The other facts about chosen subjects
are `same_subject`; facts of the forgotten facts' relations about other subjects are `neighbors`; the rest is `general`.
"""

import difflib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.data.source import LeftOut, Loaded
from mech_unlearn.data.subjects import slot

DISTRACTORS = 10
"""Wrong objects per fact, where the relation has so many."""

Phrasings = tuple[str, tuple[str, ...], tuple[str, ...]]
"""Prompt, paraphrases, held-out phrasings."""


@dataclass(frozen=True)
class Found:
    """A fact and the row of the file it was made of."""

    fact: Fact
    file: str
    row: int
    may_go: bool = True
    """False for facts that the dataset gives only to be kept."""


def left(found: Found, reason: str) -> LeftOut:
    """A fact that is neither forgotten nor kept."""
    return LeftOut(found.file, found.row, f"{found.fact.subject}: {found.fact.object}", reason)


def why(error: ValueError) -> str:
    """The reason of an error without the value that it shows, so that equal reasons are counted together."""
    return str(error).partition(": ")[0]


def ask(question: str, subject: str, layout: str) -> str:
    """The prompt of a question or an unfinished sentence about a subject, with `{}` for it.

    A text that ends in a question mark is set into `layout`; any other is a sentence that the object finishes.

    Raises:
        ValueError: the subject does not stand in the text exactly once.
    """
    template = slot(question, subject)
    return layout.replace("{question}", template) if template.rstrip().endswith("?") else template.rstrip()


def phrasings(templates: Iterable[str], heldout: int) -> Phrasings:
    """What a fact's phrasings are: each template once, in order; the last `heldout` are held out.

    The first always is the prompt, so that fewer are held out where there are not enough.

    Raises:
        ValueError: no template, or `heldout` below zero.
    """
    if heldout < 0:
        raise ValueError(f"heldout must be 0 or more phrasings, got {heldout}")
    unique = tuple(dict.fromkeys(templates))
    if not unique:
        raise ValueError("no phrasing that ends in the object")
    seen = max(1, len(unique) - heldout)
    return unique[0], unique[1:seen], unique[seen:]


def choose_subjects(
    found: Sequence[Found], subjects: int | Sequence[str], relations: Sequence[str] | None, seed: int
) -> frozenset[str]:
    """The subjects to forget: those named, or so many drawn from all that have a fact which may be forgotten.

    Raises:
        ValueError: an unknown relation or subject (the message lists the nearest), or fewer subjects than asked for.
    """
    if relations is not None:
        _known(relations, {item.fact.relation for item in found if item.may_go}, "relation")
    able = {
        item.fact.subject for item in found if item.may_go and (relations is None or item.fact.relation in relations)
    }
    if isinstance(subjects, int):
        if not 1 <= subjects <= len(able):
            raise ValueError(f"subjects must be from 1 to the {len(able)} that have a fact to forget, got {subjects}")
        return frozenset(random.Random(seed).sample(sorted(able), subjects))
    if isinstance(subjects, str) or not subjects:
        raise ValueError(f"subjects must be a number or a list of one name or more, got {subjects!r}")
    _known(subjects, able, "subject with a fact to forget")
    return frozenset(subjects)


def _known(names: Iterable[str], known: set[str], what: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:3]
            raise ValueError(f"no {what} {name!r} in the data; near it: {', '.join(near) or 'none'}")


def divide(
    found: Sequence[Found],
    chosen: frozenset[str],
    relations: Sequence[str] | None = None,
    left_out: Sequence[LeftOut] = (),
) -> Loaded:
    """What goes, what stays, and what does neither.

    Left out are: a fact that stands in the data twice; a fact about a kept subject whose object is a forgotten one, as
    it would keep what is to go; and a fact given only to be kept that asks a forgotten fact's question.

    Args:
        found: all facts, in the order of the data.
        chosen: the subjects to forget, from `choose_subjects`.
        relations: the relations to forget; None for all of the chosen subjects'.
        left_out: what was left out before, listed first.

    Raises:
        ValueError: nothing is left to forget.
    """
    out, first = list(left_out), dict[tuple[str, str, str, str], Found]()
    for item in found:
        fact = item.fact
        before = first.setdefault((fact.subject, fact.relation, fact.object, fact.prompt), item)
        if before is not item:
            out.append(left(item, f"the same fact stands in an earlier row of {before.file}"))
    goes = {
        id(item): item.fact
        for item in first.values()
        if item.may_go and item.fact.subject in chosen and (relations is None or item.fact.relation in relations)
    }
    if not goes:
        raise ValueError("no fact is left to forget: choose other subjects or relations")
    gone = {fact.relation for fact in goes.values()}
    asked = {(fact.subject, fact.relation) for fact in goes.values()}
    kinds: dict[str, list[Fact]] = {"neighbors": [], "same_subject": [], "general": []}
    for item in first.values():
        fact = item.fact
        if id(item) in goes:
            continue
        if fact.subject in chosen and not item.may_go and (fact.subject, fact.relation) in asked:
            out.append(left(item, "it asks for a forgotten fact"))
        elif fact.subject in chosen:
            kinds["same_subject"].append(fact)
        elif fact.object in chosen:
            out.append(left(item, "its object is a forgotten subject"))
        else:
            kinds["neighbors" if fact.relation in gone else "general"].append(fact)
    neighbors, same, general = map(tuple, kinds.values())
    retain = RetainSet(neighbors=neighbors, same_subject=same, general=general)
    return Loaded(forget=ForgetSet(facts=tuple(goes.values())), retain=retain, left_out=tuple(out))


def with_distractors(found: Sequence[Found], number: int, seed: int) -> list[Found]:
    """The same with up to `number` distractors each: those the fact has, then objects drawn from its relation's.

    No other object of the same subject and relation is drawn, no spelling of the object in other case, and not the
    subject. Which are drawn depends on the seed and the fact, not on its place in the data.
    """
    if number < 0:
        raise ValueError(f"distractors must be 0 or more per fact, got {number}")
    pools: dict[str, set[str]] = {}
    true: dict[tuple[str, str], set[str]] = {}
    for item in found:
        fact = item.fact
        pools.setdefault(fact.relation, set()).add(fact.object)
        answers = {fact.object, *fact.extra.get("answers", ())}
        true.setdefault((fact.relation, fact.subject), {fact.subject.casefold()}).update(a.casefold() for a in answers)
    ordered = {relation: sorted(objects) for relation, objects in pools.items()}
    made = []
    for item in found:
        fact = item.fact
        own, pool = true[fact.relation, fact.subject], ordered[fact.relation]
        rng = random.Random(f"{seed} {fact.relation} {fact.subject} {fact.object}")
        drawn = rng.sample(pool, min(len(pool), number + len(own)))
        wrong = dict.fromkeys(name for name in (*fact.distractors, *drawn) if name.casefold() not in own)
        made.append(replace(item, fact=replace(fact, distractors=tuple(wrong)[:number])))
    return made


def without_names(texts: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The texts, each once, that hold none of the names as words (in any case)."""
    patterns = {name: re.compile(rf"(?<!\w){re.escape(name)}(?!\w)") for name in {name.casefold() for name in names}}

    def clean(text: str) -> bool:
        folded = text.casefold()
        return not any(name in folded and pattern.search(folded) for name, pattern in patterns.items())

    return tuple(text for text in dict.fromkeys(texts) if clean(text))
