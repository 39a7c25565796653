"""Facts on disk: one JSON object per line, with comments in lines that begin with #; a JSON array and a table with a
header are read as well.

Keys: `id`, `subject`, `aliases`, `relation`, `object`, `prompt` (exactly one `{}`, the subject; the object follows),
`paraphrases`, `heldout`, `distractors`, `kind`, `group`, `joiner` ("" in scripts without spaces). Unknown keys are
kept in `Fact.extra`.
"""

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mech_unlearn.core import _FIELDS, _LISTS, _STRINGS, Fact, fact_to_json
from mech_unlearn.data.checking import misspelt
from mech_unlearn.data.source import parsed, short
from mech_unlearn.files import parse_json, read_text, write_atomic

FOREIGN: Mapping[str, frozenset[str]] = {
    "counterfact": frozenset({"requested_rewrite"}),
    "zsre": frozenset({"subject", "src", "answers"}),
    "popqa": frozenset({"subj", "prop", "obj"}),
    "relations": frozenset({"prompt_templates", "samples"}),
    "trex": frozenset({"sub_label", "obj_label", "predicate_id"}),
}
"""Data set of `facts convert` -> keys by which its rows are known."""
BY_FOLDER = ("relations", "trex")
"""Those of them that are converted by the folder of their files."""
PHRASINGS = ("prompt", "paraphrases", "heldout")
SHOWN = 20
"""Bad facts of a file that one message lists."""


def fact_from_json(row: Any, default_id: str) -> Fact:
    """A Fact from one parsed line; `id` defaults to `default_id`.

    Raises:
        ValueError: not an object, a missing or wrongly typed field, or what `Fact` itself refuses.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    if missing := [key for key in ("subject", "relation", "object", "prompt") if key not in row]:
        raise ValueError(f"missing field {missing[0]!r}")
    known: dict[str, Any] = {"id": default_id} | {key: row[key] for key in _FIELDS if key in row}
    for key in _LISTS:
        value = known.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"field {key!r} must be a list of strings, found {short(value)}")
        known[key] = tuple(value)
    for key, optional in _STRINGS.items():
        value = known.get(key)
        if not (isinstance(value, str) or (optional and value is None)):
            raise ValueError(f"field {key!r} must be a {'' if optional else 'non-empty '}string, found {short(value)}")
    return Fact(**known, extra={key: value for key, value in row.items() if key not in _FIELDS})


def load_facts(path: str | os.PathLike) -> tuple[Fact, ...]:
    """The facts of a file; blank lines are skipped. White space around strings is taken off with a warning, and a key
    that looks like a misspelt field is kept in `Fact.extra` with one.

    Raises:
        ValueError: no such file, no fact in it, another format, or bad facts: all are listed with file, line number and
            reason.
    """
    file = Path(path)
    facts: dict[str, Fact] = {}
    bad: list[str] = []
    stripped: set[str] = set()
    for place, name, row in _rows(file):
        try:
            if isinstance(row, ValueError):
                raise row
            fact = fact_from_json(_stripped(row, stripped), default_id=name)
            if fact.id in facts:
                raise ValueError(f"id {fact.id!r} stands twice")
            facts[fact.id] = fact
        except ValueError as error:
            bad.append(f"{place}: {error}")
    if bad:
        raise ValueError("; ".join(bad[:SHOWN]) + (f"; and {len(bad) - SHOWN} more" if bad[SHOWN:] else ""))
    if not facts:
        raise ValueError(f"facts file {str(file)!r} holds no facts")
    if stripped:
        warnings.warn(f"{file}: white space around {', '.join(sorted(stripped))} was taken off", stacklevel=2)
    odd = dict(sorted(item for fact in facts.values() for item in misspelt(fact).items()))
    if odd:
        told = ", ".join(f"{key!r} ({field!r} is)" for key, field in odd.items())
        warnings.warn(f"{file}: fields that are read by nothing: {told}", stacklevel=2)
    return tuple(facts.values())


def _rows(file: Path) -> Sequence[tuple[str, str, Any]]:
    """(Place, id where it has none, parsed row or the error in its place) of each fact.

    Raises:
        ValueError: a file that cannot be read, or one of another data set, with the command that converts it.
    """
    if file.name.endswith((".csv", ".tsv", ".parquet")):
        whole = [{k: x for k, x in row.items() if x not in ("", None) or k == "joiner"} for row in parsed(file)]
    else:
        text = read_text(file)
        whole = _whole(file, text)
    if whole is None:
        lines = enumerate(text.split("\n"), 1)  # not splitlines: strings may hold U+2028
        told = [(number, line) for number, line in lines if line.strip() and not line.startswith("#")]
        rows = [(f"{file}:{number}", f"line{number}", _parsed(line)) for number, line in told]
    else:
        rows = [(f"{file}, row {number}", f"row{number}", row) for number, row in enumerate(whole)]
    _require_own(file, rows[0][2] if rows else None)
    return rows


def _whole(file: Path, text: str) -> list[Any] | None:
    """The rows of a file that is one JSON array, or one object over several lines; None for an object a line."""
    first = next((line for line in text.lstrip().split("\n") if line.strip() and not line.startswith("#")), "")
    if not first.startswith("[") and not (first.startswith("{") and isinstance(_parsed(first), ValueError)):
        return None
    whole = _parsed(text)
    if isinstance(whole, ValueError):
        if first.startswith("{"):
            return None
        raise ValueError(f"{file}: {whole}")
    return whole if isinstance(whole, list) else [whole]


def _require_own(file: Path, row: Any) -> None:
    """Raises ValueError for a row of another data set, with the command that converts it."""
    for name, own in FOREIGN.items():
        if isinstance(row, dict) and own <= row.keys():
            data = file.parent if name in BY_FOLDER else file
            convert = f"mech-unlearn facts convert {name} --data {data} --out FACTS.jsonl"
            raise ValueError(f"{file} holds {name} data, not facts: `{convert}` makes facts of it")


def _parsed(text: str) -> Any:
    """The value of a JSON text, or the error in its place."""
    try:
        return parse_json(text)
    except ValueError as error:
        return ValueError(f"not JSON: {error}")


def _stripped(row: Any, touched: set[str]) -> Any:
    """A row without white space around its strings, but for line breaks around phrasings; `touched` gets the fields."""
    if not isinstance(row, dict):
        return row
    return row | {key: _bare(row[key], key, touched) for key in _FIELDS if key in row and key != "joiner"}


def _bare(value: Any, key: str, touched: set[str]) -> Any:
    if isinstance(value, list):
        return [_bare(item, key, touched) for item in value]
    if not isinstance(value, str):
        return value
    bare = value.strip(" \t" if key in PHRASINGS else None)
    if bare != value:
        touched.add(key)
    return bare


def save_facts(facts: Iterable[Fact], path: str | os.PathLike) -> None:
    """Write facts as JSON lines, atomically."""
    write_atomic(Path(path), "".join(json.dumps(fact_to_json(fact), ensure_ascii=False) + "\n" for fact in facts))
