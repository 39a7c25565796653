"""ORT: the same facts about 200 people asked in five forms, to see whether unlearning depends on the form.

The folder `Target` of the download (it is on no hub): one folder for each target, with forget_level1 (cloze, blank
`___`), forget_level2 (questions), forget_level3 (adversarial), forget_mcp (multiple choice), neighbor_level1,
neighbor_level2 and neighbor_mcp; or one target's folder; or one file of probes. Fields as RWKU's: `query`, `answer`,
`level` ("1" to "4"), `type`, `subject`. In forget_mcp the options stand in the query, each on its line after `A.` to
`D.`, the answer is the letter, and row i was made from row i of forget_level1. Fields and files are those that the
benchmark's code reads and writes; the download itself was not read.

The fifth form is spelling: the cloze, questions and adversarial probes with the answer one character a line, spaces
left out (`spelled`).
Source: Ye et al. 2025, arXiv 2506.07795; code MIT, the probes are RWKU's (CC BY 4.0) or made from them.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from pydantic import ValidationError

from mech_unlearn.benchmarks.rwku.data import ProbeRecord, by_level, probe_facts
from mech_unlearn.benchmarks.wmdp.data import MultipleChoice
from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.data.questions import LAYOUT, check_layout, forget_set
from mech_unlearn.data.source import LeftOut, find, read_rows

OrtForm = Literal["cloze", "question", "adversarial", "multiple choice"]
"""The forms that have rows of their own."""
ORT_FORMS: tuple[OrtForm, ...] = get_args(OrtForm)
Rows = dict[OrtForm, list[tuple[int, ProbeRecord]]]
"""Numbered rows of each form."""
_ENDS: Mapping[OrtForm, str] = dict(zip(ORT_FORMS, ("level1", "level2", "level3", "mcp"), strict=True))
_OPTION = re.compile(r"\n[ \t]*([A-Z])[.)][ \t]*")


def spelled(answer: str) -> str:
    """The answer one character a line, without spaces, each with a line break behind. Source: ORT's code."""
    return "".join(f"{character}\n" for character in answer.replace(" ", ""))


def choices(probe: ProbeRecord) -> MultipleChoice:
    """A multiple-choice probe with its options apart.

    Raises:
        ValueError: the options are not lettered A, B, ... from the first on, or the answer is not one of their letters.
    """
    stem, *rest = _OPTION.split(probe.query)
    letters, options = rest[::2], [option.strip() for option in rest[1::2]]
    if len(letters) < 2 or letters != [chr(ord("A") + i) for i in range(len(letters))] or not all(options):
        raise ValueError(f"the options are not lettered A, B, ..., each on its line: found {letters}")
    if probe.answer.strip() not in letters:
        raise ValueError(f"the answer {probe.answer[:20]!r} is none of the letters {', '.join(letters)}")
    try:
        return MultipleChoice(
            question=stem.strip(),
            choices=tuple(options),
            answer=letters.index(probe.answer.strip()),
            subject=probe.subject,
        )
    except ValidationError:
        raise ValueError("no question stands before the options") from None


@dataclass(frozen=True)
class Item:
    """One fact in the forms that share it: cloze, multiple choice and spelling."""

    cloze: ProbeRecord
    choice: MultipleChoice | None
    """None where the multiple-choice row is missing or its right option is not the cloze's answer."""

    @property
    def spelling(self) -> str:
        return spelled(self.cloze.answer)


@dataclass(frozen=True, kw_only=True)
class Ort:
    """ORT by form."""

    forget: Mapping[OrtForm, tuple[ProbeRecord, ...]]
    neighbor: Mapping[OrtForm, tuple[ProbeRecord, ...]]
    """Without adversarial probes."""
    items: tuple[Item, ...]
    """The clozes of `forget` in their order, each with its other forms."""
    forget_facts: tuple[Fact, ...]
    """Clozes and questions that name the target once. Clozes with a multiple-choice row have its wrong options as
    distractors."""
    retain: RetainSet
    """`neighbors`: such probes about neighbors."""
    left_out: tuple[LeftOut, ...]
    """Clozes and questions that became no fact, and multiple-choice rows that are in no item."""

    @property
    def sets(self) -> tuple[ForgetSet, RetainSet]:
        """Raises ValueError where no probe became a fact."""
        return forget_set(self.forget_facts, "forget_level1 and forget_level2"), self.retain


def _items(
    files: Mapping[OrtForm, str], clozes: list[tuple[int, ProbeRecord]], made: list[tuple[int, ProbeRecord]]
) -> tuple[list[Item], list[LeftOut]]:
    """The clozes with the multiple-choice row of the same place, where the right option is the cloze's answer."""
    left, found = [], {}
    for place, (number, row) in enumerate(made):
        try:
            choice = choices(row)
            if place >= len(clozes):
                raise ValueError(f"there is no cloze {place} in {files['cloze']}")
            if choice.correct.casefold() != clozes[place][1].answer.strip().casefold():
                raise ValueError(f"the right option is not the answer of cloze {place} in {files['cloze']}")
            found[place] = choice
        except ValueError as error:
            left.append(LeftOut(files["multiple choice"], number, row.query, str(error)))
    return [Item(row, found.get(place)) for place, (_, row) in enumerate(clozes)], left


