"""MUSE: news articles or books to unlearn, with the texts and questions of its six evaluations.

Hub datasets `muse-bench/MUSE-News` and `muse-bench/MUSE-Books`, or a folder that holds PART/SPLIT.json (or another of
`source.ENDINGS`) with the hub's fields. Parts and splits of the dataset cards:

* `raw` (forget, retain1, retain2, holdout), `privleak` (forget, retain, holdout), `train` (forget, retain1, retain2;
  these as in an earlier card), `scal` and `sust` (forget_1 .. forget_4, MUSE-News only): `text`
* `knowmem` (forget_qa, retain_qa, and the in-context examples forget_qa_icl, retain_qa_icl): `question`, `answer`
* `verbmem` (forget): `prompt`, `gt` (the true continuation)

Source: Shi et al. 2024, arXiv 2407.06460; the data are CC BY 4.0.

The data do not say whom a question is about. A question becomes a fact where it names a subject once (its longest
quoted title, else its longest name); the others stay questions with answers in `Muse.knowmem` and are listed in
`left_out`. Most methods for MUSE need only texts: `forget_texts` and `retain.texts`.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.data.questions import LAYOUT, QuestionAnswer, TextRow, asked, check_layout, forget_set, sort_out
from mech_unlearn.data.source import LeftOut, Record, Verbatim, read_rows
from mech_unlearn.data.subjects import named_subject

PART_SPLITS: Mapping[str, tuple[str, ...]] = {
    "raw": ("forget", "retain1", "retain2", "holdout"),
    "knowmem": ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl"),
    "verbmem": ("forget",),
    "privleak": ("forget", "retain", "holdout"),
    "train": ("forget", "retain1", "retain2"),
    "scal": ("forget_1", "forget_2", "forget_3", "forget_4"),
    "sust": ("forget_1", "forget_2", "forget_3", "forget_4"),
}
"""The splits of each part."""
USUAL_PARTS = ("raw", "knowmem", "verbmem", "privleak")
"""The parts that both MUSE-News and MUSE-Books have and every evaluation needs."""


class Continuation(Record):
    prompt: Verbatim
    gt: Verbatim
    """The true continuation of the prompt."""


@dataclass(frozen=True, kw_only=True)
class Muse:
    """MUSE by part and split; parts that were not asked for are empty."""

    raw: Mapping[str, tuple[str, ...]]
    knowmem: Mapping[str, tuple[QuestionAnswer, ...]]
    verbmem: tuple[Continuation, ...]
    privleak: Mapping[str, tuple[str, ...]]
    train: Mapping[str, tuple[str, ...]]
    scal: Mapping[str, tuple[str, ...]]
    sust: Mapping[str, tuple[str, ...]]
    forget_facts: tuple[Fact, ...]
    """Questions of `forget_qa` that name their subject once."""
    retain: RetainSet
    """`general`: such questions of `retain_qa`; `texts`: `raw` retain1, for training (retain2 is for tests)."""
    left_out: tuple[LeftOut, ...]
    """Questions that became no fact; they stand in `knowmem` all the same."""

    @property
    def forget_texts(self) -> tuple[str, ...]:
        """The texts to unlearn: `raw` forget."""
        return self.raw.get("forget", ())

    @property
    def sets(self) -> tuple[ForgetSet, RetainSet]:
        """Raises ValueError where no question became a fact."""
        return forget_set(self.forget_facts, "knowmem/forget_qa"), self.retain


def load_muse(
    source: str | os.PathLike = "muse-bench/MUSE-News",
    parts: Iterable[str] = USUAL_PARTS,
    *,
    layout: str = LAYOUT,
) -> Muse:
    """MUSE's texts and questions.

    Args:
        source: a hub dataset or a folder with PART/SPLIT files.
        parts: which of `PART_SPLITS` to read.
        layout: the prompt around a question of a fact; it holds `{question}` once.

    Raises:
        ValueError: an unknown part, a source that is one file, or a file or row that cannot be read (with file, row
            and field).
    """
    check_layout(layout)
    wanted = tuple(dict.fromkeys(parts))
    if unknown := [part for part in wanted if part not in PART_SPLITS]:
        raise ValueError(f"MUSE has no part {unknown[0]!r}; choose from {', '.join(PART_SPLITS)}")
    if Path(source).is_file():
        raise ValueError(
            f"{source} is one file; MUSE is a folder that holds {wanted[0] if wanted else 'raw'}/, or a hub id"
        )

    def rows(part: str, schema: type[Record]) -> dict[str, tuple[Any, ...]]:
        splits = PART_SPLITS[part] if part in wanted else ()
        return {s: read_rows(source, f"{part}/{s}", schema, config=part, split=s) for s in splits}

    texts = {
        part: {split: tuple(row.text for row in found) for split, found in rows(part, TextRow).items()}
        for part in PART_SPLITS
        if part not in ("knowmem", "verbmem")
    }
    knowmem = rows("knowmem", QuestionAnswer)
    facts: dict[str, tuple[Fact, ...]] = {}
    left: list[LeftOut] = []
    for split in ("forget_qa", "retain_qa"):
        facts[split], gone = sort_out(
            asked(f"knowmem/{split}", i, row.question, row.answer, named_subject(row.question), "question", layout)
            for i, row in enumerate(knowmem.get(split, ()))
        )
        left += gone
    return Muse(
        **texts,
        knowmem=knowmem,
        verbmem=rows("verbmem", Continuation).get("forget", ()),
        forget_facts=facts["forget_qa"],
        retain=RetainSet(general=facts["retain_qa"], texts=texts["raw"].get("retain1", ())),
        left_out=tuple(left),
    )
