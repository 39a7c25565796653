"""DUSK: fictitious professors in five documents, one to unlearn; knowledge that the others share is to stay.

Hub dataset `AI-ISL/DUSK`, or a folder with its configurations as files, or the folder `data/Prof` of the benchmark's
code (`FILES`). Configurations, split eval:

* eval_specific_forget_qa (only the forget document has it), eval_general_qa (shared by all documents),
  eval_specific_retain_qa (only a retain document has it), and the in-context examples eval_icl and eval_icl_mcqa:
  `question`, `answer`
* eval_verbatim: `prompt`, `gt`. That the hub has this configuration is not verified.
* eval_holdout and raw (splits of `DOCUMENTS`): `text`; on the hub this field name is not verified.

Source: Jeung et al. 2025, arXiv 2505.15209; hub data MIT.

The data do not say whom a question is about: its subject is the name after a professor's title, else its longest name.
Such questions become facts; every question stays in its stratum.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mech_unlearn.benchmarks.muse.data import Continuation
from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.data.questions import LAYOUT, QuestionAnswer, TextRow, asked, check_layout, forget_set, sort_out
from mech_unlearn.data.source import ENDINGS, LeftOut, Record, read_rows, read_text
from mech_unlearn.data.subjects import named_subject

DOCUMENTS: Mapping[str, str] = {
    "forget_chronological": "Chronological",
    "retain_feature_story": "Feature_Story",
    "retain_interview": "Interview",
    "retain_inverted_pyramid": "Inverted_Pyramid",
    "retain_listicle": "Listicle",
}
"""Split of the hub's raw configuration to the text file of the benchmark's code. The first is the forget document."""
FILES: Mapping[str, str] = {
    "eval_specific_forget_qa": "eval/SpecificForgetQA",
    "eval_general_qa": "eval/GeneralQA",
    "eval_specific_retain_qa": "eval/SpecificRetainQA",
    "eval_icl": "eval/icl",
    "eval_icl_mcqa": "eval/icl_mcqa",
    "eval_verbatim": "eval/verbatim",
    "eval_holdout": "eval/holdout",
}
"""Configuration to the file in the benchmark's code."""
STRATA: Mapping[str, str] = {
    "forget": "eval_specific_forget_qa",
    "shared": "eval_general_qa",
    "retain": "eval_specific_retain_qa",
}
"""Stratum of the questions to the configuration."""
_WORD = r"(?:[A-Z][\w'’]*\.?(?:-\w+)*|van|der|den|de|del|della|di|da|dos|von|al|bin|ibn|la|le)(?!\w)"
_TITLED = re.compile(rf"\b(?:Dr|Prof|Professor)\b\.? ([A-Z][\w'’]*\.?(?:-\w+)*(?: {_WORD})*)")


@dataclass(frozen=True, kw_only=True)
class Dusk:
    """DUSK by stratum."""

    questions: Mapping[str, tuple[QuestionAnswer, ...]]
    """`forget`: only in the forget document; `shared`: in all; `retain`: only in a retain document."""
    examples: tuple[QuestionAnswer, ...]
    """In-context examples of the question-answer tests."""
    choice_examples: tuple[QuestionAnswer, ...]
    """In-context examples with numbered options in the question."""
    verbatim: tuple[Continuation, ...]
    """Prompts from the forget document and how they go on."""
    documents: Mapping[str, tuple[str, ...]]
    """Texts of each of `DOCUMENTS`."""
    holdout: tuple[str, ...]
    """Texts that no model was trained on."""
    forget_facts: tuple[Fact, ...]
    """Of the stratum `forget`."""
    retain: RetainSet
    """`same_subject`: shared knowledge about people of `forget_facts`; `neighbors`: the rest of `shared`, and `retain`,
    told apart by `relation`; `texts`: the retain documents."""
    left_out: tuple[LeftOut, ...]
    """Questions that became no fact."""

    @property
    def forget_texts(self) -> tuple[str, ...]:
        return self.documents.get("forget_chronological", ())

    @property
    def sets(self) -> tuple[ForgetSet, RetainSet]:
        """Raises ValueError where no question became a fact."""
        return forget_set(self.forget_facts, STRATA["forget"]), self.retain


def professor(question: str) -> str | None:
    """Whom a question is about: the name after a title, else the longest name."""
    if found := _TITLED.search(question):
        return re.sub(r"(?:['’]s?|\.)$", "", found.group(1))
    return named_subject(question)


_Any = TypeVar("_Any", bound=Record)


def _has(root: Path, name: str, endings: tuple[str, ...] = ENDINGS) -> bool:
    return any((root / f"{name}{ending}").is_file() for ending in endings)


def _rows(source: str | os.PathLike, config: str, schema: type[_Any]) -> tuple[_Any, ...]:
    name = FILES[config] if Path(source).is_dir() and _has(Path(source), FILES[config]) else config
    return read_rows(source, name, schema, config=config, split="eval")


def _texts(source: str | os.PathLike, name: str, config: str, split: str, plain: str) -> tuple[str, ...]:
    """The texts of a split; a plain text file is one text."""
    if _has(Path(source), plain, (".txt",)):
        file = Path(source) / f"{plain}.txt"
        if not (text := read_text(file)).strip():
            raise ValueError(f"{file} holds no text")
        return (text,)
    return tuple(row.text for row in read_rows(source, name, TextRow, config=config, split=split))


def load_dusk(
    source: str | os.PathLike = "AI-ISL/DUSK",
    *,
    documents: bool = True,
    verbatim: bool = True,
    layout: str = LAYOUT,
) -> Dusk:
    """DUSK's strata, documents and prompts.

    Args:
        source: a hub dataset, a folder of its configurations (raw/SPLIT for documents), or the code's `data/Prof`.
        documents: read the documents and the holdout.
        verbatim: read the prompts of verbatim memorisation.
        layout: the prompt around a question of a fact; it holds `{question}` once.

    Raises:
        ValueError: a source that is one file, or a file or row that cannot be read (with file, row and field).
    """
    check_layout(layout)
    if Path(source).is_file():
        raise ValueError(f"{source} is one file; DUSK is a folder that holds {STRATA['forget']}, or a hub id")
    questions = {stratum: _rows(source, config, QuestionAnswer) for stratum, config in STRATA.items()}
    facts: dict[str, tuple[Fact, ...]] = {}
    left: list[LeftOut] = []
    for stratum, rows in questions.items():
        facts[stratum], gone = sort_out(
            asked(STRATA[stratum], i, row.question, row.answer, professor(row.question), stratum, layout, kind="person")
            for i, row in enumerate(rows)
        )
        left += gone
    texts = {
        split: _texts(source, f"raw/{split}", "raw", split, plain) for split, plain in DOCUMENTS.items() if documents
    }
    people = {fact.subject for fact in facts["forget"]}
    return Dusk(
        questions=questions,
        examples=_rows(source, "eval_icl", QuestionAnswer),
        choice_examples=_rows(source, "eval_icl_mcqa", QuestionAnswer),
        verbatim=_rows(source, "eval_verbatim", Continuation) if verbatim else (),
        documents=texts,
        holdout=_texts(source, "eval_holdout", "eval_holdout", "eval", FILES["eval_holdout"]) if documents else (),
        forget_facts=facts["forget"],
        retain=RetainSet(
            same_subject=tuple(f for f in facts["shared"] if f.subject in people),
            neighbors=(*(f for f in facts["shared"] if f.subject not in people), *facts["retain"]),
            texts=tuple(text for split, found in texts.items() if split.startswith("retain") for text in found),
        ),
        left_out=tuple(left),
    )
