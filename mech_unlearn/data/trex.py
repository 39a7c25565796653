"""T-REx through LAMA: Wikidata triples, ParaRel's phrasings of their relations, and the sentences that state them.

A folder with `facts.jsonl[.gz]`, whose rows have `relation` (Wikidata property), `subject`, `subject_uri`, `object`,
`object_uri` and `evidence` (sentences), and `relations.json`, an object of one entry per property with `label`, `type`
(such as `N-1`) and `patterns` (`[X]` subject, `[Y]` object). Or LAMA's own folder: `TREx/P*.jsonl` (`predicate_id`,
`sub_label`, `sub_uri`, `obj_label`, `obj_uri`, `evidences` of `masked_sentence` and `obj_surface`) and
`relations.jsonl` (`relation`, `label`, `template`, `type`), which has one pattern per relation. Sources: T-REx, Elsahar
et al. 2018 (CC BY-SA 4.0); LAMA, arXiv 1909.01066 (CC BY-NC 4.0); ParaRel, arXiv 2102.01017 (MIT).

Only patterns that end in the object, but for closing punctuation, can be prompts; relations without one become no facts
and are listed. A pattern that ends in `a` or `an` is used for the objects it fits, by their first letter.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

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
    without_names,
)
from mech_unlearn.data.source import LeftOut, Loaded, Record, Text, checked, read_json, read_rows


class TrexRow(Record):
    """One triple, as `facts.jsonl` has it."""

    relation: Text
    subject: Text
    object: Text
    subject_uri: str | None = None
    object_uri: str | None = None
    evidence: list[str] = Field(default_factory=list)


class TrexRelation(Record):
    """One property, as `relations.json` has it."""

    label: Text
    type: str | None = None
    patterns: list[str]


class LamaEvidence(Record):
    """A sentence of LAMA."""

    masked_sentence: str
    obj_surface: str


class LamaRow(Record):
    """One triple, as LAMA has it."""

    predicate_id: Text
    sub_label: Text
    obj_label: Text
    sub_uri: str | None = None
    obj_uri: str | None = None
    evidences: list[LamaEvidence] = Field(default_factory=list)

    def plain(self) -> TrexRow:
        """The same under the names of `facts.jsonl`, the object put back into the sentences."""
        return TrexRow(
            relation=self.predicate_id,
            subject=self.sub_label,
            object=self.obj_label,
            subject_uri=self.sub_uri,
            object_uri=self.obj_uri,
            evidence=[item.masked_sentence.replace("[MASK]", item.obj_surface) for item in self.evidences],
        )


class LamaRelation(Record):
    """One property, as LAMA has it."""

    relation: Text
    label: Text
    template: str
    type: str | None = None


def _read(folder: Path) -> tuple[dict[str, TrexRelation], list[tuple[str, int, TrexRow]]]:
    """(Relations by id, rows with their file and number.)"""
    if not (folder / "TREx").is_dir():
        rows = enumerate(read_rows(folder, "facts", TrexRow))
        return read_relations(folder / "relations.json"), [("facts", number, row) for number, row in rows]
    known = {
        row.relation: TrexRelation(label=row.label, type=row.type, patterns=[row.template])
        for row in read_rows(folder, "relations", LamaRelation)
    }
    files = sorted((folder / "TREx").glob("*.jsonl"))
    lama = [(f"TREx/{f.stem}", n, row.plain()) for f in files for n, row in enumerate(read_rows(f, None, LamaRow))]
    return known, lama


def read_relations(file: Path) -> dict[str, TrexRelation]:
    """The properties of a relations file, by their Wikidata id.

    Raises:
        ValueError: no such file, not JSON, or a bad entry (with its id and field).
    """
    entries = read_json(file)
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{file}: expected an object of one relation or more, found {type(entries).__name__}")
    return {key: checked(entry, TrexRelation, f"{file}, relation {key!r}") for key, entry in entries.items()}


def prompt_of(pattern: str) -> str | None:
    """The template of a pattern that ends in its object, with `{}` for the subject; None for any other."""
    text = pattern.rstrip(" .,;:!")
    if pattern.count("[X]") != 1 or pattern.count("[Y]") != 1 or not text.endswith("[Y]") or "{}" in pattern:
        return None
    return text.removesuffix("[Y]").rstrip().replace("[X]", "{}")


def fits(template: str, vowel: bool) -> bool:
    """Whether the article at the end of a template, if there is one, goes before a name that begins with a vowel, or
    with none."""
    article = template.rsplit(" ", 1)[-1]
    return article not in ("a", "an") or vowel == (article == "an")


def load_trex(
    folder: str | os.PathLike,
    *,
    relations: Sequence[str] | None = None,
    subjects: int | Sequence[str] = 20,
    kept_relations: Sequence[str] | None = None,
    patterns: Mapping[str, Sequence[str]] | None = None,
    heldout: int = 1,
    distractors: int = DISTRACTORS,
    seed: int = 0,
) -> Loaded:
    """T-REx's triples as facts to forget and facts to keep.

    `retain.texts` holds the evidence of the kept facts, but no sentence that names a forgotten subject.

    Args:
        folder: holds `facts.jsonl` or `facts.jsonl.gz`, and `relations.json`; or is LAMA's own.
        relations: what is forgotten about the subjects, as ids (`P19`) or labels (`place of birth`); None for all.
        subjects: names, or how many to draw; two entities of one name count as one.
        kept_relations: further relations to read; None for all of them, `()` for none.
        patterns: further patterns by id, for relations that have none which ends in its object.
        heldout: so many phrasings of each relation are held out, the last ones.
        distractors: wrong objects per fact, drawn from the relation's.

    Raises:
        ValueError: a file or row that cannot be read (file, row, field), an unknown relation or subject, or no fact
            left to forget.
    """
    known, rows = _read(Path(folder))
    count = Counter(entry.label for entry in known.values())
    labels = {key: entry.label if count[entry.label] == 1 else f"{entry.label} ({key})" for key, entry in known.items()}
    gone = None if relations is None else [_label(name, labels) for name in relations]
    wanted = None if gone is None or kept_relations is None else {*gone, *(_label(k, labels) for k in kept_relations)}
    more = patterns or {}
    for key in more:
        _label(key, labels)
    ways = {}
    for key, entry in known.items():
        templates = [t for t in map(prompt_of, (*entry.patterns, *more.get(key, ()))) if t is not None]
        for vowel in (True, False):
            fitting = [template for template in templates if fits(template, vowel)]
            ways[key, vowel] = phrasings(fitting, heldout) if fitting else None
    found, left_out = [], []
    for file, number, row in rows:
        if wanted is not None and labels.get(row.relation) not in wanted:
            continue
        try:
            if row.relation not in known:
                raise ValueError(f"relation {row.relation!r} is not in relations.json")
            way = ways[row.relation, row.object[0].lower() in "aeiou"]
            found.append(Found(_fact(row, f"{file}/{number}", labels[row.relation], way), file, number))
        except ValueError as error:
            left_out.append(LeftOut(file, number, f"{row.subject}: {row.object}", why(error)))
    chosen = choose_subjects(found, subjects, gone, seed)
    loaded = divide(with_distractors(found, distractors, seed), chosen, gone, left_out)
    sentences = (sentence for fact in loaded.retain.facts for sentence in fact.extra["evidence"])
    return replace(loaded, retain=replace(loaded.retain, texts=without_names(sentences, chosen)))


def _label(name: str, labels: Mapping[str, str]) -> str:
    if name not in labels and name not in labels.values():
        raise ValueError(f"unknown relation {name!r}; choose from {', '.join(f'{k} ({v})' for k, v in labels.items())}")
    return labels.get(name, name)


def _fact(row: TrexRow, name: str, label: str, way: Phrasings | None) -> Fact:
    if way is None:
        raise ValueError(f"relation {row.relation} ({label}) has no pattern that ends in its object")
    prompt, paraphrases, held = way
    return Fact(
        id=name,
        subject=row.subject,
        relation=label,
        object=row.object,
        prompt=prompt,
        paraphrases=paraphrases,
        heldout=held,
        group=row.subject,
        extra={
            "relation_id": row.relation,
            "subject_uri": row.subject_uri,
            "object_uri": row.object_uri,
            "evidence": tuple(row.evidence),
        },
    )
