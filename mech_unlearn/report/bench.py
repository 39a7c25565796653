"""The table of a published benchmark, for the terminal and the page."""

from collections.abc import Callable, Mapping
from typing import Any

KINDS = {
    "generated": "from generated text",
    "teacher-forced": "teacher-forced",
    "both": "the benchmark's own mean of both kinds",
    "weights": "from the weights",
    "verdict": "ours: verdicts",
    "restoration": "ours: outputs and restoration tests on the same facts",
}
"""How the groups of the table are called."""


def shown_value(number: Mapping[str, Any] | None) -> str:
    """`value [low, high]` with three significant digits; a dash where there is none."""
    if number is None or number["value"] is None:
        return "–"
    low, high = (float("nan") if end is None else end for end in number["ci"])
    return f"{number['value']:.3g} [{low:.3g}, {high:.3g}]"


def sections(summary: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """The table as text: per kind of number its title and lines of name, a value per model, n and unit."""
    rows = (*summary["benchmark_rows"], *summary["restoration"])
    out = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        lines = []
        for row in rows:
            if row["kind"] == kind:
                values = [row.get(model) for model in summary["models"]]
                known = [value for value in values if value is not None]
                units = list(dict.fromkeys(value["unit"] for value in known))
                counts = list(dict.fromkeys(str(value["n"]) for value in known))
                ends = ["/".join(counts) or "–", " / ".join(units) or "–"]
                lines.append([row["name"], *map(shown_value, values), *ends])
        out.append((KINDS.get(kind, kind), lines))
    return out


def print_bench(summary: Mapping[str, Any], write: Callable[[str], None] = print) -> None:
    """The benchmark's table and the restoration tests' on stdout: a line per number, a column per model."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in (f"{summary['benchmark']} ({summary['paper']})", *summary["models"], "n", "unit"):
        grid.add_column(title)
    for title, lines in sections(summary):
        grid.add_section()
        grid.add_row(f"\\[{title}]", style="dim")
        for line in lines:
            grid.add_row(*line)
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(grid)
    for note in summary["notes"]:
        write(f"note: {note}")
