"""RWKU: what models know of 200 famous people, asked at three levels, with neighbors, membership and utility sets.

Hub dataset `jinzhuoran/RWKU`, a folder that holds its configurations as files (under their names or those of the
benchmark's own preprocessing, `FILES`), or one file of forget probes. Fields:

* forget_target (split train): `target`, `intro`
* forget_level1 (fill in the blank `___`), forget_level2 (questions), forget_level3 (adversarial, nine kinds),
  neighbor_level1, neighbor_level2 (split test): `query`, `answer`, `level` ("1", "2", "3"), `type` (kind), `subject`
  (the target). `neighbor`, whom a neighbor probe is about, is not verified: without it the query's longest name counts.
* mia_forget, mia_retain: `text`, `subject`
* utility_general: `question`, `choices`, `answer`, `task`, `examples`, `subject`; utility_reason: `question`, `answer`,
  `cot`, `task`, `subject`; utility_truthfulness: `question`, `mc1_targets`, `mc2_targets` (each `choices`, `labels`),
  `subject`; utility_factuality: `question`, `answers`, `subject`; utility_fluency: `instruction`, `subject`

Source: Jin et al. 2024, arXiv 2406.10890; the data are CC BY 4.0. Level 3 only tests: its rows become no facts. The
benchmark puts an instruction before each query; pass it in `layout` to ask as it does.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, field_validator

from mech_unlearn.benchmarks.wmdp.data import MultipleChoice
from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.data.questions import LAYOUT, Listed, Plain, asked, check_layout, forget_set, sort_out
from mech_unlearn.data.source import LeftOut, Record, Verbatim, find, read_rows
from mech_unlearn.data.subjects import named_subject

FILES: Mapping[str, str] = {
    "forget_target": "intro",
    "mia_forget": "forget_mia",
    "mia_retain": "retain_mia",
    "utility_general": "retain_mmlu",
    "utility_reason": "retain_bbh",
    "utility_truthfulness": "truthful",
    "utility_factuality": "triviaqa",
    "utility_fluency": "fluency",
}
"""Configuration to the file that the benchmark's preprocessing writes; the others keep their names."""
LEVEL_NUMBERS = ("1", "2", "3")


class ForgetTarget(Record):
    target: Verbatim
    intro: Verbatim


class ProbeRecord(Record):
    """A query about a target, or about a neighbor of it."""

    query: Verbatim
    answer: Verbatim
    level: str
    type: Plain
    """Cloze, simple question, or the kind of attack: affirmative suffix, incontext learning ..."""
    subject: Verbatim
    """The target, also where the probe is about a neighbor."""
    neighbor: Plain | None = None


class Passage(Record):
    text: Verbatim
    subject: Verbatim


class General(MultipleChoice):
    """MMLU; `subject` is the target of whose test the row is a part."""

    task: Verbatim
    """MMLU's subject."""
    examples: Annotated[tuple[MultipleChoice, ...], Listed] = ()


class Reason(Record):
    """BIG-Bench Hard."""

    question: Verbatim
    answer: Verbatim
    cot: Plain
    """Worked examples that stand before the question."""
    task: Verbatim
    subject: Verbatim


class Labelled(Record):
    choices: Annotated[tuple[Verbatim, ...], Listed, Field(min_length=1)]
    labels: Annotated[tuple[int, ...], Listed]
    """1 where the choice is true, else 0."""

    @field_validator("labels")
    @classmethod
    def _one_for_each_choice(cls, labels: tuple[int, ...], info: Any) -> tuple[int, ...]:
        count = len(info.data.get("choices", ()))
        if count and (len(labels) != count or not set(labels) <= {0, 1}):
            raise ValueError(f"must hold 0 or 1 for each of the {count} choices")
        return labels


class Truthful(Record):
    """TruthfulQA."""

    question: Verbatim
    mc1_targets: Labelled
    mc2_targets: Labelled
    subject: Verbatim


class Factual(Record):
    """TriviaQA."""

    question: Verbatim
    answers: Annotated[tuple[Verbatim, ...], Listed, Field(min_length=1)]
    subject: Verbatim


class Fluent(Record):
    """AlpacaEval instructions."""

    instruction: Verbatim
    subject: Verbatim


UTILITY: Mapping[str, type[Record]] = {
    "general": General,
    "reason": Reason,
    "truthfulness": Truthful,
    "factuality": Factual,
    "fluency": Fluent,
}
"""Name of each utility set to its rows."""


@dataclass(frozen=True, kw_only=True)
class Rwku:
    """RWKU by level; what was not asked for is empty."""

    targets: tuple[ForgetTarget, ...]
    forget: Mapping[str, tuple[ProbeRecord, ...]]
    """By level: 1 fill in the blank, 2 questions, 3 adversarial."""
    neighbor: Mapping[str, tuple[ProbeRecord, ...]]
    """By level: 1 and 2."""
    mia_forget: tuple[Passage, ...] = ()
    mia_retain: tuple[Passage, ...] = ()
    utility: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """By name, see `UTILITY`."""
    forget_facts: tuple[Fact, ...]
    """Levels 1 and 2 where the query names the target once; `relation` is the probe's type."""
    retain: RetainSet
    """`neighbors`: such probes about neighbors; `extra["target"]` says whose."""
    left_out: tuple[LeftOut, ...]
    """Probes of levels 1 and 2 that became no fact."""

    @property
    def subjects(self) -> tuple[str, ...]:
        """The targets, each once, in order."""
        return tuple(dict.fromkeys(probe.subject for probes in self.forget.values() for probe in probes))

    def attacks(self) -> dict[str, tuple[ProbeRecord, ...]]:
        """The probes of level 3 by kind."""
        kinds = dict.fromkeys(probe.type for probe in self.forget["3"])
        return {kind: tuple(p for p in self.forget["3"] if p.type == kind) for kind in kinds}

    @property
    def sets(self) -> tuple[ForgetSet, RetainSet]:
        """Raises ValueError where no probe became a fact."""
        return forget_set(self.forget_facts, "forget_level1 and forget_level2"), self.retain


