"""Numbers with their intervals as lines of Markdown tables, for 004 and 005."""

from collections.abc import Mapping
from typing import Any

from mech_unlearn.core import LABELS


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose verdicts are bare shares, as the figures of `plots` take them."""
    return {**row, "verdicts": {label: share["value"] for label, share in row["verdicts"].items()}}


def text(m: Mapping[str, Any] | None, digits: int = 2) -> str:
    """A number with its interval, for tables."""
    if m is None:
        return "–"
    small = 0 < abs(m["value"]) < 10**-digits / 2
    value = f"{m['value']:.0e}" if small else f"{m['value']:.{digits}f}"
    return value if m.get("ci") is None else f"{value} [{m['ci'][0]:.{digits}f}, {m['ci'][1]:.{digits}f}]"


def verdict_table(summary: Mapping[str, Any]) -> list[str]:
    """Lines of the table of restoration scores and verdicts."""
    tests = ("uds", "writeback", "rho_sae", "relearn_recovery", "int4_recovery")
    lines = [
        f"| size | row | {' | '.join(tests)} | {' | '.join(LABELS)} |",
        "|" + "---|" * (2 + len(tests) + len(LABELS)),
    ]
    for row in summary["rows"]:
        labels = [f"{row['verdicts'][name]['value']:.2f}" if row["verdicts"] else "–" for name in LABELS]
        scores = [text(row[test]) for test in tests]
        lines.append(f"| {row['size']} | {row['name']} | {' | '.join(scores)} | {' | '.join(labels)} |")
    return lines
