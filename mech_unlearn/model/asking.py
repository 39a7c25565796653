"""Facts asked in other forms: which phrasings a split may see, rewritten prompts, questions, gaps, multiple choice.

A rewriting takes a query and gives what to ask instead, or None where the fact cannot be asked so. Forms that add
English words around a fact are not for facts in scripts that are written without spaces (`Fact.joiner`).
"""

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from mech_unlearn.core import Fact
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import Ask, Query, encode, has_unknown, tokenize

Split = Literal["select", "tune", "test"]
Rewrite = Callable[[Query], Ask | None]
"""Another way to ask the same; None where the fact cannot be asked so."""


def split_templates(fact: Fact, split: Split) -> tuple[str, ...]:
    """The phrasings of one split: TEST reports, SELECT chooses features and teaches, TUNE sets strengths.

    Phrasing i goes to TEST, SELECT, TUNE in turn (the main prompt to TEST), so no phrasing is in two of them. With
    two phrasings SELECT and TUNE share the second, with one all three share it; see `shares_templates`.
    """
    templates = fact.templates
    if len(templates) < 3:
        return templates[:1] if split == "test" else templates[-1:]
    return templates[("test", "select", "tune").index(split) :: 3]


def shares_templates(fact: Fact) -> bool:
    """Whether the fact has too few phrasings to keep the three splits apart."""
    return len(fact.templates) < 3


def _behind(opening: str) -> Rewrite:
    def rewrite(query: Query) -> Ask:
        return Ask(query.fact, f"{opening} {query.template}")

    return rewrite


def words(name: str) -> str:
    """The relation's name as words."""
    return name.replace("_", " ").replace("-", " ")


def _is_test(query: Query) -> bool:
    """Whether a query is of the TEST split; forms of fixed wording have another wording for TUNE."""
    return query.template in split_templates(query.fact, "test")


def question(query: Query) -> Ask | None:
    """As a question and its answer."""
    if not query.fact.joiner:
        return None
    relation = words(query.fact.relation)
    if _is_test(query):
        return Ask(query.fact, f"Question: what is the {relation} of {{}}? Answer:")
    return Ask(query.fact, f"Tell me the {relation} of {{}}. It is")


def paraphrase(query: Query) -> Ask | None:
    """In the last other phrasing of the same split."""
    spare = [t for t in split_templates(query.fact, "test" if _is_test(query) else "tune") if t != query.template]
    return Ask(query.fact, spare[-1]) if spare else None


def cloze(query: Query) -> Ask | None:
    """As a gap to be filled, given before the sentence."""
    return Ask(query.fact, f"Fill in the blank: {query.template} ___. The blank is") if query.fact.joiner else None


def alias(query: Query) -> Ask | None:
    """The subject by its first other name."""
    return Ask(query.fact, query.template, query.fact.aliases[0]) if query.fact.aliases else None


def spelled(query: Query) -> Ask:
    """The subject letter by letter."""
    return Ask(query.fact, query.template, " ".join(query.fact.subject.replace(" ", "")))


def lower(query: Query) -> Ask:
    """The subject in small letters."""
    return Ask(query.fact, query.template, query.fact.subject.lower())


def _options(fact: Fact) -> list[str]:
    """The candidates in an order that does not tell which is right."""
    return sorted((fact.object, *fact.distractors))


def listed(query: Query) -> Ask:
    """With the candidates listed first."""
    return Ask(query.fact, f"{', '.join(_options(query.fact))}. {query.template}")


def lettered(query: Query) -> Ask | None:
    """Multiple choice by letter."""
    options = _options(query.fact)
    if len(options) > len(string.ascii_uppercase) or not query.fact.joiner:
        return None
    letters = string.ascii_uppercase[: len(options)]
    right = letters[options.index(query.fact.object)]
    told = ", ".join(f"{letter}: {option}" for letter, option in zip(letters, options, strict=True))
    fact = replace(query.fact, object=right, distractors=tuple(x for x in letters if x != right))
    return Ask(fact, f"{told}. {query.template}, letter")


def turned(facts: Sequence[Fact]) -> Rewrite:
    """Asks for the subject, given the object; the candidates are other subjects of the relation among these facts."""

    def rewrite(query: Query) -> Ask | None:
        fact = query.fact
        others = sorted(
            {f.subject for f in facts if f.relation == fact.relation and f.object != fact.object} - {fact.subject}
        )[:9]
        if len(others) < 2 or not fact.joiner:
            return None
        asked = replace(fact, subject=fact.object, object=fact.subject, distractors=tuple(others), aliases=())
        relation = words(fact.relation)
        return Ask(asked, f"{{}} is the {relation} of" if _is_test(query) else f"as {relation} , {{}} belongs to")

    return rewrite


MARKS = ".,:;?!_"
"""Punctuation that is left out of a rewritten prompt where the tokenizer has no token for it."""


def without_marks(text: str, marks: str) -> str:
    """The text without these marks and the spaces that they leave double or at its ends; without any, as it is."""
    if not any(mark in text for mark in marks):
        return text
    return re.sub(" +", " ", text.translate(str.maketrans("", "", marks))).strip(" ")


def unwritable_marks(tokenizer: Any) -> str:
    """The marks that the tokenizer only knows as its unknown token."""
    return "".join(mark for mark in MARKS if has_unknown(tokenizer, encode(tokenizer, mark)))


def rewritten(model: Model, queries: Sequence[Query], rewrite: Rewrite) -> tuple[Query, ...]:
    """The queries under a rewriting, in the same order.

    Raises:
        ValueError: a text that the tokenizer has no tokens for, or longer than the model's positions.
    """
    marks = unwritable_marks(model.tokenizer)
    asks = [
        ask and replace(ask, template=without_marks(ask.template, marks))
        for ask in (rewrite(query) for query in queries)
    ]
    made = iter(tokenize(model.tokenizer, [ask for ask in asks if ask is not None]))
    out = tuple(query if ask is None else next(made) for query, ask in zip(queries, asks, strict=True))
    limit = model.n_ctx
    if limit is not None and (longest := max(len(q.prompt) + max(map(len, q.answers)) for q in out)) > limit:
        raise ValueError(f"a rewritten prompt of {longest} tokens; {model.name!r} has {limit} positions")
    return out
