"""The ConceptVectors benchmark: value vectors of Llama 2 7B with questions and texts about the concept of each.

A JSON list of objects with the keys `Concept`, `Layer`, `Dim` (index of the value vector in its layer), `QA` (questions
about the concept), `text_completion` (`First_half` and `Second_half` of passages), `wikipedia_content` and
`unrelated_QA`; `id` may be missing. Source: Hong et al. 2024, arXiv 2406.11614; the data are CC BY 4.0.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TYPES = {
    "Concept": str,
    "Layer": int,
    "Dim": int,
    "QA": list,
    "text_completion": list,
    "wikipedia_content": str,
    "unrelated_QA": list,
}


@dataclass(frozen=True, kw_only=True)
class ConceptEntry:
    """One concept, the value vector said to hold it, and what to ask about it."""

    concept: str
    layer: int
    dim: int
    """Index of the value vector: row of W_out [d_mlp, d_model], column of `down_proj.weight`."""
    qa: tuple[str, ...]
    """Questions about the concept; the benchmark has no answers."""
    completions: tuple[tuple[str, str], ...]
    """First and second halves of passages about the concept."""
    text: str
    """Encyclopedia text about the concept."""
    unrelated_qa: tuple[str, ...]
    """Questions about other concepts."""
    id: int | None = None


def _entry(row: Any) -> ConceptEntry:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    for key, kind in _TYPES.items():
        if key not in row:
            raise ValueError(f"missing field {key!r}")
        if not isinstance(row[key], kind) or isinstance(row[key], bool):
            raise ValueError(f"field {key!r} must be {kind.__name__}, found {type(row[key]).__name__}")
    for key in ("Concept", "wikipedia_content"):
        if not row[key].strip():
            raise ValueError(f"field {key!r} is empty")
    for key in ("Layer", "Dim"):
        if row[key] < 0:
            raise ValueError(f"field {key!r} must be 0 or more, found {row[key]}")
    for key in ("QA", "unrelated_QA"):
        if not row[key] or not all(isinstance(item, str) and item.strip() for item in row[key]):
            raise ValueError(f"field {key!r} must be a list of questions, each a non-empty string")
    halves = []
    for passage in row["text_completion"]:
        pair = tuple(passage.get(key) for key in ("First_half", "Second_half")) if isinstance(passage, dict) else ()
        if len(pair) != 2 or not all(isinstance(half, str) for half in pair):
            raise ValueError("field 'text_completion' must be a list of objects with 'First_half' and 'Second_half'")
        halves.append(pair)
    number = row.get("id")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
        raise ValueError(f"field 'id' must be int, found {type(number).__name__}")
    return ConceptEntry(
        concept=row["Concept"].strip(),
        layer=row["Layer"],
        dim=row["Dim"],
        qa=tuple(question.strip() for question in row["QA"]),
        completions=tuple(halves),
        text=row["wikipedia_content"],
        unrelated_qa=tuple(question.strip() for question in row["unrelated_QA"]),
        id=number,
    )


def load_concepts(path: str | os.PathLike) -> tuple[ConceptEntry, ...]:
    """The entries of a ConceptVectors file, in its order.

    Raises:
        ValueError: no such file, not JSON in UTF-8, no list of entries, a vector given twice, or a bad entry (with its
            number, concept and reason).
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"ConceptVectors file {str(file)!r} does not exist")
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such
        raise ValueError(f"ConceptVectors file {str(file)!r} is not JSON in UTF-8: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"ConceptVectors file {str(file)!r} must hold a list of one entry or more")
    entries: dict[tuple[int, int], ConceptEntry] = {}
    for number, row in enumerate(rows, 1):
        name = f" ({row['Concept']!r})" if isinstance(row, dict) and "Concept" in row else ""
        try:
            entry = _entry(row)
            if (entry.layer, entry.dim) in entries:
                raise ValueError(f"layer {entry.layer}, dim {entry.dim} stands twice")
        except ValueError as error:
            raise ValueError(f"{file}: entry {number}{name}: {error}") from error
        entries[entry.layer, entry.dim] = entry
    return tuple(entries.values())