def probe_facts(
    file: str, rows: Iterable[tuple[int, ProbeRecord]], layout: str, *, neighbor: bool
) -> tuple[tuple[Fact, ...], tuple[LeftOut, ...]]:
    """(The numbered probes as facts, those that became none)."""
    return sort_out(
        asked(
            file,
            number,
            row.query,
            row.answer,
            (row.neighbor or named_subject(row.query)) if neighbor else row.subject,
            row.type.strip() or "probe",
            layout,
            kind=None if neighbor else "person",
            extra={"level": row.level, "target": row.subject},
        )
        for number, row in rows
    )


def by_level(source: str | os.PathLike, rows: tuple[ProbeRecord, ...], levels: tuple[str, ...]) -> dict[str, list[int]]:
    """Row numbers of each level. Raises ValueError for a level that is not known."""
    for number, row in enumerate(rows):
        if row.level not in levels:
            raise ValueError(
                f"{source}, row {number}: field 'level' must be {' or '.join(levels)}, found {row.level!r}"
            )
    return {level: [i for i, row in enumerate(rows) if row.level == level] for level in levels}


_Any = TypeVar("_Any", bound=Record)


def _read(source: str | os.PathLike, config: str, schema: type[_Any], split: str = "test") -> tuple[_Any, ...]:
    """The rows of a hub configuration, or of its file in a folder."""
    name = config
    if Path(source).is_dir():
        try:
            find(source, config)
        except ValueError:
            name = FILES.get(config, config)
    return read_rows(source, name, schema, config=config, split=split)


def load_rwku(
    source: str | os.PathLike = "jinzhuoran/RWKU",
    subjects: Iterable[str] | None = None,
    *,
    mia: bool = False,
    utility: Iterable[str] = (),
    layout: str = LAYOUT,
) -> Rwku:
    """RWKU's targets, probes and sets.

    Args:
        source: a hub dataset, a folder, or one file of forget probes (its rows are told apart by `level`).
        subjects: the targets wanted; None for all.
        mia: read the membership sets.
        utility: which of `UTILITY` to read.
        layout: the prompt around a query of a fact; it holds `{question}` once.

    Raises:
        ValueError: an unknown subject or utility set, or a file or row that cannot be read (with file, row and field).
    """
    check_layout(layout)
    asked_for = tuple(dict.fromkeys(utility))
    if unknown := [name for name in asked_for if name not in UTILITY]:
        raise ValueError(f"RWKU has no utility set {unknown[0]!r}; choose from {', '.join(UTILITY)}")
    wanted = None if subjects is None else set(subjects)
    one = Path(source).is_file()
    if one and (mia or asked_for):
        raise ValueError(f"{source} is one file of probes; membership and utility sets need a folder or hub id")
    # (file, level) -> numbered rows
    found: dict[str, dict[str, list[tuple[int, ProbeRecord]]]] = {"forget": {}, "neighbor": {}}
    if one:
        rows = read_rows(source, None, ProbeRecord)
        found["forget"] = {k: [(i, rows[i]) for i in at] for k, at in by_level(source, rows, LEVEL_NUMBERS).items()}
        found["neighbor"] = {"1": [], "2": []}
    else:
        for kind, levels in (("forget", LEVEL_NUMBERS), ("neighbor", LEVEL_NUMBERS[:2])):
            for level in levels:
                found[kind][level] = list(enumerate(_read(source, f"{kind}_level{level}", ProbeRecord)))
    have = {row.subject for rows in found["forget"].values() for _, row in rows}
    if wanted is not None and (missing := sorted(wanted - have)):
        raise ValueError(f"{source} has no probes about {missing[0]!r}; its first targets are {sorted(have)[:3]}")

    def ours(rows: Iterable[Any], name: str = "subject") -> tuple[Any, ...]:
        return tuple(row for row in rows if wanted is None or getattr(row, name) in wanted)

    facts: dict[str, tuple[Fact, ...]] = {"forget": (), "neighbor": ()}
    left: list[LeftOut] = []
    kept: dict[str, dict[str, tuple[ProbeRecord, ...]]] = {"forget": {}, "neighbor": {}}
    for kind, levels in found.items():
        for level, rows in levels.items():
            mine = [(i, row) for i, row in rows if wanted is None or row.subject in wanted]
            kept[kind][level] = tuple(row for _, row in mine)
            if level != "3":
                name = Path(source).name if one else f"{kind}_level{level}"
                more, gone = probe_facts(name, mine, layout, neighbor=kind == "neighbor")
                facts[kind] += more
                left += gone
    return Rwku(
        targets=() if one else ours(_read(source, "forget_target", ForgetTarget, "train"), "target"),
        **kept,
        mia_forget=ours(_read(source, "mia_forget", Passage)) if mia else (),
        mia_retain=ours(_read(source, "mia_retain", Passage)) if mia else (),
        utility={name: ours(_read(source, f"utility_{name}", UTILITY[name])) for name in asked_for},
        forget_facts=facts["forget"],
        retain=RetainSet(neighbors=facts["neighbor"]),
        left_out=tuple(left),
    )
