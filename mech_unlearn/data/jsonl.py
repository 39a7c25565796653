"""Facts on disk: one JSON object per line.

Keys: `id`, `subject`, `aliases`, `relation`, `object`, `prompt` (exactly one `{}`, the subject; the object follows),
`paraphrases`, `heldout`, `distractors`, `kind`, `group`. Unknown keys are kept in `Fact.extra`.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mech_unlearn.core import _FIELDS, _LISTS, _STRINGS, Fact, fact_to_json
from mech_unlearn.files import write_atomic


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
            raise ValueError(f"field {key!r} must be a list of strings, found {value!r}")
        known[key] = tuple(value)
    for key, optional in _STRINGS.items():
        value = known.get(key)
        if not (isinstance(value, str) or (optional and value is None)):
            raise ValueError(f"field {key!r} must be a {'' if optional else 'non-empty '}string, found {value!r}")
    return Fact(**known, extra={key: value for key, value in row.items() if key not in _FIELDS})


def load_facts(path: str | os.PathLike) -> tuple[Fact, ...]:
    """The facts of a JSON-lines file; blank lines are skipped.

    Raises:
        ValueError: no such file, no fact in it, a repeated id, or a bad line (with file, line number and reason).
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"facts file {str(file)!r} does not exist")
    facts: dict[str, Fact] = {}
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines: strings may hold U+2028
    except UnicodeDecodeError as error:
        raise ValueError(f"facts file {str(file)!r} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fact = fact_from_json(json.loads(line), default_id=f"line{number}")
            if fact.id in facts:
                raise ValueError(f"id {fact.id!r} stands twice")
        except ValueError as error:  # JSONDecodeError is one
            raise ValueError(f"{file}:{number}: {error}") from error
        facts[fact.id] = fact
    if not facts:
        raise ValueError(f"facts file {str(file)!r} holds no facts")
    return tuple(facts.values())


def save_facts(facts: Iterable[Fact], path: str | os.PathLike) -> None:
    """Write facts as JSON lines, atomically."""
    write_atomic(Path(path), "".join(json.dumps(fact_to_json(fact), ensure_ascii=False) + "\n" for fact in facts))
