"""FaithUn: base questions about 200 well-known people, with paraphrased, multi-hop and same-answer questions.

FaithUn_Dataset.json in a folder, or the file itself: an object of entities (Wikidata ids), each with the categories
`hop1_unlearn` (base), `hop1_test` (paraphrased), `hop2_test` (multi-hop) and `same_object` (same answer). Each base
question founds a cluster; clusters are numbered through all entities in the file's order, 664 in all. Text files in the
folder splits/ hold the cluster numbers of the sets: forget_set_split.txt, retaining_set_split.txt, test_set_split.txt.

Verified from the published description: the file, categories, splits and that each question has answers and false
options. NOT verified (the file itself could not be read): the names of a question's fields, of which these are taken:
`question` or `query`; `answers` or `answer` (a string or a list); `false_options`, `false_answers`, `options` or
`distractors`; and how a category is laid out: a list, or an object by property, of questions or lists of questions. A
category with the base's length or keys goes to the clusters; any other is kept by entity in `unaligned`.

Source: Yang et al. 2025, arXiv 2502.19207; MIT. Paraphrases only test, so they are held out; multi-hop and same-answer
questions become no facts.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.data.questions import LAYOUT, Plain, asked, check_layout, forget_set
from mech_unlearn.data.source import LeftOut, Record, Verbatim, read_rows, read_text
from mech_unlearn.data.subjects import author_name, named_subject, slot

FILE = "FaithUn_Dataset"
STRATA: Mapping[str, str] = {"paraphrased": "hop1_test", "multi_hop": "hop2_test", "same_answer": "same_object"}
"""Stratum to category."""
SPLIT_FILES: Mapping[str, str] = {
    "forget": "forget_set_split.txt",
    "retain": "retaining_set_split.txt",
    "test": "test_set_split.txt",
}


def _several(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, str) else value


Strings = Annotated[tuple[Verbatim, ...], BeforeValidator(_several)]


class ClusterQuestion(Record):
    question: Verbatim = Field(validation_alias=AliasChoices("question", "query"))
    answers: Annotated[Strings, Field(min_length=1)] = Field(validation_alias=AliasChoices("answers", "answer"))
    """All right answers; the first is the object of the fact."""
    false_options: Strings = Field(
        default=(), validation_alias=AliasChoices("false_options", "false_answers", "options", "distractors")
    )


def _keyed(value: Any) -> Any:
    """A list, or an object, of questions or lists of questions, by key; the places of a list are its keys."""
    if isinstance(value, list):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, dict):
        return value
    return {key: tuple(item) if isinstance(item, list) else (item,) for key, item in value.items()}


def _single(value: dict[str, tuple[ClusterQuestion, ...]]) -> dict[str, tuple[ClusterQuestion, ...]]:
    for key, questions in value.items():
        if len(questions) != 1:
            raise ValueError(f"must have one base question under each key, found {len(questions)} under {key!r}")
    return value


Category = Annotated[dict[str, tuple[ClusterQuestion, ...]], BeforeValidator(_keyed)]


class EntityQuestions(Record):
    name: Plain | None = Field(default=None, validation_alias=AliasChoices("name", "label"))
    """Not verified; without it the longest name that the base questions share counts."""
    hop1_unlearn: Annotated[Category, AfterValidator(_single)]
    hop1_test: Category = Field(default_factory=dict)
    hop2_test: Category = Field(default_factory=dict)
    same_object: Category = Field(default_factory=dict)


class FaithUnFile(Record):
    model_config = Record.model_config | {"extra": "allow"}
    __pydantic_extra__: dict[str, EntityQuestions]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A base question and what hangs on it."""

    entity: str
    """The entity's id."""
    key: str
    """Place or property of the base question in its category."""
    base: ClusterQuestion
    paraphrased: tuple[ClusterQuestion, ...]
    multi_hop: tuple[ClusterQuestion, ...]
    """Questions whose reasoning passes through the base fact: faithful unlearning forgets them too."""
    same_answer: tuple[ClusterQuestion, ...]
    """Questions with the same answer about something else: faithful unlearning keeps them."""


@dataclass(frozen=True, kw_only=True)
class FaithUn:
    """FaithUn by cluster and stratum."""

    clusters: tuple[Cluster, ...]
    unaligned: Mapping[str, Mapping[str, tuple[ClusterQuestion, ...]]]
    """Entity -> stratum -> questions of categories that do not fit the base's clusters."""
    splits: Mapping[str, tuple[int, ...]]
    """`forget`, `retain`, `test`: numbers in `clusters`. Without split files all clusters are in `forget`."""
    forget_facts: tuple[Fact, ...]
    """Base questions of the forget set, paraphrases held out, false options as distractors."""
    retain: RetainSet
    """`neighbors`: base questions of the retaining set."""
    left_out: tuple[LeftOut, ...]
    """Base questions of these sets that became no fact, and paraphrases that are not held out; `row` is the cluster."""

    def split(self, name: str) -> tuple[Cluster, ...]:
        """The clusters of a set. Raises ValueError for a set that is not there."""
        if name not in self.splits:
            raise ValueError(f"no set {name!r}; there are {', '.join(self.splits)}")
        return tuple(self.clusters[i] for i in self.splits[name])

    @property
    def sets(self) -> tuple[ForgetSet, RetainSet]:
        """Raises ValueError where no base question became a fact."""
        return forget_set(self.forget_facts, "hop1_unlearn"), self.retain


