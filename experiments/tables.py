"""Numbers with their intervals as lines of Markdown tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mech_unlearn.core import LABELS


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a table."""
    return [_line(head), "|" + "---|" * len(head), *map(_line, rows)]


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def number(m: Mapping[str, Any] | None, digits: int = 2, lacking: str = "–") -> str:
    """A number with its interval; `lacking` where it was not measured."""
    if not m or m["value"] is None:
        return lacking
    value = f"{m['value']:.{digits}f}"
    return value if m.get("ci") is None else f"{value} [{m['ci'][0]:.{digits}f}, {m['ci'][1]:.{digits}f}]"


def small(m: Mapping[str, Any] | None, digits: int = 2) -> str:
    """The same, with the order of magnitude of a value that would be rounded to zero."""
    if not m or m["value"] is None or not 0 < abs(m["value"]) < 10**-digits / 2:
        return number(m, digits)
    _, *interval = number(m, digits).split(" ", 1)
    return " ".join([f"{m['value']:.0e}", *interval])


def verdict_table(summary: Mapping[str, Any]) -> list[str]:
    """The table of restoration scores and verdicts, for 004 and 005."""
    tests = ("uds", "writeback", "rho_sae", "relearn_recovery", "int4_recovery")
    rows = []
    for row in summary["rows"]:
        labels = [f"{row['verdicts'][name]['value']:.2f}" if row["verdicts"] else "–" for name in LABELS]
        rows.append([row["size"], row["name"], *(small(row[test]) for test in tests), *labels])
    return table(("size", "row", *tests, *LABELS), rows)


def shard_table(summary: Mapping[str, Any], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    """What shards answer together beside the unsharded models, for 004 and 005; `columns`: head -> (part, measure)."""
    rows = [
        [size, f"{found['hit']} of {found['shards']}", name, *(small(out[a][b]) for a, b in columns.values())]
        for size, found in summary["sisa"].items()
        for name, out in found["outputs"].items()
    ]
    return table(("size", "shards hit", "model", *columns), rows)
