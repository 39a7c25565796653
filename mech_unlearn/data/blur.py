"""BLUR: prompts that ask for something forgotten and something kept at once, and texts to relearn from.

Hub dataset `forgelab/BLUR`, a folder that holds TASK_PART.json, or one file of combined prompts. Tasks: tofu, whp (Who
is Harry Potter), rwku, wmdp. Parts: forget, retain, paired_forget_retain (combined prompts), and D_hi, D_mid, D_lo, the
graded texts to relearn from (D_lo is one file for all tasks, D_lo_for_all). Field: `text`. Of tofu there are only
combined prompts, of wmdp no forget prompts. Tasks, parts and field are those that two readers of the hub dataset use;
that every task has every other part, and the hub's split train, are not verified.

A combined prompt holds both questions, "1. ... 2. ...", the forget question first (the benchmark's paper; that each
row of the files is written so is not verified). A prompt that is not is kept whole and listed in `left_out`.
Source: Hu et al. 2025, arXiv 2506.15699; licence not stated in what was read.

The rows have no answers: a judge reads what the model says. Where the answers are known (TOFU's), give them as
`answers`; halves with an answer and one named subject then become facts.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.data.questions import LAYOUT, QuestionAnswer, TextRow, asked, check_layout, forget_set
from mech_unlearn.data.source import LeftOut, read_rows
from mech_unlearn.data.subjects import named_subject

PAIRED = "paired_forget_retain"
RELEARN = ("D_hi", "D_mid", "D_lo")
TASK_PARTS: Mapping[str, tuple[str, ...]] = {
    "tofu": (PAIRED,),
    "whp": ("forget", "retain", PAIRED, *RELEARN),
    "rwku": ("forget", "retain", PAIRED, *RELEARN),
    "wmdp": ("retain", PAIRED, *RELEARN),
}
"""The parts of each task."""
_FIRST = re.compile(r"\s*1[.)]\s*")
_SECOND = re.compile(r"\s+2[.)]\s+")


@dataclass(frozen=True)
class Combined:
    """A prompt and its halves."""

    text: str
    """As it stands in the file."""
    forget: str
    """The question about what is to be forgotten."""
    retain: str
    """The question that is still to be answered."""
    forget_answer: str | None = None
    retain_answer: str | None = None

    @property
    def swapped(self) -> str:
        """The same two questions in the other order."""
        return f"1. {self.retain} 2. {self.forget}"


def halves(text: str) -> tuple[str, str]:
    """The two questions of "1. ... 2. ...".

    Raises:
        ValueError: the text does not begin with 1., or has no 2. after it or more than one.
    """
    if not (first := _FIRST.match(text)):
        raise ValueError("the prompt does not begin with 1.")
    parts = _SECOND.split(text[first.end() :])
    if len(parts) != 2:
        raise ValueError("the prompt has no second question after 2." if len(parts) < 2 else "2. stands twice")
    one, two = (part.strip() for part in parts)
    if not one or not two:
        raise ValueError("one of the two questions is empty")
    return one, two


@dataclass(frozen=True, kw_only=True)
class Blur:
    """One task of BLUR; parts that were not asked for are empty."""

    task: str
    combined: tuple[Combined, ...]
    forget: tuple[str, ...]
    """Questions about what is to be forgotten, alone."""
    retain_questions: tuple[str, ...]
    """Questions that are still to be answered, alone."""
    relearn: Mapping[str, tuple[str, ...]]
    """Texts to relearn from: `D_hi`, `D_mid`, `D_lo`."""
    forget_facts: tuple[Fact, ...]
    """Forget halves with an answer, each once."""
    retain: RetainSet
    """`neighbors`: retain halves with an answer, each once."""
    left_out: tuple[LeftOut, ...]
    """Combined prompts that have not two halves; halves that became no fact though they have an answer."""

    @property
    def sets(self) -> tuple[ForgetSet, RetainSet]:
        """Raises ValueError where no half became a fact: give `answers`."""
        return forget_set(self.forget_facts, f"{self.task}_{PAIRED} (facts need answers=...)"), self.retain


def load_blur(
    source: str | os.PathLike = "forgelab/BLUR",
    task: str = "tofu",
    parts: tuple[str, ...] | None = None,
    *,
    answers: Mapping[str, str] | str | os.PathLike | None = None,
    layout: str = LAYOUT,
) -> Blur:
    """One task's prompts and texts.

    Args:
        source: a hub dataset, a folder, or one file of combined prompts.
        task: from `TASK_PARTS`.
        parts: which to read; None for all of `TASK_PARTS[task]`, or the combined prompts where the source is a file.
        answers: question to answer, for halves of combined prompts; or a file of rows with `question` and `answer`.
        layout: the prompt around a question of a fact; it holds `{question}` once.

    Raises:
        ValueError: an unknown task or part, or a file or row that cannot be read (with file, row and field).
    """
    check_layout(layout)
    if task not in TASK_PARTS:
        raise ValueError(f"BLUR has no task {task!r}; choose from {', '.join(TASK_PARTS)}")
    one = Path(source).is_file()
    wanted = parts if parts is not None else (PAIRED,) if one else TASK_PARTS[task]
    if unknown := [part for part in wanted if part not in TASK_PARTS[task]]:
        raise ValueError(f"BLUR's task {task} has no part {unknown[0]!r}; choose from {', '.join(TASK_PARTS[task])}")
    if one and tuple(wanted) != (PAIRED,):
        raise ValueError(f"{source} is one file: it is read as {PAIRED}; other parts need a folder or hub id")

    def texts(part: str) -> tuple[str, ...]:
        if part not in wanted:
            return ()
        name = "D_lo_for_all" if part == "D_lo" else f"{task}_{part}"
        return tuple(row.text for row in read_rows(source, None if one else name, TextRow, config=name))

    if isinstance(answers, str | os.PathLike):
        answers = {row.question: row.answer for row in read_rows(answers, None, QuestionAnswer)}
    known = {question.strip(): answer for question, answer in (answers or {}).items()}
    file = Path(source).name if one else f"{task}_{PAIRED}"
    combined: list[Combined] = []
    left: list[LeftOut] = []
    facts: dict[str, dict[str, Fact]] = {"forget": {}, "retain": {}}
    for number, text in enumerate(texts(PAIRED)):
        try:
            pair = halves(text)
        except ValueError as error:
            left.append(LeftOut(file, number, text, str(error)))
            continue
        combined.append(Combined(text, *pair, *(known.get(question) for question in pair)))
        for half, question in zip(("forget", "retain"), pair, strict=True):
            if question in known and question not in facts[half]:
                subject = named_subject(question)
                fact = asked(f"{file}/{half}", number, question, known[question], subject, task, layout)
                if isinstance(fact, Fact):
                    facts[half][question] = fact
                else:
                    left.append(fact)
    return Blur(
        task=task,
        combined=tuple(combined),
        forget=texts("forget"),
        retain_questions=texts("retain"),
        relearn={part: texts(part) for part in RELEARN},
        forget_facts=tuple(facts["forget"].values()),
        retain=RetainSet(neighbors=tuple(facts["retain"].values())),
        left_out=tuple(left),
    )
