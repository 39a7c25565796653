"""The relations data of `evandez/relations`: (subject, object) pairs with prompts for many kinds of relation.

A folder of JSON files, one relation each: `name`, `prompt_templates` (to stand after examples), `prompt_templates_zs`
(to stand alone), `properties` (`relation_type`, `domain_name`, `range_name`, `symmetric`) and `samples` of `subject`
and `object`. Source: Hernandez et al. 2023, arXiv 2308.09124 (MIT).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from mech_unlearn.core import Fact
from mech_unlearn.data.sets import (
    DISTRACTORS,
    Found,
    Phrasings,
    choose_subjects,
    divide,
    phrasings,
    why,
    with_distractors,
)
from mech_unlearn.data.source import LeftOut, Loaded, Record, Text, checked, read_json

Shots = Literal["zero", "few"]


class Properties(Record):
    """What a relation joins."""

    relation_type: Text
    domain_name: Text
    range_name: Text
    symmetric: bool = False


class Sample(Record):
    """One pair."""

    subject: Text
    object: Text


class RelationFile(Record):
    """One file: a relation and its pairs."""

    name: Text
    prompt_templates: list[Text]
    prompt_templates_zs: list[Text] = Field(default_factory=list)
    properties: Properties
    samples: list[Sample]


def read_relation(file: Path) -> RelationFile:
    """One relation.

    Raises:
        ValueError: no such file, not JSON, or a field that is missing or wrong (file and field; pairs by number).
    """
    return checked(read_json(file), RelationFile, str(file))


def load_relations(
    folder: str | os.PathLike,
    *,
    relations: Sequence[str] | None = None,
    subjects: int | Sequence[str] = 20,
    kept_relations: Sequence[str] | None = None,
    shots: Shots = "zero",
    heldout: int = 1,
    distractors: int = DISTRACTORS,
    seed: int = 0,
) -> Loaded:
    """The pairs as facts to forget and facts to keep; `Fact.kind` is the relation's `domain_name`.

    Args:
        folder: holds the files, itself or in folders (as published, by type of relation).
        relations: what is forgotten about the subjects, by name; None for all.
        subjects: names, or how many to draw.
        kept_relations: further relations to read; None for all of them, `()` for none.
        shots: which templates come first: those to stand alone (`zero`) or those to stand after examples (`few`). The
            others follow as paraphrases.
        heldout: so many templates of each relation are held out, the last ones; none where there is only one.
        distractors: wrong objects per fact, drawn from the relation's.

    Raises:
        ValueError: no file, a file that cannot be read, an unknown relation or subject, or no fact left to forget.
    """
    if shots not in ("zero", "few"):
        raise ValueError(f"unknown shots {shots!r}; choose from zero, few")
    files = sorted(Path(folder).rglob("*.json"))
    if not files:
        raise ValueError(f"folder {os.fspath(folder)!r} holds no .json file of a relation")
    read = {str(file.relative_to(folder)): read_relation(file) for file in files}
    names = {entry.name: file for file, entry in read.items()}
    for file, entry in read.items():
        if names[entry.name] != file:
            raise ValueError(f"relation {entry.name!r} stands in {names[entry.name]} and in {file}")
    for name in (*(relations or ()), *(kept_relations or ())):
        if name not in names:
            raise ValueError(f"unknown relation {name!r}; choose from {', '.join(sorted(names))}")
    wanted = names.keys() if relations is None or kept_relations is None else {*relations, *kept_relations}
    found, left_out = [], []
    for file, entry in read.items():
        if entry.name not in wanted:
            continue
        both = (entry.prompt_templates_zs, entry.prompt_templates)
        try:
            way = phrasings((template for part in both[:: 1 if shots == "zero" else -1] for template in part), heldout)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        for number, pair in enumerate(entry.samples):
            try:
                found.append(Found(_fact(entry, pair, f"{file.removesuffix('.json')}/{number}", way), file, number))
            except ValueError as error:
                left_out.append(LeftOut(file, number, f"{pair.subject}: {pair.object}", why(error)))
    chosen = choose_subjects(found, subjects, relations, seed)
    return divide(with_distractors(found, distractors, seed), chosen, relations, left_out)


def _fact(entry: RelationFile, pair: Sample, name: str, way: Phrasings) -> Fact:
    prompt, paraphrases, held = way
    return Fact(
        id=name,
        subject=pair.subject,
        relation=entry.name,
        object=pair.object,
        prompt=prompt,
        paraphrases=paraphrases,
        heldout=held,
        kind=entry.properties.domain_name,
        group=pair.subject,
        extra=entry.properties.model_dump(),
    )
