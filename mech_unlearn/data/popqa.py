"""PopQA: questions about Wikidata triples with the page views of subject and object.

Rows (TSV, CSV or a hub dataset) have `id`, `subj`, `prop`, `obj`, `question` and `possible_answers`, a JSON list in a
string; they may have `s_aliases`, `o_aliases` (the same), `s_pop`, `o_pop` (page views per month), `subj_id`,
`prop_id`, `obj_id`, `s_uri`, `o_uri`, `s_wiki_title`, `o_wiki_title`. Source: Mallen et al. 2022, arXiv 2212.10511; its
card names no licence.
"""

import os
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from mech_unlearn.core import Fact
from mech_unlearn.data.questions import check_layout
from mech_unlearn.data.sets import DISTRACTORS, Found, ask, choose_subjects, divide, why, with_distractors
from mech_unlearn.data.source import LeftOut, Loaded, Record, Text, parse_json, read_rows


def _names(value: Any) -> Any:
    """A list of names from its JSON text; an empty text is none, and blank names are taken out."""
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else []
        except ValueError:
            value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise PydanticCustomError("names", "must be a list of strings, or its JSON text")
    return [item.strip() for item in value if item.strip()]


def _count(value: Any) -> Any:
    """A number from a column of text; an empty one is none."""
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise PydanticCustomError("count", "must be a whole number, 0 or more")
        return int(text)
    return value


Names = Annotated[list[str], BeforeValidator(_names)]
Count = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_count)]


class PopqaRow(Record):
    """One question, under the names the dataset uses."""

    id: int | str | None = None
    subj: Text
    prop: Text
    obj: Text
    question: Text
    possible_answers: Names
    s_aliases: Names = Field(default_factory=list)
    o_aliases: Names = Field(default_factory=list)
    s_pop: Count = None
    o_pop: Count = None


def load_popqa(
    source: str | os.PathLike = "akariasai/PopQA",
    *,
    name: str | None = None,
    split: str = "test",
    relations: Sequence[str] | None = None,
    subjects: int | Sequence[str] = 20,
    popularity: int = 0,
    layout: str = "Question: {question}\nAnswer:",
    distractors: int = DISTRACTORS,
    seed: int = 0,
) -> Loaded:
    """PopQA's questions as facts to forget and facts to keep.

    `Fact.extra` holds `answers` (all that count as right; none of them is a distractor), `popqa_id`, `s_pop`, `o_pop`.

    Args:
        source: the file, a folder that holds `name`, or a hub dataset of the same rows.
        relations: what is forgotten about the subjects (values of `prop`); None for all.
        subjects: names, or how many to draw.
        popularity: only subjects with `s_pop` of at least this many page views are drawn or may be named.
        layout: the prompt around a question; it holds `{question}` once.
        distractors: wrong objects per fact, drawn from the relation's.

    Raises:
        ValueError: a source or row that cannot be read (file, row, field), an unknown relation or subject, or no fact
            left to forget.
    """
    check_layout(layout)
    found, left_out = [], []
    for number, row in enumerate(read_rows(source, name, PopqaRow, split=split)):
        try:
            may_go = (row.s_pop or 0) >= popularity
            found.append(Found(_fact(row, number, layout), "popqa", number, may_go=may_go))
        except ValueError as error:
            left_out.append(LeftOut("popqa", number, row.question, why(error)))
    chosen = choose_subjects(found, subjects, relations, seed)
    return divide(with_distractors(found, distractors, seed), chosen, relations, left_out)


def _fact(row: PopqaRow, number: int, layout: str) -> Fact:
    return Fact(
        id=f"popqa/{number}",
        subject=row.subj,
        relation=row.prop,
        object=row.obj,
        prompt=ask(row.question, row.subj, layout),
        aliases=tuple(alias for alias in dict.fromkeys(row.s_aliases) if alias != row.subj),
        group=row.subj,
        extra={
            "popqa_id": row.id,
            "answers": tuple(dict.fromkeys((row.obj, *row.possible_answers, *row.o_aliases))),
            "s_pop": row.s_pop,
            "o_pop": row.o_pop,
        },
    )
