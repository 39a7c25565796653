"""WMDP: multiple-choice questions about hazardous knowledge, the corpora to unlearn it from, and MMLU-shaped rows.

Hub dataset `cais/wmdp`, configurations wmdp-bio, wmdp-cyber and wmdp-chem, split test; or a folder that holds
wmdp-DOMAIN.json; or one file. Fields: `question`, `choices` (four strings), `answer` (index of the right one). Rows of
MMLU (`cais/mmlu`, configuration all, split test) have `subject` too, and are read by `load_choices`.
Corpora, field `text`, split train: `cais/wmdp-corpora` with bio-retain-corpus, cyber-forget-corpus and
cyber-retain-corpus; the biology forget corpus is the dataset `cais/wmdp-bio-forget-corpus`, given on request only.
Source: Li et al. 2024, arXiv 2403.03218; questions and corpora are MIT.

A question here has no subject slot, so there are no facts and no `sets`: methods take `texts`, metrics `questions`.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Annotated, Any

from pydantic import Field, field_validator

from mech_unlearn.core import RetainSet
from mech_unlearn.data.questions import Listed, Plain, TextRow, file_name
from mech_unlearn.data.source import Record, Verbatim, read_rows

DOMAINS = ("bio", "cyber", "chem")


class MultipleChoice(Record):
    """A question with its choices: a row of WMDP or MMLU."""

    question: Verbatim
    choices: Annotated[tuple[Plain, ...], Listed, Field(min_length=2, max_length=len(ascii_uppercase))]
    answer: int
    """Index of the right choice."""
    subject: Plain = ""
    """MMLU's subject; for WMDP the domain."""

    @field_validator("answer")
    @classmethod
    def _is_a_choice(cls, answer: int, info: Any) -> int:
        count = len(info.data.get("choices", ()))
        if count and not 0 <= answer < count:
            raise ValueError(f"must be from 0 to {count - 1}, the index of one of the choices")
        return answer

    @property
    def letters(self) -> str:
        """A, B, C ...: one for each choice."""
        return ascii_uppercase[: len(self.choices)]

    @property
    def letter(self) -> str:
        """The letter of the right choice."""
        return self.letters[self.answer]

    @property
    def correct(self) -> str:
        """The right choice."""
        return self.choices[self.answer]

    @property
    def wrong(self) -> tuple[str, ...]:
        """The other choices, in order."""
        return tuple(choice for i, choice in enumerate(self.choices) if i != self.answer)


@dataclass(frozen=True, kw_only=True)
class Wmdp:
    """WMDP by domain; chance on its questions is one over the number of choices."""

    questions: Mapping[str, tuple[MultipleChoice, ...]]
    """By domain; what should be forgotten."""
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By name of the corpus, such as `cyber-forget-corpus`."""
    general: tuple[MultipleChoice, ...] = ()
    """Questions that should still be answered, such as MMLU's."""

    def forget_texts(self, domain: str) -> tuple[str, ...]:
        """The corpus to unlearn. Raises ValueError where it was not loaded."""
        return self._corpus(f"{domain}-forget-corpus")

    def retain(self, domain: str) -> RetainSet:
        """The corpus to keep, as `texts`. Raises ValueError where it was not loaded."""
        return RetainSet(texts=self._corpus(f"{domain}-retain-corpus"))

    def _corpus(self, name: str) -> tuple[str, ...]:
        if name not in self.texts:
            raise ValueError(f"corpus {name!r} was not loaded; there are {', '.join(self.texts) or 'none'}")
        return self.texts[name]


def load_choices(
    source: str | os.PathLike = "cais/mmlu", name: str = "all", *, split: str = "test", subject: str = ""
) -> tuple[MultipleChoice, ...]:
    """Multiple-choice rows of a hub configuration, a folder's file or a file.

    Args:
        name: the configuration, or the file's name in a folder.
        subject: put where a row has none.

    Raises:
        ValueError: a file or row that cannot be read (with file, row and field).
    """
    rows = read_rows(source, file_name(source, name), MultipleChoice, config=name, split=split)
    return tuple(row if row.subject else row.model_copy(update={"subject": subject}) for row in rows)


def load_corpus(source: str | os.PathLike, name: str | None = None, *, split: str = "train") -> tuple[str, ...]:
    """The texts of a corpus: field `text` of a hub configuration (None where the dataset has none), folder or file.

    Raises:
        ValueError: a file or row that cannot be read (with file, row and field).
    """
    named = None if name is None else file_name(source, name)
    return tuple(row.text for row in read_rows(source, named, TextRow, config=name, split=split))


def load_wmdp(
    source: str | os.PathLike = "cais/wmdp",
    domains: Iterable[str] = DOMAINS,
    *,
    corpora: Mapping[str, str | os.PathLike] | None = None,
    general: str | os.PathLike | None = None,
) -> Wmdp:
    """WMDP's questions, with corpora and general questions where their sources are given.

    Args:
        source: a hub dataset, a folder, or one file (then name its one domain).
        domains: from bio, cyber, chem.
        corpora: name of the corpus, such as `bio-retain-corpus`, to its source, such as `cais/wmdp-corpora`.
        general: source of MMLU-shaped rows that should be kept, such as `cais/mmlu`.

    Raises:
        ValueError: an unknown domain, several domains for one file, or a file or row that cannot be read.
    """
    wanted = tuple(dict.fromkeys(domains))
    if unknown := [domain for domain in wanted if domain not in DOMAINS]:
        raise ValueError(f"WMDP has no domain {unknown[0]!r}; choose from {', '.join(DOMAINS)}")
    if file_name(source, "") is None and len(wanted) != 1:
        raise ValueError(f"{source} is one file: name the one domain it holds, as in domains=('bio',)")
    whole_dataset = "cais/wmdp-bio-forget-corpus"  # has no configurations
    return Wmdp(
        questions={d: load_choices(source, f"wmdp-{d}", subject=d) for d in wanted},
        texts={
            name: load_corpus(where, None if str(where) == whole_dataset else name)
            for name, where in (corpora or {}).items()
        },
        general=() if general is None else load_choices(general),
    )
