"""Rows of questions, and the step from a question to a fact, shared by the loaders of question sets."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, StringConstraints

from mech_unlearn.core import Fact, ForgetSet
from mech_unlearn.data.source import LeftOut, Record, Verbatim
from mech_unlearn.data.subjects import slot

LAYOUT = "Question: {question}\nAnswer:"
"""The prompt around a question. Source: MUSE's knowledge memorisation, arXiv 2407.06460."""

Listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""Lets a frozen row hold the tuple of what is a list on disk."""


Plain = Annotated[str, StringConstraints(min_length=0)]
"""A string that may be empty; like all strings with a constraint, one that can be written as UTF-8."""


class TextRow(Record):
    text: Verbatim


class QuestionAnswer(Record):
    question: Verbatim
    answer: Verbatim


def check_layout(layout: str) -> None:
    """Raises ValueError unless the layout holds `{question}` once and no other brace."""
    if layout.count("{question}") != 1 or layout.count("{") != 1 or layout.count("}") != 1:
        raise ValueError(f"layout {layout!r} must hold {{question}} once and no other brace")


def file_name(source: str | os.PathLike, name: str) -> str | None:
    """What `read_rows` wants as a name: None where the source is itself the file."""
    return None if Path(source).is_file() else name


def asked(
    file: str, row: int, question: str, answer: str, subject: str | None, relation: str, layout: str, **fields: Any
) -> Fact | LeftOut:
    """The question as a fact with a slot for its subject, or the reason why it is none."""
    try:
        return Fact(
            id=f"{file}/{row}",
            subject=subject or "",
            relation=relation,
            object=answer.strip(),
            prompt=layout.replace("{question}", slot(question, subject)),
            group=subject,
            **fields,
        )
    except ValueError as error:
        return LeftOut(file, row, question, str(error))


def sort_out(found: Iterable[Fact | LeftOut]) -> tuple[tuple[Fact, ...], tuple[LeftOut, ...]]:
    """(The facts, what became none), each in order."""
    both = tuple(found)
    return tuple(f for f in both if isinstance(f, Fact)), tuple(f for f in both if isinstance(f, LeftOut))


def forget_set(facts: tuple[Fact, ...], what: str) -> ForgetSet:
    """Raises ValueError where no row of `what` became a fact; the message says where to look."""
    if not facts:
        raise ValueError(f"no row of {what} became a fact to forget: see left_out for the reasons")
    return ForgetSet(facts=facts)
