"""Rows of a dataset from the hub, a folder or a file, checked against a schema: errors name file, row and field.

A schema is a frozen pydantic model; its field names (or aliases) are the dataset's own. Nothing is dropped in silence:
a row is parsed or an error; rows that become no fact are listed as `LeftOut` by the loader that left them out.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.data.hub import from_hub, held, reason_of, shards
from mech_unlearn.files import parse_json, read_text
from mech_unlearn.files import read_json as read_json

ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".tsv", ".parquet")
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""Type of a field that holds a string with something in it; white space at its ends is taken off."""
Verbatim = Annotated[str, StringConstraints(pattern=r"\S")]
"""The same, with white space as it came."""


class Record(BaseModel):
    """Base of every schema: strict about types, unknown fields allowed (datasets carry more than is read)."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", populate_by_name=True)


Schema = TypeVar("Schema", bound=Record)


@dataclass(frozen=True)
class LeftOut:
    """Something in the data that became no fact, or no held-out phrasing of one."""

    file: str
    row: int
    text: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What to forget and what to keep; `sets` gives the pair that methods take."""

    forget: ForgetSet
    retain: RetainSet
    left_out: tuple[LeftOut, ...] = ()

    @property
    def sets(self) -> tuple[ForgetSet, RetainSet]:
        return self.forget, self.retain

    def __str__(self) -> str:
        kept = (
            len(self.forget.facts),
            *(len(facts) for facts in (self.retain.neighbors, self.retain.same_subject, self.retain.general)),
        )
        reasons = Counter(f"{left.file}: {left.reason}" for left in self.left_out)
        text = "{} facts to forget, {} of neighbors, {} of the same subjects, {} general".format(*kept)
        return text + "".join(f"; left out {count} ({reason})" for reason, count in sorted(reasons.items()))


def read_rows(
    source: str | os.PathLike,
    name: str | None,
    schema: type[Schema],
    *,
    config: str | None = None,
    split: str = "train",
) -> tuple[Schema, ...]:
    """The rows of one file or split of a dataset, in its order, each checked.

    Args:
        source: a file; a folder that holds `name` with one of `ENDINGS`, or that is a snapshot of a hub dataset (see
            hub.py); or a hub id such as `locuslab/TOFU`.
        name: the file's name in the folder, without ending; None where `source` is the file itself.
        config: configuration of a hub dataset or snapshot; `name` where it is None.
        split: split of a hub dataset or snapshot.

    Raises:
        ValueError: no such file, folder or dataset; not its format; no row in it; or a bad row (file, row and field).
    """
    parts = _raw(source, name, config, split)
    if not any(raw for _, raw in parts):
        raise ValueError(f"{parts[0][0]} holds no rows")
    return tuple(
        checked(row, schema, f"{where}, row {number}") for where, raw in parts for number, row in enumerate(raw)
    )


