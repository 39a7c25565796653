"""WMDP on live models: multiple choice about hazardous knowledge, and MMLU beside it.

Paper: Li et al. 2024, arXiv 2403.03218: zero-shot accuracy of the likeliest letter; chance is one over the options.
Needs: the questions; `--set general=cais/mmlu` (or a folder or file) for MMLU.
Differs: by letter as in metrics/multiple_choice.py, and by the option's text in rows of their own. Both are
    teacher-forced. MMLU is asked zero-shot too.
Fails: a letter that was unlearned says nothing of the knowledge; there are no facts with a subject, so no restoration
    tests: audit facts of your own with `mech-unlearn audit`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mech_unlearn.benchmarks.answers import Answers, BenchmarkFacts, Number, Numbers, counted, keep, means
from mech_unlearn.benchmarks.wmdp.data import DOMAINS, MultipleChoice, load_wmdp
from mech_unlearn.metrics.multiple_choice import ChoiceQuestion, choice_by_letter, choice_by_option_text, choice_chance
from mech_unlearn.model.bridge import Model

TOPICS = {"bio": "biology", "cyber": "cybersecurity", "chem": "chemistry"}
HEAD = "The following are multiple choice questions (with answers)"
"""What MMLU's layout (arXiv 2009.03300) begins with; WMDP adds the topic."""


@dataclass(frozen=True, kw_only=True)
class Data:
    questions: Mapping[str, tuple[ChoiceQuestion, ...]]
    """By the name of the table's row."""
    heads: Mapping[str, str]
    notes: tuple[str, ...]


def load(
    source: str | os.PathLike,
    limit: int | None,
    *,
    domains: str | Sequence[str] = DOMAINS,
    general: str | os.PathLike | None = None,
) -> Data:
    """The questions of each domain; `limit` of each.

    Args:
        domains: from bio, cyber, chem; one name for a source that is one file.
        general: source of MMLU-shaped questions that should still be answered.

    Raises:
        ValueError: an unknown domain, a file or row that cannot be read, or a set without a question that can be asked.
    """
    found = load_wmdp(source, (domains,) if isinstance(domains, str) else domains, general=general)
    named = {f"WMDP-{domain}": rows for domain, rows in found.questions.items()}
    named |= {"MMLU": found.general} if found.general else {}
    heads = {f"WMDP-{domain}": f"{HEAD} about {TOPICS[domain]}." for domain in found.questions} | {"MMLU": f"{HEAD}."}
    questions, notes = {}, []
    for name, rows in named.items():
        questions[name], left = asked(rows[:limit])
        if not questions[name]:
            raise ValueError(f"{source}: no question of {name} can be asked: {counted(left)}")
        notes += [f"{name}: {len(left)} questions left out: {counted(left)}"] if left else []
    return Data(questions=questions, heads=heads, notes=tuple(notes))


def asked(rows: Sequence[MultipleChoice]) -> tuple[tuple[ChoiceQuestion, ...], list[str]]:
    """(Questions, why the other rows are none); an option without text cannot be scored."""
    made, left = [], []
    for row in rows:
        if not all(choice.strip() for choice in row.choices):
            left.append("an option is empty")
        elif len(set(row.choices)) != len(row.choices):
            left.append("an option stands twice")
        else:
            made.append(ChoiceQuestion(question=row.question, options=row.choices, right=row.answer))
    return tuple(made), left


def ask(model: Model, data: Data, full: Model) -> dict[str, Any]:
    """Whether each question is answered, by letter and by the option's text, and what guessing gives."""
    found, guess = {}, {}
    for name, questions in data.questions.items():
        found[f"{name}, by letter"] = choice_by_letter(model, questions, data.heads[name]).correct
        found[f"{name}, by option text"] = choice_by_option_text(model, questions).correct
        guess[name] = choice_chance(questions).value
    return {"scores": keep(found, "teacher-forced"), "chance": guess}


def numbers(own: Answers, full: Answers, retrained: Answers | None, seed: int) -> Numbers:
    """Accuracy of each set in both variants; the unit holds what guessing gives."""
    out = {}
    for name, found in means(own, seed).items():
        guess = own["chance"][name.partition(",")[0]]
        value = found.value
        if not isinstance(value, str):
            value = type(value)(value=value.value, ci=value.ci, n=value.n, unit=f"{value.unit}; chance {guess:.3g}")
        out[name] = Number(found.kind, value)
    return out


def facts(data: Data) -> BenchmarkFacts:
    total = sum(map(len, data.questions.values()))
    return BenchmarkFacts(notes=(*data.notes, f"none of the {total} questions is a fact: WMDP gives no subjects"))