def _numbers(file: Path, clusters: int) -> tuple[int, ...]:
    found: list[int] = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not (text := line.strip()):
            continue
        if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < clusters):
            raise ValueError(f"{file}:{number}: must be a cluster from 0 to {clusters - 1}, found {text[:40]!r}")
        if int(text) in found:
            raise ValueError(f"{file}:{number}: cluster {text} stands twice")
        found.append(int(text))
    if not found:
        raise ValueError(f"{file} holds no cluster numbers")
    return tuple(found)


def _fits(found: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether a category's keys are those of the base, or some of its properties."""
    return found.keys() == base.keys() or (found.keys() <= base.keys() and not any(key.isdigit() for key in found))


def _subject(entity: EntityQuestions, question: str) -> str | None:
    if entity.name and entity.name.strip():
        return entity.name.strip()
    try:
        return author_name([questions[0].question for questions in entity.hop1_unlearn.values()])
    except ValueError:
        return named_subject(question)


def _fact(number: int, cluster: Cluster, entity: EntityQuestions, layout: str) -> tuple[Fact | None, list[LeftOut]]:
    base, left, heldout = cluster.base, [], []
    subject = _subject(entity, base.question)
    relation = cluster.key if not cluster.key.isdigit() else "question"
    right = base.answers[0].strip()
    wrong = tuple(x for x in dict.fromkeys(map(str.strip, base.false_options)) if x not in map(str.strip, base.answers))
    extra = {"entity": cluster.entity, "answers": base.answers}
    fact = asked(FILE, number, base.question, right, subject, relation, layout, distractors=wrong, extra=extra)
    if isinstance(fact, LeftOut):
        return None, [fact]
    for phrasing in cluster.paraphrased:
        try:
            asks = layout.replace("{question}", slot(phrasing.question, subject))
            replace(fact, heldout=(asks,))
            heldout.append(asks)
        except ValueError as error:
            left.append(LeftOut(FILE, number, phrasing.question, f"held-out phrasing: {error}"))
    return replace(fact, heldout=tuple(dict.fromkeys(heldout))), left


def load_faithun(
    source: str | os.PathLike, *, splits: str | os.PathLike | None = None, layout: str = LAYOUT
) -> FaithUn:
    """FaithUn's clusters, and the base questions of its forget and retaining sets as facts.

    Args:
        source: a folder that holds FaithUn_Dataset.json, or the file.
        splits: folder of the split files; None for splits/ beside the data file, if it is there.
        layout: the prompt around a question of a fact; it holds `{question}` once.

    Raises:
        ValueError: a file or row that cannot be read (with file, row and field), an entity given twice, or a bad split.
    """
    check_layout(layout)
    root = Path(source)
    entities: dict[str, EntityQuestions] = {}
    where = root if root.is_file() else root / f"{FILE}.json"
    for row in read_rows(source, None if root.is_file() else FILE, FaithUnFile):
        if twice := entities.keys() & (row.__pydantic_extra__ or {}).keys():
            raise ValueError(f"{where}: entity {min(twice)!r} stands twice")
        entities |= row.__pydantic_extra__ or {}
    clusters: list[Cluster] = []
    owners: list[EntityQuestions] = []
    unaligned: dict[str, dict[str, tuple[ClusterQuestion, ...]]] = {}
    for name, entity in entities.items():
        given = {stratum: getattr(entity, category) for stratum, category in STRATA.items()}
        fit = {stratum: found for stratum, found in given.items() if _fits(found, entity.hop1_unlearn)}
        rest = {
            stratum: tuple(q for qs in given[stratum].values() for q in qs) for stratum in given.keys() - fit.keys()
        }
        if rest:
            unaligned[name] = {stratum: rest[stratum] for stratum in STRATA if stratum in rest}
        for key, questions in entity.hop1_unlearn.items():
            strata = {stratum: fit.get(stratum, {}).get(key, ()) for stratum in STRATA}
            clusters.append(Cluster(entity=name, key=key, base=questions[0], **strata))
            owners.append(entity)
    if not clusters:
        raise ValueError(f"{where}: no entity has a question in hop1_unlearn")

    beside = (root.parent if root.is_file() else root) / "splits"
    folder = Path(splits) if splits is not None else beside if beside.is_dir() else None
    numbers = (
        {"forget": tuple(range(len(clusters)))}
        if folder is None
        else {name: _numbers(folder / file, len(clusters)) for name, file in SPLIT_FILES.items()}
    )
    if both := set(numbers["forget"]) & set(numbers.get("retain", ())):
        raise ValueError(f"{folder}: cluster {min(both)} stands in the forget set and in the retaining set")
    facts: dict[str, list[Fact]] = {"forget": [], "retain": []}
    left: list[LeftOut] = []
    for name, kept in facts.items():
        for number in numbers.get(name, ()):
            fact, gone = _fact(number, clusters[number], owners[number], layout)
            kept += [] if fact is None else [fact]
            left += gone
    return FaithUn(
        clusters=tuple(clusters),
        unaligned=unaligned,
        splits=numbers,
        forget_facts=tuple(facts["forget"]),
        retain=RetainSet(neighbors=tuple(facts["retain"])),
        left_out=tuple(left),
    )