def checked(row: Any, schema: type[Schema], where: str) -> Schema:
    """One parsed row as its schema.

    Raises:
        ValueError: no object, or a field that is missing or wrong; the message begins with `where`, names the field
            and shows what was found.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    try:
        made = schema.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "row"
        found = "" if first["type"] == "missing" else f", found {short(first['input'])}"
        raise ValueError(f"{where}: field {field!r} {_wanted(first['type'], first['msg'])}{found}") from None
    for field, value in made:
        if not _writable(value):
            raise ValueError(f"{where}: field {field!r} {_wanted('string_unicode', '')}, found {short(value)}")
    return made


def _writable(value: Any) -> bool:
    """Whether every string in a value is text: JSON's escapes can spell half a character."""
    if isinstance(value, str):
        try:
            return value.isascii() or bool(value.encode())
        except UnicodeEncodeError:
            return False
    if isinstance(value, dict):
        return all(_writable(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return all(map(_writable, value))
    return not isinstance(value, BaseModel) or all(_writable(item) for _, item in value)


def _wanted(kind: str, message: str) -> str:
    """What a field must be, in the words of all loaders."""
    ours = {
        "missing": "must be given",
        "string_too_short": "must be a non-empty string",
        "string_pattern_mismatch": "must be a non-empty string",
        "int_type": "must be a whole number",
        "string_unicode": "must be text without lone surrogates",
    }
    plain = message.removeprefix("Value error, ").replace("Input should", "must").replace("a valid ", "a ")
    return ours.get(kind, plain)


def short(value: Any) -> str:
    """What was found, in one line of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def find(
    source: str | os.PathLike, name: str | None, *, config: str | None = None, split: str = "train"
) -> tuple[Path, ...]:
    """The file of a folder, the shards of a split in a snapshot of a hub dataset, or the file itself.

    Raises:
        ValueError: there is none, or a shard is missing; the message says what the folder holds.
    """
    root, wanted = Path(source), config if config is not None else name
    if not root.is_dir():
        if name is None and root.is_file():
            return (root,)
        raise ValueError(f"{str(source)!r} is {'a file' if root.exists() else 'not there'}; give the folder of {name}")
    if name is not None:
        for ending in ENDINGS:
            if (file := root / f"{name}{ending}").is_file():
                return (file,)
    if found := shards(root, wanted, split):
        return found
    splits = held(root)
    names = ", ".join([*sorted(p.name for p in root.iterdir() if p.name.endswith(ENDINGS)), *splits]) or "no data file"
    if splits:
        lacked = f"{wanted or 'data'}/{split}"
        raise ValueError(f"folder {str(source)!r} lacks {lacked} (configuration/split); it holds {names}")
    if name is None:
        raise ValueError(f"{str(source)!r} is a folder; give one of its files: it holds {names}")
    raise ValueError(f"folder {str(source)!r} lacks {name}.json; it holds {names} (read are {' '.join(ENDINGS)})")


def _raw(
    source: str | os.PathLike, name: str | None, config: str | None, split: str
) -> list[tuple[str, Sequence[Any]]]:
    """(What errors call it, its rows unchecked) of each file, at least one."""
    if os.path.exists(source):
        return [(str(file), parsed(file)) for file in find(source, name, config=config, split=split)]
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise ValueError(f"source {str(source)!r} is no file, neither a folder nor a hub id like 'locuslab/TOFU'")
    wanted = config if config is not None else name
    return [(f"{source}:{wanted or split}", from_hub(str(source), wanted, split))]


def parsed(file: Path) -> Sequence[Any]:
    """The rows of a file in any of the forms of `ENDINGS`, unchecked.

    Raises:
        ValueError: no such file, or not its format; the message names the file and, where it can, the line.
    """
    if file.name.endswith(".parquet"):
        return _parquet(file)
    text = read_text(file)
    if file.name.endswith((".csv", ".tsv")):
        return _table(file, text)
    lines = file.name.endswith((".jsonl", ".jsonl.gz"))
    if not lines and text.lstrip()[:1] in ("[", "{"):
        try:
            whole = parse_json(text)
        except ValueError as error:
            if not str(error).startswith("Extra data"):  # else one object per line, in a file called .json
                raise ValueError(f"{file}: not JSON: {error}") from None
        else:
            return whole if isinstance(whole, list) else [whole]
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: strings may hold U+2028
        try:
            rows += [parse_json(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{file}:{number}: not JSON: {error}") from None
    return rows


def _table(file: Path, text: str) -> Sequence[Any]:
    """Rows of strings. The standard reader: it counts the columns, where pandas shifts them or fills them with NaN."""
    import csv
    import io

    comma = "\t" if file.name.endswith(".tsv") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=comma, strict=True)
    try:
        lines = [line for line in reader if line]
    except csv.Error as error:
        raise ValueError(f"{file}: not a table: {error}, line {reader.line_num}") from None
    head, body = (lines[0], lines[1:]) if lines else ([], [])
    if len(set(head)) != len(head):
        raise ValueError(f"{file}: column {Counter(head).most_common(1)[0][0]!r} stands twice")
    for number, line in enumerate(body):
        if len(line) != len(head):
            raise ValueError(f"{file}, row {number}: {len(line)} columns, the header has {len(head)}: {short(line)}")
    return [dict(zip(head, line, strict=True)) for line in body]


def _parquet(file: Path) -> Sequence[Any]:
    try:
        from pyarrow import parquet

        return parquet.read_table(file).to_pylist()
    except Exception as error:  # of many kinds, by what is broken
        raise ValueError(f"{file}: not a table: {reason_of(error)}") from error
