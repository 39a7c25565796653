"""TOFU's questions about fictitious authors, real authors and the world, as facts.

Files as the benchmark has them: `NAME.json` (JSON lines or one list) in a folder, or the configurations NAME of a hub
dataset; read as source.py says. A row has `question` and `answer`; it may have `perturbed_answer` (wrong answers:
distractors), `paraphrased_answer` (kept in `extra`), `paraphrased_question` (held out), `idx` (its number, in a file
that holds only some of the rows), and `prefix` with `entity` (the answer's beginning and what follows it, for cloze
prompts).
Source: Maini et al. 2024, arXiv 2401.06121 (MIT).

The subject is found as data/subjects.py says. A row whose question lacks its subject, or holds it more than once,
becomes no fact: it is listed in `Tofu.left_out` with the reason.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.data.questions import check_layout
from mech_unlearn.data.source import LeftOut, Loaded, Record, Verbatim
from mech_unlearn.data.source import read_rows as read_any
from mech_unlearn.data.subjects import author_name, named_subject, slot

PER_AUTHOR = 20
"""Questions per fictitious author. Source: 2401.06121, section 2.1."""
TofuForm = Literal["question", "cloze"]

_KEPT = ("question", "answer", "paraphrased_answer", "paraphrased_question", "prefix", "entity")


def _wrong_answers(value: Any) -> Any:
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise PydanticCustomError("texts", "must be a list of non-empty strings")
    return value


class TofuRow(Record):
    """One question, under the names the benchmark uses."""

    question: Verbatim
    answer: Verbatim
    perturbed_answer: Annotated[list[str], BeforeValidator(_wrong_answers)] = Field(default_factory=list)
    paraphrased_answer: str | None = None
    paraphrased_question: str | None = None
    prefix: str | None = None
    entity: str | None = None
    idx: int | None = Field(default=None, ge=0)


Tofu = Loaded
"""`neighbors`: other fictitious authors; `same_subject`: the forgotten authors' other questions; `general`: real
authors and world facts, told apart by `relation`."""


def read_rows(source: str | os.PathLike, name: str) -> tuple[TofuRow, ...]:
    """The rows of one TOFU file or configuration, checked, in its order.

    Args:
        source: a folder that holds `NAME.json`, or a hub dataset such as `locuslab/TOFU`.

    Raises:
        ValueError: no such folder, file or dataset, or a bad row (with file, number and field).
    """
    return read_any(source, name, TofuRow)


@dataclass(frozen=True)
class _Reader:
    source: str | os.PathLike
    form: TofuForm
    layout: str
    left: list[LeftOut]

    def facts(self, name: str, relation: str, authors: bool) -> Iterator[tuple[int, Fact]]:
        """The facts of one file with their row numbers."""
        read = read_rows(self.source, name)
        rows = {number if row.idx is None else row.idx: row for number, row in enumerate(read)}
        if len(rows) != len(read):
            raise ValueError(f"{name}: a value of 'idx' stands twice, or only some rows have one")
        groups: dict[int, list[str]] = {}
        for number, row in rows.items():
            groups.setdefault(number // PER_AUTHOR, []).append(row.question)
        try:
            names = {group: author_name(questions) for group, questions in groups.items()} if authors else {}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        for number, row in rows.items():
            subject = names[number // PER_AUTHOR] if authors else named_subject(row.question)
            try:
                yield number, self._fact(name, number, row, subject, relation, "person" if authors else None)
            except ValueError as error:
                self.left.append(LeftOut(name, number, row.question, str(error)))

    def _fact(self, name: str, number: int, row: TofuRow, subject: str | None, relation: str, kind: str | None) -> Fact:
        if self.form == "cloze":
            prompt, answer = self._cloze(row, subject)
        else:
            prompt, answer = self._ask(row.question, subject), row.answer
        heldout = ()
        if row.paraphrased_question and self.form == "question":
            try:
                held = self._ask(row.paraphrased_question, subject)
                if held == prompt:
                    raise ValueError("it is the question itself")
                heldout = (held,)
            except ValueError as error:
                self.left.append(LeftOut(name, number, row.paraphrased_question, f"held-out phrasing: {error}"))
        return Fact(
            id=f"{name}/{number}",
            subject=subject or "",
            relation=relation,
            object=answer,
            prompt=prompt,
            heldout=heldout,
            distractors=() if self.form == "cloze" else tuple(dict.fromkeys(row.perturbed_answer)),
            kind=kind,
            group=subject,
            extra={key: value for key in _KEPT if (value := getattr(row, key)) is not None},
        )

    def _ask(self, question: str, subject: str | None) -> str:
        return self.layout.replace("{question}", slot(question, subject))

    def _cloze(self, row: TofuRow, subject: str | None) -> tuple[str, str]:
        prefix, entity = row.prefix, row.entity
        if prefix is None or not entity:
            raise ValueError("no 'prefix' and 'entity' for a cloze prompt")
        if not row.answer.startswith(f"{prefix} {entity}".lstrip()):
            raise ValueError("the entity does not follow the prefix after one space")
        if subject is not None and subject in prefix:
            return slot(prefix, subject), entity
        return f"{self._ask(row.question, subject)} {prefix}".rstrip(), entity


def load_tofu(
    source: str | os.PathLike = "locuslab/TOFU",
    *,
    forget: str = "forget10_perturbed",
    retain: str | None = "retain_perturbed",
    real_authors: str | None = "real_authors_perturbed",
    world_facts: str | None = "world_facts_perturbed",
    form: TofuForm = "question",
    layout: str = "Question: {question}\nAnswer:",
    forgotten: int = PER_AUTHOR,
) -> Tofu:
    """TOFU's rows as facts to forget and facts to keep.

    Args:
        source: a folder, or a hub dataset.
        forget, retain, real_authors, world_facts: names of the files; None does without.
        form: `question` asks the question and takes the whole answer as the object. `cloze` takes the file's `entity`,
            after its `prefix` where the subject stands in that, else after question and prefix; without distractors
            and held-out phrasings, which go with whole answers. Real authors and world facts are always asked.
        layout: the prompt around a question; it holds `{question}` once.
        forgotten: so many of an author's twenty questions are to be forgotten; the others become `same_subject`.

    Raises:
        ValueError: a source, file or row that cannot be read, an author in both sets, or no fact left to forget.
    """
    check_layout(layout)
    if not 1 <= forgotten <= PER_AUTHOR:
        raise ValueError(f"forgotten must be from 1 to {PER_AUTHOR} questions per author, got {forgotten}")
    if form not in ("question", "cloze"):
        raise ValueError(f"unknown form {form!r}; choose from question, cloze")
    left: list[LeftOut] = []
    about, ask = _Reader(source, form, layout, left), _Reader(source, "question", layout, left)
    ours = list(about.facts(forget, "fictitious author", authors=True))
    others = [] if retain is None else list(about.facts(retain, "fictitious author", authors=True))
    if both := {fact.subject for _, fact in ours} & {fact.subject for _, fact in others}:
        raise ValueError(f"author {min(both)!r} stands in {forget} and in {retain}")
    general = [
        fact
        for name, relation in ((real_authors, "real author"), (world_facts, "world fact"))
        if name is not None
        for _, fact in ask.facts(name, relation, authors=False)
    ]
    gone = tuple(fact for number, fact in ours if number % PER_AUTHOR < forgotten)
    if not gone:
        reasons = Counter(item.reason for item in left if item.file == forget)
        raise ValueError(f"no row of {forget} became a fact to forget: {dict(reasons)}")
    return Tofu(
        forget=ForgetSet(facts=gone),
        retain=RetainSet(
            neighbors=tuple(fact for _, fact in others),
            same_subject=tuple(fact for number, fact in ours if number % PER_AUTHOR >= forgotten),
            general=tuple(general),
        ),
        left_out=tuple(left),
    )
