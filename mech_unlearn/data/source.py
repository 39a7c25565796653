"""Rows of a dataset from the hub, a folder or a file, checked against a schema: errors name file, row and field.

A schema is a frozen pydantic model; its field names (or aliases) are the dataset's own. Nothing is dropped in silence:
a row is parsed or an error; rows that become no fact are listed as `LeftOut` by the loader that left them out.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mech_unlearn.core import ForgetSet, RetainSet

ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".tsv", ".parquet")


class Row(BaseModel):
    """Base of every schema: strict about types, unknown fields allowed (datasets carry more than is read)."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", populate_by_name=True)


Schema = TypeVar("Schema", bound=Row)


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
    """The rows of one file of a dataset, in its order, each checked.

    Args:
        source: a file, a folder that holds `name` with one of `ENDINGS`, or a hub id such as `locuslab/TOFU`.
        name: the file's name in the folder, without ending; None where `source` is the file itself.
        config: configuration of a hub dataset; `name` where it is None.
        split: split of a hub dataset.

    Raises:
        ValueError: no such file, folder or dataset; not its format; no row in it; or a bad row (file, row and field).
    """
    where, raw = _raw(source, name, config, split)
    rows = []
    for number, row in enumerate(raw):
        if not isinstance(row, dict):
            raise ValueError(f"{where}, row {number}: expected an object, found {type(row).__name__}")
        try:
            rows.append(schema.model_validate(row))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "row"
            found = "" if first["type"] == "missing" else f", found {str(first['input'])[:80]!r}"
            raise ValueError(f"{where}, row {number}: field {field!r}: {first['msg']}{found}") from None
    if not rows:
        raise ValueError(f"{where} holds no rows")
    return tuple(rows)


def find(source: str | os.PathLike, name: str | None) -> Path:
    """The file of a folder, or the file itself.

    Raises:
        ValueError: there is none; the message says what the folder holds.
    """
    root = Path(source)
    if root.is_file() and name is None:
        return root
    if name is not None:
        for ending in ENDINGS:
            if (file := root / f"{name}{ending}").is_file():
                return file
    held = ", ".join(sorted(p.name for p in root.iterdir() if p.name.endswith(ENDINGS))) or "no data file"
    raise ValueError(f"folder {str(source)!r} lacks {name} ({' or '.join(ENDINGS)}); it holds {held}")


def _raw(source: str | os.PathLike, name: str | None, config: str | None, split: str) -> tuple[str, Sequence[Any]]:
    """(What errors call it, its rows unchecked.)"""
    if Path(source).exists():
        file = find(source, name)
        return str(file), _parsed(file)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise ValueError(f"source {str(source)!r} is no file, no folder and no hub id like 'locuslab/TOFU'")
    wanted = config if config is not None else name
    return f"{source}:{wanted or split}", _from_hub(str(source), wanted, split)


def _parsed(file: Path) -> Sequence[Any]:
    if file.name.endswith((".csv", ".tsv", ".parquet")):
        return _table(file)
    text = read_text(file)
    if not file.name.endswith((".jsonl", ".jsonl.gz")) and text.lstrip()[:1] in ("[", "{"):
        try:
            whole = json.loads(text)
        except ValueError as error:
            if text.lstrip().startswith("["):
                raise ValueError(f"{file}: not JSON: {error}") from error
        else:
            return whole if isinstance(whole, list) else [whole]
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: strings may hold U+2028
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{file}:{number}: not JSON: {error}") from error
    return rows


def read_text(file: Path) -> str:
    """The text of a file, unpacked where its name ends in .gz.

    Raises:
        ValueError: not UTF-8, or not gzip.
    """
    import gzip
    import zlib

    try:
        data = file.read_bytes()
        return (gzip.decompress(data) if file.name.endswith(".gz") else data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error


def _table(file: Path) -> Sequence[Any]:
    import pandas as pd

    try:
        if file.name.endswith(".parquet"):
            frame = pd.read_parquet(file)
        else:
            frame = pd.read_csv(file, sep="\t" if file.name.endswith(".tsv") else ",", dtype=str, keep_default_na=False)
    except Exception as error:  # of many kinds, by format
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: not a table: {reason}") from error
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _from_hub(source: str, config: str | None, split: str) -> Sequence[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"reading {source!r} from the hub needs the package datasets: pip install datasets") from error
    try:
        return list(load_dataset(source, config, split=split))
    except Exception as error:  # of many kinds: network, unknown id, unknown configuration
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"no folder {source!r}, and {config!r} of the hub dataset cannot be read: {reason}") from error
