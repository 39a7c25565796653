"""zsRE: questions about relations of Wikipedia's subjects, in the layouts of MEMIT and of KnowEdit.

MEMIT's rows have `subject`, `src` (the question), `rephrase`, `answers` (true), `alt` (a false answer), `pred` (what a
model said), `loc` and `loc_ans` (a question of Natural Questions and its answer) and `cond`. KnowEdit's rows have
`subject`, `prompt` (the question), `ground_truth` (true), `target_new` (false), and may have `rephrase_prompt`, `cond`,
`locality` (groups of `prompt` and `ground_truth`) and `portability`; its Wikidata sets have the same layout. Sources:
Levy et al. 2017, arXiv 1706.04115; MEND, arXiv 2110.11309; MEMIT, arXiv 2210.07229 (MIT); KnowEdit, arXiv 2401.01286
(MIT).

The data name no relation: it is the question with `{}` for its subject. Natural Questions name no subject either: the
whole question is the subject of such a fact, its kind is `question`, and it is `general`. KnowEdit's
`Relation_Specificity` asks for other facts about the same subject; `Forgetfulness` asks for the edited fact again and
is left out; `portability` follows from the false answer and stays in `extra`.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from mech_unlearn.core import Fact
from mech_unlearn.data.questions import check_layout
from mech_unlearn.data.sets import (
    DISTRACTORS,
    Found,
    ask,
    choose_subjects,
    divide,
    left,
    why,
    with_distractors,
    without_names,
)
from mech_unlearn.data.source import LeftOut, Loaded, Record, Text, read_rows

Layout = Literal["memit", "knowedit"]
NATURAL = "natural question"
"""The relation of MEMIT's locality questions."""


