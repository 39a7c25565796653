"""The table of a bench: made of the cells of its models, and printed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mech_unlearn.benches import Bench
from mech_unlearn.benches.answers import Number, Numbers
from mech_unlearn.benches.forms import FORMS, form_numbers
from mech_unlearn.core import LABELS, Fact
from mech_unlearn.metrics.intervals import mean_ci
from mech_unlearn.report import COLUMNS, NO_VERDICT

KINDS = {
    "generated": "from generated text",
    "teacher-forced": "teacher-forced",
    "both": "the benchmark's own mean of both kinds",
    "weights": "from the weights",
    "verdict": "ours: verdicts",
    "restoration": "ours: outputs and restoration tests on the same facts",
}
"""How the groups of the table are called."""


def tabulate(bench: Bench, cells: Mapping[str, Mapping[str, Any]], seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """(A row per number, with a measurement or None for each model; why those that are None are).

    A model is compared with the first retrained one that is not itself.
    """
    found: dict[str, Numbers] = {}
    for called, cell in cells.items():
        other = next((cells[key] for key in cells if key.startswith("retrained") and key != called), None)
        found[called] = bench.numbers(cell, cells["full"], other, seed)
        if FORMS in cell:
            found[called] |= form_numbers(cell[FORMS])
    rows, notes = [], []
    for name in dict.fromkeys(name for numbers in found.values() for name in numbers):
        by_model = {called: numbers.get(name) for called, numbers in found.items()}
        first = next(number for number in by_model.values() if number is not None)
        row: dict[str, Any] = {"name": name, "kind": first.kind}
        for called, number in by_model.items():
            row[called] = None if number is None or isinstance(number.value, str) else number.value.to_json()
        rows.append(row)
        notes += _missing(name, by_model)
    return rows, notes


def _missing(name: str, by_model: Mapping[str, Number | None]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for called, number in by_model.items():
        if number is None or isinstance(number.value, str):
            reasons.setdefault("not asked" if number is None else str(number.value), []).append(called)
    return [f"{name} left out ({', '.join(called)}): {reason}" for reason, called in reasons.items()]


def restoration(cells: Sequence[Mapping[str, Any]], facts: Sequence[Fact], seed: int) -> list[dict[str, Any]]:
    """Shares of verdicts over the testable facts and mean scores of the tests: a row each, models as keys."""
    clusters = {fact.id: fact.group or fact.subject for fact in facts}
    rows: list[dict[str, Any]] = []
    unsaid = any("no_retrained" in verdict["flags"] for cell in cells for verdict in cell["verdicts"])
    for label in (*LABELS, *((NO_VERDICT,) if unsaid else ())) if cells else ():
        rows.append({"name": label if label == NO_VERDICT else f"verdict {label}", "kind": "verdict"})
        for cell in cells:
            rows[-1][cell["row"]["name"]] = _share(label, cell["verdicts"], clusters, seed)
    for key, title in COLUMNS.items() if cells else ():
        if key == "worst_form":  # stands in the benchmark's table
            continue
        values = {cell["row"]["name"]: cell["row"][key] for cell in cells}
        if any(values.values()):
            rows.append({"name": title, "kind": "restoration", **values})
    return rows


def untestable(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many facts no verdict counts; the same for all models, as full and retrained ones decide it."""
    verdicts = cells[0]["verdicts"] if cells else []
    out = sum("not_testable" in verdict["flags"] for verdict in verdicts)
    if not out:
        return []
    return [
        f"{out} of {len(verdicts)} facts are not testable: the full model does not know them, or a retrained one does"
    ]


def _share(label: str, verdicts: Sequence[Mapping[str, Any]], clusters: Mapping[str, str], seed: int) -> Any:
    counted_in = [verdict for verdict in verdicts if "not_testable" not in verdict["flags"]]
    if not counted_in:
        return None
    said = [NO_VERDICT if "no_retrained" in verdict["flags"] else verdict["label"] for verdict in counted_in]
    if NO_VERDICT in said and label in ("deleted", "suppressed") and label not in said:
        return None  # not a share of nought: nothing could be said of either
    values = [float(each == label) for each in said]
    groups = [clusters[verdict["fact_id"]] for verdict in counted_in]
    return mean_ci(values, "share of testable facts", groups, seed).to_json()


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