def _with_distractors(fact: Fact, item: Item) -> Fact:
    wrong = () if item.choice is None else (w for w in dict.fromkeys(item.choice.wrong) if w != fact.object)
    return replace(fact, distractors=tuple(wrong))


def _folders(source: str | os.PathLike) -> list[Path]:
    """The folders of the targets: the one given, or those in it, by name."""
    root = Path(source)
    if not root.is_dir():
        raise ValueError(
            f"ORT source {str(source)!r} is neither a folder nor a file; it is on no hub: give the download"
        )

    def has_probes(folder: Path) -> bool:
        try:
            find(folder, "forget_level1")
        except ValueError:
            return False
        return True

    if has_probes(root):
        return [root]
    if not (inside := [p for p in sorted(root.iterdir()) if p.is_dir() and has_probes(p)]):
        raise ValueError(f"ORT folder {str(source)!r} holds no forget_level1 and no folder that does")
    return inside


@dataclass(frozen=True)
class _Part:
    """One target's probes, or one file's."""

    kind: Literal["forget", "neighbor"]
    files: Mapping[OrtForm, str]
    """What ids and `left_out` call the file of each form."""
    rows: Rows


def _parts(source: str | os.PathLike) -> list[_Part]:
    if Path(source).is_file():
        rows = read_rows(source, None, ProbeRecord)
        levels = by_level(source, rows, ("1", "2", "3", "4"))
        found: Rows = {form: [(i, rows[i]) for i in at] for form, at in zip(ORT_FORMS, levels.values(), strict=True)}
        return [_Part("forget", dict.fromkeys(ORT_FORMS, Path(source).name), found)]
    parts = []
    for folder in _folders(source):
        for kind in ("forget", "neighbor"):
            names: dict[OrtForm, str] = {
                form: f"{kind}_{end}" for form, end in _ENDS.items() if kind == "forget" or form != "adversarial"
            }
            found: Rows = {form: list(enumerate(read_rows(folder, name, ProbeRecord))) for form, name in names.items()}
            called: dict[OrtForm, str] = {form: f"{folder.name}/{name}" for form, name in names.items()}
            parts.append(_Part(kind, called, found))
    return parts


def load_ort(source: str | os.PathLike, subjects: Iterable[str] | None = None, *, layout: str = LAYOUT) -> Ort:
    """ORT's probes by form.

    Args:
        source: the folder `Target`, one target's folder, or one file of forget probes told apart by `level`.
        subjects: the targets wanted; None for all.
        layout: the prompt around a query of a fact; it holds `{question}` once.

    Raises:
        ValueError: no such folder, an unknown subject, or a file or row that cannot be read (with file, row and field).
    """
    check_layout(layout)
    parts = _parts(source)
    have = {row.subject for part in parts if part.kind == "forget" for rows in part.rows.values() for _, row in rows}
    wanted = have if subjects is None else set(subjects)
    if missing := sorted(wanted - have):
        raise ValueError(f"{source} has no probes about {missing[0]!r}; its first targets are {sorted(have)[:3]}")

    kept: dict[str, dict[OrtForm, tuple[ProbeRecord, ...]]] = {
        "forget": dict.fromkeys(ORT_FORMS, ()),
        "neighbor": {form: () for form in ORT_FORMS if form != "adversarial"},
    }
    facts: dict[str, list[Fact]] = {"forget": [], "neighbor": []}
    items: list[Item] = []
    left: list[LeftOut] = []
    for part in parts:
        everyone = part.kind == "neighbor" and subjects is None
        rows: Rows = {
            form: [(i, r) for i, r in all_ if everyone or r.subject in wanted] for form, all_ in part.rows.items()
        }
        for form, mine in rows.items():
            kept[part.kind][form] += tuple(row for _, row in mine)
        joined: dict[str, Item] = {}
        if part.kind == "forget":
            more, gone = _items(part.files, rows["cloze"], rows["multiple choice"])
            items, left = items + more, left + gone
            joined = {f"{part.files['cloze']}/{i}": x for (i, _), x in zip(rows["cloze"], more, strict=True)}
        for form in ("cloze", "question"):
            new, gone = probe_facts(part.files[form], rows[form], layout, neighbor=part.kind == "neighbor")
            facts[part.kind] += [_with_distractors(f, joined[f.id]) if f.id in joined else f for f in new]
            left += gone
    return Ort(
        **kept,
        items=tuple(items),
        forget_facts=tuple(facts["forget"]),
        retain=RetainSet(neighbors=tuple(facts["neighbor"])),
        left_out=tuple(left),
    )