def _answers(value: Any) -> Any:
    """One answer, a list of answers, or a list of such lists, as KnowEdit has them: all of them in one list."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise PydanticCustomError("answers", "must be an answer or a list of answers")
    flat = [item for part in value for item in (part if isinstance(part, list) else [part])]
    if not all(isinstance(item, str) for item in flat):
        raise PydanticCustomError("answers", "must be an answer or a list of answers")
    return list(dict.fromkeys(item.strip() for item in flat if item.strip()))


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


TrueAnswers = Annotated[list[str], BeforeValidator(_answers)]
One = Annotated[Text, BeforeValidator(_one)]


class MemitRow(Record):
    """One question, as `zsre_mend_eval.json` has it."""

    subject: Text
    src: Text
    answers: TrueAnswers
    rephrase: str | None = None
    alt: str | None = None
    pred: str | None = None
    loc: str | None = None
    loc_ans: str | None = None
    cond: str | None = None


class LocalityQuestion(Record):
    """A question beside the edit, and its answers."""

    prompt: One
    ground_truth: TrueAnswers


class KnowEditRow(Record):
    """One question, as KnowEdit has it."""

    subject: Text
    prompt: Text
    ground_truth: TrueAnswers
    target_new: str | None = None
    rephrase_prompt: str | None = None
    cond: str | None = None
    locality: dict[str, list[LocalityQuestion]] | None = None
    portability: dict[str, Any] | None = None


class _Any(Record):
    src: Any = None
    prompt: Any = None


def load_zsre(
    source: str | os.PathLike,
    *,
    name: str | None = None,
    split: str = "train",
    layout: Layout | None = None,
    relations: Sequence[str] | None = None,
    subjects: int | Sequence[str] = 20,
    question: str = "Question: {question}\nAnswer:",
    distractors: int = DISTRACTORS,
    seed: int = 0,
) -> Loaded:
    """zsRE's questions as facts to forget and facts to keep; rephrased questions are held out.

    Of every row, its locality questions become facts that are kept and never forgotten.

    Args:
        source: the file, a folder that holds `name`, or a hub dataset of the same rows.
        layout: of the rows; None to see it by the first row, which has `src` (MEMIT) or `prompt` (KnowEdit).
        relations: what is forgotten about the subjects (questions with `{}` for the subject); None for all.
        subjects: names, or how many to draw.
        question: the prompt around a text that ends in a question mark; it holds `{question}` once.
        distractors: wrong objects per fact: the false answer, then others drawn from the relation's.

    Raises:
        ValueError: a source or row that cannot be read (file, row, field), an unknown layout, relation or subject, or
            no fact left to forget.
    """
    check_layout(question)
    if layout is None:
        first = read_rows(source, name, _Any, split=split)[0]
        if (first.src is None) == (first.prompt is None):
            raise ValueError(f"{source}, row 0: must have either 'src' (MEMIT) or 'prompt' (KnowEdit)")
        layout = "memit" if first.prompt is None else "knowedit"
    if layout not in ("memit", "knowedit"):
        raise ValueError(f"unknown layout {layout!r}; choose from memit, knowedit")
    schema = MemitRow if layout == "memit" else KnowEditRow
    found, beside, left_out = [], [], []
    for number, row in enumerate(read_rows(source, name, schema, split=split)):
        made = _memit(row, number, question) if isinstance(row, MemitRow) else _knowedit(row, number, question)
        for item in made:
            if isinstance(item, LeftOut):
                left_out.append(item)
            else:
                (found if item.may_go else beside).append(item)
    chosen = choose_subjects(found, subjects, relations, seed)
    for item in [item for item in beside if item.fact.relation == NATURAL]:
        if not without_names([item.fact.subject], chosen):
            beside.remove(item)
            left_out.append(left(item, "it names a forgotten subject"))
    return divide(with_distractors([*found, *beside], distractors, seed), chosen, relations, left_out)


def _memit(row: MemitRow, number: int, layout: str) -> Iterator[Found | LeftOut]:
    yield from _edit(number, row.subject, row.src, row.answers, row.alt, row.rephrase, layout, {"pred": row.pred})
    if row.loc is None and row.loc_ans is None:
        return
    text, answer = (row.loc or "").removeprefix("nq question:").strip(" ?"), (row.loc_ans or "").strip()
    try:
        if not text or not answer:
            raise ValueError("locality question without text or answer")
        fact = Fact(
            id=f"zsre/{number}/loc",
            subject=text,
            relation=NATURAL,
            object=answer,
            prompt=layout.replace("{question}", "{}?"),
            kind="question",
            group=text,
        )
        yield Found(fact, "zsre", number, may_go=False)
    except ValueError as error:
        yield LeftOut("zsre", number, row.loc or "", why(error))


def _knowedit(row: KnowEditRow, number: int, layout: str) -> Iterator[Found | LeftOut]:
    more = {"portability": row.portability or {}}
    rephrase = row.rephrase_prompt
    yield from _edit(number, row.subject, row.prompt, row.ground_truth, row.target_new, rephrase, layout, more)
    for group, probes in (row.locality or {}).items():
        for i, probe in enumerate(probes):
            try:
                if group == "Forgetfulness":
                    raise ValueError("Forgetfulness asks for the edited fact")
                yield Found(
                    _fact(f"{number}/{group}{i}", row.subject, probe.prompt, probe.ground_truth, None, (), layout, {}),
                    "zsre",
                    number,
                    may_go=False,
                )
            except ValueError as error:
                yield LeftOut("zsre", number, probe.prompt, f"locality: {why(error)}")


def _edit(
    number: int,
    subject: str,
    question: str,
    answers: Sequence[str],
    wrong: str | None,
    rephrase: str | None,
    layout: str,
    extra: dict[str, Any],
) -> Iterator[Found | LeftOut]:
    """The fact of a row, or why there is none, and why its rephrased question is not held out."""
    heldout, lost = (), None
    if rephrase is not None and rephrase.strip():
        try:
            heldout = (ask(rephrase, subject, layout),)
        except ValueError as error:
            lost = LeftOut("zsre", number, rephrase, f"held-out phrasing: {error}")
    try:
        yield Found(_fact(str(number), subject, question, answers, wrong, heldout, layout, extra), "zsre", number)
    except ValueError as error:
        yield LeftOut("zsre", number, question, why(error))
    else:
        if lost is not None:
            yield lost


def _fact(
    name: str,
    subject: str,
    question: str,
    answers: Sequence[str],
    wrong: str | None,
    heldout: tuple[str, ...],
    layout: str,
    extra: dict[str, Any],
) -> Fact:
    if not answers:
        raise ValueError("no true answer")
    prompt = ask(question, subject, layout)
    false = (wrong or "").strip()
    return Fact(
        id=f"zsre/{name}",
        subject=subject,
        relation=question.replace(subject, "{}"),
        object=answers[0],
        prompt=prompt,
        heldout=tuple(text for text in heldout if text != prompt),
        distractors=(false,) if false and false not in answers else (),
        group=subject,
        extra={"answers": tuple(answers), **extra},
    )
