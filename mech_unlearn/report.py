"""One self-contained HTML page from a run directory, and the table that the command line prints."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mech_unlearn.core import LABELS
from mech_unlearn.run import write_atomic

COLUMNS = {
    "forget_recall": "forget recall",
    "heldout_recall": "held-out phrasing",
    "neighbor_recall": "neighbour recall",
    "general_kl": "general KL (nats)",
    "uds": "UDS",
    "writeback": "writeback",
    "rho_sae": "rho_SAE",
    "relearn_recovery": "relearn recovery",
    "int4_recovery": "4-bit recovery",
}


def cell_text(number: Mapping[str, Any] | None, digits: int = 2) -> str:
    """`value [low, high]` of a measured number; a dash where nothing was measured."""
    if number is None or number["value"] is None:
        return "–"
    low, high = number["ci"]
    if low is None or high is None:
        return f"{number['value']:.{digits}f}"
    return f"{number['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def verdict_text(shares: Mapping[str, float] | None) -> str:
    """The labels that any fact got, commonest first, with their shares."""
    if not shares:
        return "–"
    given = sorted(((shares[label] or 0.0, label) for label in LABELS), reverse=True)
    return ", ".join(f"{label} {share:.0%}" for share, label in given if share >= 0.005) or "–"


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the result table."""
    header = ["model", "verdict", "truth", *COLUMNS.values()]
    body = [
        [row["name"], verdict_text(row["verdicts"]), row["truth"] or "–", *(cell_text(row[key]) for key in COLUMNS)]
        for row in rows
    ]
    return header, body


def print_table(rows: Sequence[Mapping[str, Any]], note: str) -> None:
    """Print the table of point values on stdout; intervals are in summary.json and report.html."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column("model", no_wrap=True)
    for name in (*COLUMNS.values(), "verdict", "truth"):
        grid.add_column(name, no_wrap=name == "truth")
    for row in rows:
        values = (
            "–" if row[key] is None or row[key]["value"] is None else f"{row[key]['value']:.2f}" for key in COLUMNS
        )
        grid.add_row(row["name"], *values, verdict_text(row["verdicts"]), row["truth"] or "–")
    console = Console()
    if not console.is_terminal:
        console.width = 150
    console.print(grid)
    console.print(note, soft_wrap=True, highlight=False)


def write_report(folder: Path) -> Path:
    """(Re)draw report.html from what lies in a run directory.

    Raises:
        ValueError: the folder is no finished run.
    """
    from importlib.resources import files

    from jinja2 import Environment

    for name in ("summary.json", "provenance.json", "verdicts.json", "spec.yaml"):
        if not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} is not a finished run directory: {name} is missing")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    header, body = table(summary["rows"])
    figures = [
        {"name": path.stem, "data": base64.b64encode(path.read_bytes()).decode()}
        for path in sorted((folder / "figures").glob("*.png"))
    ]
    captions = folder / "captions.json"
    template = Environment(autoescape=True).from_string(
        (files("mech_unlearn") / "report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        summary=summary,
        header=header,
        body=body,
        figures=figures,
        captions=json.loads(captions.read_text(encoding="utf-8")) if captions.is_file() else {},
        verdicts=json.loads((folder / "verdicts.json").read_text(encoding="utf-8")),
        provenance=json.loads((folder / "provenance.json").read_text(encoding="utf-8")),
        spec=(folder / "spec.yaml").read_text(encoding="utf-8"),
    )
    write_atomic(folder / "report.html", page)
    return folder / "report.html"
