"""What is odd about facts before any model is asked: overlaps, misspelt fields, names within names, distractors."""

import difflib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mech_unlearn.core import _FIELDS, Fact, _said

Oddity = Literal["kept and forgotten", "id twice", "misspelt field", "name in a name", "two answers", "distractors"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something about facts that numbers about them would suffer from."""

    oddity: Oddity
    facts: tuple[str, ...]
    """Ids of the facts that it is about."""
    told: str


def findings(facts: Sequence[Fact], retain: Sequence[Fact] = ()) -> tuple[Finding, ...]:
    """What is odd about facts, and about them beside those that are to be kept."""
    both = (*facts, *retain)
    return (
        *_kept_too(facts, retain),
        *_ids_twice(facts, retain),
        *_misspelt(both),
        *_names_in_names(facts, both),
        *_two_answers(both),
        *_distractors(both),
    )


def misspelt(fact: Fact) -> dict[str, str]:
    """Extra keys of a fact that look like one of its fields -> that field."""
    found = {}
    for key in fact.extra:
        near = difflib.get_close_matches(key.lower(), _FIELDS, n=1, cutoff=0.8)
        if near and not key.startswith(f"{near[0]}_"):
            found[key] = near[0]
    return found


def _kept_too(facts: Sequence[Fact], retain: Sequence[Fact]) -> Iterator[Finding]:
    said: dict[tuple[str, ...], str] = {}
    for fact in retain:
        said |= dict.fromkeys(_said(fact), fact.id)
    for fact in facts:
        if kept := next((said[one] for one in _said(fact) if one in said), None):
            told = "the same is to be forgotten and kept"
            yield Finding(oddity="kept and forgotten", facts=tuple(dict.fromkeys((fact.id, kept))), told=told)


def _ids_twice(facts: Sequence[Fact], retain: Sequence[Fact]) -> Iterator[Finding]:
    for name in sorted({fact.id for fact in facts} & {fact.id for fact in retain}):
        yield Finding(oddity="id twice", facts=(name,), told="the id stands in both files")


def _misspelt(facts: Sequence[Fact]) -> Iterator[Finding]:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for fact in facts:
        for key, field in misspelt(fact).items():
            found[key, field].append(fact.id)
    for (key, field), ids in found.items():
        told = f"field {key!r} is read by nothing; {field!r} is"
        yield Finding(oddity="misspelt field", facts=tuple(ids), told=told)


def _names(fact: Fact) -> tuple[str, ...]:
    return (fact.subject, *fact.aliases)


def _names_in_names(facts: Sequence[Fact], both: Sequence[Fact]) -> Iterator[Finding]:
    """Names that another subject's name begins with, or holds as whole words: what is done to one meets the other."""
    mine: dict[str, set[str]] = defaultdict(set)
    ids: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        ids[fact.subject].append(fact.id)
        for name in _names(fact):
            mine[name].add(fact.subject)
    told: dict[tuple[str, str, str], None] = {}
    for other, subject in {name: fact.subject for fact in both for name in _names(fact)}.items():
        for part in {*_beginnings(other), *_runs(other)} & mine.keys():
            told |= dict.fromkeys((owner, part, other) for owner in mine[part] if owner != subject)
    for owner, part, other in told:
        what = f"{part!r} is a name of both" if part == other else f"{part!r} stands in the name {other!r}"
        yield Finding(
            oddity="name in a name", facts=tuple(ids[owner]), told=f"{what}: what is done to one meets the other"
        )


def _beginnings(name: str) -> Iterator[str]:
    return (name[:end] for end in range(1, len(name) + 1))


def _runs(name: str) -> Iterator[str]:
    """Runs of whole words of a name."""
    words = name.split(" ")
    return (" ".join(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1))


def _two_answers(facts: Sequence[Fact]) -> Iterator[Finding]:
    answers: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for fact in facts:
        answers[fact.prompt.replace("{}", fact.subject)][fact.object].append(fact.id)
    for prompt, given in answers.items():
        if len(given) > 1:
            told = f"{prompt!r} has {len(given)} right answers: {', '.join(map(repr, given))}"
            yield Finding(oddity="two answers", facts=tuple(i for ids in given.values() for i in ids), told=told)


def _distractors(facts: Sequence[Fact]) -> Iterator[Finding]:
    """Too few wrong answers, or wrong answers that are never right for the relation but are for another one."""
    right: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        right[fact.object].add(fact.relation)
    few = tuple(fact.id for fact in facts if len(fact.distractors) < 2)
    if few:
        told = "fewer than two distractors: no margin, and no sham facts where no retrained model is given"
        yield Finding(oddity="distractors", facts=few, told=told)
    subjects = {fact.subject: fact.relation for fact in facts}
    for fact in facts:
        for wrong in fact.distractors:
            elsewhere = right.get(wrong, set()) | ({f"subject of {subjects[wrong]}"} if wrong in subjects else set())
            if elsewhere and fact.relation not in elsewhere:
                told = f"distractor {wrong!r} is of another type: known as {', '.join(sorted(elsewhere))}"
                yield Finding(oddity="distractors", facts=(fact.id,), told=told)
