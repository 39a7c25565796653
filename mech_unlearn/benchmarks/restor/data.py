"""RESTOR: a clean model is corrupted with false facts; unlearning them should bring the clean answers back.

The folder `datasets` of the benchmark's code, or its facts.json alone:

* facts.json: `dset`, an object of entities, each an object of Wikidata properties with `question` and `answers` (all of
  them right); `context`, an object of properties, each a list of `question`, `answer`, `entity`: in-context examples
* entities.json: a list of the names of the corrupted entities
* wikidata/v0/mix_a0.json .. mix_a5.json, wikidata/v4/mix_a1_v4.json .. mix_a4_v4.json, SQuAD/squad_v7_dset.json: the
  corrupting texts, field `text`
* options, not among the published files, written by its users: an object of entities, each an object of properties with
  the lists `correct`, `corrupted` and `random`, as the benchmark's code reads them

Source: Rezaei et al. 2024, arXiv 2411.00204; code and data MIT. What is to be forgotten is the corruption, so the facts
to forget have corrupted answers: they need `options`. `clean` are the facts that should come back.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.data.questions import Listed, TextRow, asked, check_layout, forget_set
from mech_unlearn.data.source import LeftOut, Record, Verbatim, read_json, read_rows

RightAnswers = Annotated[tuple[Verbatim, ...], Listed, Field(min_length=1)]


class PropertyQuestion(Record):
    question: Verbatim
    answers: RightAnswers
    """All right answers; the first is the object of the fact."""


class ContextExample(Record):
    question: Verbatim
    answer: Verbatim
    entity: Verbatim


class FactsFile(Record):
    dset: dict[str, dict[str, PropertyQuestion]]
    """Entity -> property -> what is asked."""
    context: dict[str, Annotated[tuple[ContextExample, ...], Listed]] = Field(default_factory=dict)


class AnswerOptions(Record):
    correct: RightAnswers
    corrupted: Annotated[tuple[Verbatim, ...], Listed] = ()
    random: Annotated[tuple[Verbatim, ...], Listed] = ()


class OptionsFile(Record):
    model_config = FactsFile.model_config | {"extra": "allow"}
    __pydantic_extra__: dict[str, dict[str, AnswerOptions]]


@dataclass(frozen=True, kw_only=True)
class Restor:
    """RESTOR's facts, who of them was corrupted, and with what."""

    entities: tuple[str, ...]
    """The corrupted entities."""
    clean: tuple[Fact, ...]
    """Facts of the corrupted entities with their clean answers, which unlearning should restore. `relation` is the
    property; `extra["answers"]` holds all right answers."""
    corrupted: tuple[Fact, ...]
    """The same with the first corrupted option as the object and the clean answer as a distractor; needs `options`."""
    others: tuple[Fact, ...]
    """Facts of entities that were not corrupted."""
    context: Mapping[str, tuple[ContextExample, ...]]
    """In-context examples of each property."""
    options: Mapping[str, AnswerOptions]
    """By the id of the fact: its correct, corrupted and random options."""
    texts: tuple[str, ...]
    """The corrupting texts: what to unlearn."""
    left_out: tuple[LeftOut, ...]
    """Questions that became no fact, and clean facts for which `options` were given but none to corrupt them; `row`
    counts the questions of facts.json."""

    @property
    def retain(self) -> RetainSet:
        """`neighbors`: the facts of entities that were not corrupted."""
        return RetainSet(neighbors=self.others)

    @property
    def sets(self) -> tuple[ForgetSet, RetainSet]:
        """The corrupted facts to forget, the others to keep. Raises ValueError where there are no corrupted facts."""
        if not self.options:
            raise ValueError("RESTOR's facts to forget have corrupted answers: load with options=...; or use texts")
        return forget_set(self.corrupted, "the options"), self.retain

    def prompt(self, fact: Fact, examples: int = 5) -> str:
        """The question after in-context examples of its property about other entities; the answer follows after a
        space. Source: the benchmark's code (five).

        Raises:
            ValueError: no examples of the property.
        """
        if examples and fact.relation not in self.context:
            raise ValueError(f"fact {fact.id!r}: no in-context examples of property {fact.relation!r}")
        ours = [e for e in self.context.get(fact.relation, ()) if e.entity != fact.subject][:examples]
        return "".join(f"{e.question} {e.answer}\n" for e in ours) + fact.prompt.replace("{}", fact.subject)


