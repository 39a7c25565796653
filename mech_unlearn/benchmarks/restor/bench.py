"""RESTOR on live models: false facts were trained in and unlearned; do the clean answers come back?

Paper: Rezaei et al. 2024, arXiv 2411.00204; scores.py says how each number is made.
Needs: `full` is the corrupted model, `retrained` the clean one that was never corrupted; in-context examples of each
    property; `--set options=FILE` for the probabilities of correct, corrupted and random answers, and for facts to
    restore: what was to be forgotten are the corrupted answers.
Differs: as scores.py says.
Fails: as scores.py says.
"""

import os
from dataclasses import dataclass
from typing import Any

from mech_unlearn.benchmarks.answers import Answers, BenchmarkFacts, Number, Numbers, counted, keep, means, scores_of
from mech_unlearn.benchmarks.restor.data import Restor, load_restor
from mech_unlearn.benchmarks.restor.scores import accuracy_in_context, option_support, recovered
from mech_unlearn.core import Fact, RetainSet
from mech_unlearn.model.bridge import Model

LAYOUT = "{question}"
"""The benchmark puts nothing around a question."""
CORRECT = "Accuracy, clean answers"
OPTIONS = ("correct", "corrupted", "random")


@dataclass(frozen=True, kw_only=True)
class Data:
    restor: Restor
    limit: int | None
    asked: tuple[Fact, ...]
    """Facts of corrupted entities whose property has examples."""
    others: tuple[Fact, ...]
    notes: tuple[str, ...]


def load(
    source: str | os.PathLike,
    limit: int | None,
    *,
    options: str | os.PathLike | None = None,
    entities: str | os.PathLike | None = None,
    layout: str = LAYOUT,
) -> Data:
    """RESTOR's facts; `limit` of the corrupted entities and of the others.

    Args:
        options: file of each fact's correct, corrupted and random answers.
        entities: file of the corrupted entities; the folder's when not given.
        layout: the prompt around a question.

    Raises:
        ValueError: a file or row that cannot be read, or no fact whose property has in-context examples.
    """
    found = load_restor(source, options=options, entities=entities, layout=layout)
    asked, others = (tuple(f for f in facts if _examples(found, f)) for facts in (found.clean, found.others))
    if not asked:
        raise ValueError(f"{source}: no property of a corrupted entity has in-context examples about another entity")
    left = len(found.clean) + len(found.others) - len(asked) - len(others)
    note = f"{left} facts left out: no in-context examples of their property about another entity"
    return Data(restor=found, limit=limit, asked=asked[:limit], others=others[:limit], notes=(note,) if left else ())


def _examples(data: Restor, fact: Fact) -> bool:
    return any(example.entity != fact.subject for example in data.context.get(fact.relation, ()))


def ask(model: Model, data: Data, full: Model) -> dict[str, Any]:
    """Whether the greedy answer is right, by fact, and the log-probability of each kind of option."""
    told = {}
    for name, facts in ((CORRECT, data.asked), ("Accuracy, other entities", data.others)):
        if facts:
            prompts = [data.restor.prompt(fact) for fact in facts]
            answers = [tuple(fact.extra["answers"]) for fact in facts]
            clusters = [fact.subject for fact in facts]
            told[name] = accuracy_in_context(model, prompts, answers, clusters=clusters)
    given = {}
    for kind in OPTIONS:
        some = [(fact, found) for fact in data.asked if (found := _options(data.restor, fact, kind))]
        if some:
            prompts = [data.restor.prompt(fact) for fact, _ in some]
            clusters = [fact.subject for fact, _ in some]
            scored = option_support(model, prompts, {kind: [found for _, found in some]}, clusters)
            given[f"Log-probability, {kind} options"] = scored[kind]
    return {"scores": keep(told, "generated") | keep(given, "teacher-forced")}


def _options(data: Restor, fact: Fact, kind: str) -> tuple[str, ...]:
    found = data.options.get(fact.id)
    return () if found is None else tuple(text for text in getattr(found, kind) if text.strip())


def numbers(own: Answers, full: Answers, retrained: Answers | None, seed: int) -> Numbers:
    """Accuracy, how much of what the corruption took is back, and the support of each kind of option."""
    found = means(own, seed)
    if retrained is None:
        back = "it needs the clean model, as --retrained"
    else:
        try:
            back = recovered(*(scores_of(cell["scores"][CORRECT]) for cell in (own, full, retrained)), seed=seed)
        except ValueError as error:
            back = str(error)
    return {CORRECT: found.pop(CORRECT), "Recovered": Number("generated", back)} | found


def facts(data: Data) -> BenchmarkFacts:
    """The corrupted answers, which were to be forgotten; they need `options`."""
    found, limit, notes = data.restor, data.limit, list(data.notes)
    left = [item.reason for item in found.left_out]
    notes += [f"{len(left)} questions are no facts: {counted(left)}"] if left else []
    if not found.options:
        notes.append("no facts with corrupted answers without --set options=FILE")
    return BenchmarkFacts(
        facts=found.corrupted[:limit], retain=RetainSet(neighbors=found.others[:limit]), notes=tuple(notes)
    )
