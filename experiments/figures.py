"""Figures that 004 and 005 have in common."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mech_unlearn import attribution
from mech_unlearn.report import figures as plots


def draw_verdicts(results: Path, summary: Mapping[str, Any]) -> None:
    """Shares of labels of every row that has testable facts, a figure per size."""
    for size in dict.fromkeys(row["size"] for row in summary["rows"]):
        rows = [_plain(row) for row in summary["rows"] if row["size"] == size and row["verdicts"]]
        if rows:
            attribution.save(
                results / f"verdicts_{size}.png", lambda ax, rows=rows: plots.verdict_bars(rows, ax), size=(7.5, 3.6)
            )


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose verdicts are bare shares, as the figures of `report` take them."""
    return {**row, "verdicts": {label: share["value"] for label, share in row["verdicts"].items()}}


def draw_uds(results: Path, cells: Mapping[str, Mapping[str, Any]]) -> None:
    """The erased share by layer of the first size's rows; nothing where no layer could be measured."""
    first = next(iter(cells.values()))
    curves = {row: cell["curves"] for row, cell in first.items() if cell.get("curves") and row != "full"}
    if any(value is not None for kinds in curves.values() for values in kinds.values() for value in values):
        attribution.save(
            results / "uds_by_layer.png", lambda ax: plots.restoration_by_layer(curves, ax, 3.0), size=(7.5, 4.6)
        )