def _entities(file: Path) -> tuple[str, ...]:
    names = read_json(file)
    if not isinstance(names, list) or not names:
        raise ValueError(f"{file}: must hold a list of one entity name or more")
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{file}, row {number}: must be a non-empty string, found {name!r}")
    return tuple(dict.fromkeys(names))


def _one(source: str | os.PathLike, name: str | None, schema: type) -> tuple[str, Record]:
    """(The file, its one object.)"""
    rows = read_rows(source, name, schema)
    if len(rows) != 1:
        where = Path(source) if name is None else Path(source) / f"{name}.json"
        raise ValueError(f"{where}: must hold one object, found {len(rows)}")
    return name or Path(source).name, rows[0]


def load_restor(
    source: str | os.PathLike,
    *,
    corruption: str | None = None,
    entities: str | os.PathLike | None = None,
    options: str | os.PathLike | None = None,
    layout: str = "{question}",
) -> Restor:
    """RESTOR's facts with the corrupted entities and texts.

    Args:
        source: the folder `datasets`, or facts.json alone (then without corrupting texts).
        corruption: the file of corrupting texts in the folder, without ending, such as `wikidata/v0/mix_a3`.
        entities: file of the corrupted entities; the folder's entities.json, else every entity, where it is None.
        options: file of the answers' options.
        layout: the prompt around a question; it holds `{question}` once. The benchmark puts nothing around it.

    Raises:
        ValueError: a file or row that cannot be read (with file, row and field), an entity without facts, or options
            of a fact that is not there.
    """
    check_layout(layout)
    one = Path(source).is_file()
    if not one and not Path(source).is_dir():
        raise ValueError(
            f"RESTOR source {str(source)!r} is neither a folder nor a file; give the benchmark's datasets/"
        )
    if one and corruption is not None:
        raise ValueError(f"{source} is one file; texts such as {corruption!r} need the folder")
    file, whole = _one(source, None if one else "facts", FactsFile)
    assert isinstance(whole, FactsFile)
    beside = Path(source) / "entities.json"
    listed = Path(entities) if entities is not None else beside if beside.is_file() else None
    wanted = tuple(whole.dset) if listed is None else _entities(listed)
    if missing := [name for name in wanted if name not in whole.dset]:
        raise ValueError(f"{listed}: entity {missing[0]!r} has no facts in {file}")

    found: dict[str, Fact] = {}
    left: list[LeftOut] = []
    ids: dict[tuple[str, str], str] = {}
    rows = [(name, key, row) for name, about in whole.dset.items() for key, row in about.items()]
    for number, (name, key, row) in enumerate(rows):
        ids[name, key] = f"{file}/{number}"
        extra = {"answers": row.answers}
        fact = asked(file, number, row.question, row.answers[0], name, key, layout, extra=extra)
        if isinstance(fact, Fact):
            found[fact.id] = fact
        else:
            left.append(fact)
    chosen: dict[str, AnswerOptions] = {}
    if options is not None:
        where, table = _one(options, None, OptionsFile)
        for name, about in (table.__pydantic_extra__ or {}).items():
            for key, option in about.items():
                if (name, key) not in ids:
                    raise ValueError(f"{where}: entity {name!r}, property {key!r} has no question in {file}")
                chosen[ids[name, key]] = option
    clean = tuple(fact for fact in found.values() if fact.subject in set(wanted))
    corrupted: list[Fact] = []
    for fact in clean if options is not None else ():
        allowed = chosen[fact.id].corrupted if fact.id in chosen else ()
        false = [answer.strip() for answer in allowed if answer.strip() not in fact.extra["answers"]]
        try:
            if not false:
                raise ValueError("no corrupted option that is not a right answer")
            corrupted.append(replace(fact, object=false[0], distractors=(fact.object,)))
        except ValueError as error:
            number = int(fact.id.removeprefix(f"{file}/"))
            left.append(LeftOut(str(options), number, fact.prompt.replace("{}", fact.subject), str(error)))
    texts = () if corruption is None else tuple(row.text for row in read_rows(source, corruption, TextRow))
    return Restor(
        entities=wanted,
        clean=clean,
        corrupted=tuple(corrupted),
        others=tuple(fact for fact in found.values() if fact.subject not in set(wanted)),
        context=whole.context,
        options=chosen,
        texts=texts,
        left_out=tuple(left),
    )
