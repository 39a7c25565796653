"""The tables of a run, for the terminal and the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from mech_unlearn.core import LABELS

NO_VERDICT = "lost in the outputs, no verdict"
IN_SAMPLE = "† in-sample: the calibration was measured on these people (groups of facts), in this full model."
FORM_NAMES = {
    "prompt": "main phrasing",
    "cloze": "cloze",
    "question": "question",
    "multiple_choice": "multiple choice",
    "reversed": "reversed",
    "heldout": "held-out",
}


COLUMNS = {
    "forget_recall": "forget recall",
    "heldout_recall": "held-out phrasing",
    "worst_form": "worst form",
    "neighbor_recall": "neighbour recall",
    "general_kl": "general KL (nats)",
    "uds": "UDS",
    "writeback": "writeback",
    "rho_sae": "rho_SAE",
    "relearn_recovery": "relearn recovery",
    "int4_recovery": "4-bit recovery",
}


def cell_text(number: Mapping[str, Any] | None, digits: int = 2, interval: bool = True) -> str:
    """`value [low, high]` of a measured number, behind its form where it has one; a dash where nothing was measured."""
    if number is None or number["value"] is None:
        return "–"
    form = f"{FORM_NAMES[number['form']]} " if "form" in number else ""
    low, high = number["ci"]
    if not interval or low is None or high is None:
        return f"{form}{number['value']:.{digits}f}"
    return f"{form}{number['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def form_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of recall by form; no rows where none was asked by form."""
    asked = [row for row in rows if row.get("forms")]
    body = [
        [row["name"], *(_form_text(row["forms"].get(form)) for form in FORM_NAMES), cell_text(row["worst_form"])]
        for row in asked
    ]
    return ["model", *FORM_NAMES.values(), "worst form, above chance"], body


def _form_text(number: Mapping[str, Any] | None) -> str:
    chance = number.get("chance") if number else None
    return cell_text(number) + (f" (chance {chance:.2f})" if chance else "")


HEALTH = {"neighbor_recall": "no neighbour was held back: keep facts about more subjects", "general_kl": "no --texts"}
"""What is measured on what the method did not see, and why it may not be."""


def health_lines(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Recall and drift before and after an edit, a line each; beside those of unseen neighbours and texts the seen."""
    lines = []
    for key in ("forget_recall", "heldout_recall", *HEALTH):
        old, new, seen = before[key], after[key], after["seen"].get(key)
        beside = f"; seen by the method {seen['value']:.3f}" if seen else ""
        if new is not None:
            unseen = "unseen, " if key in HEALTH else ""
            told = f"{old['value']:.3f} -> {new['value']:.3f}  ({unseen}n = {new['n']}, {new['unit']}{beside})"
            lines.append(f"{key:16} {told}")
        elif key in HEALTH:
            lines.append(f"{key:16} not measured: {HEALTH[key]}{beside}")
    return lines


def form_lines(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Recall by form before and after an edit, a line each, and the form in which most is still said."""
    lines = ["recall by form, greedy:"]
    for form, name in FORM_NAMES.items():
        old, new = before["forms"][form], after["forms"][form]
        if new["value"] is None or old["value"] is None:
            lines.append(f"  {name:18} not asked: {new.get('reason', old.get('reason'))}")
            continue
        notes = f"n = {new['n']}" + (f", chance {new['chance']:.2f}" if new["chance"] else "")
        notes += f", {new['left_out']} facts left out" if new["left_out"] else ""
        lines.append(f"  {name:18} {old['value']:.3f} -> {new['value']:.3f}  ({notes})")
    worst = after["worst_form"]
    return [*lines, f"worst form       {cell_text(worst, 3)}, above chance"]


def verdict_text(shares: Mapping[str, float] | None) -> str:
    """The labels that any fact got, commonest first, with their shares."""
    if not shares:
        return "–"
    given = sorted(((shares[label] or 0.0, label) for label in LABELS), reverse=True)
    return ", ".join(f"{label} {share:.0%}" for share, label in given if share >= 0.005) or "–"


def verdict_cell(row: Mapping[str, Any]) -> str:
    """The labels of a row with their shares; what was lost without retrained models to compare with stands as having no
    verdict, and a dagger marks a calibration that was measured on the same groups of facts. Rows of older runs have
    neither."""
    unsaid = row.get("no_verdict") or 0.0
    if not row["verdicts"] or not unsaid:
        text = verdict_text(row["verdicts"])
    else:
        others = {label: row["verdicts"][label] for label in LABELS}
        others["undetermined"] -= unsaid
        said = verdict_text(others)
        text = f"{NO_VERDICT} {unsaid:.0%}" + ("" if said == "–" else f"; {said}")
    return f"{text} †" if row.get("in_sample") else text


def corrected_text(corrected: Mapping[str, Any] | None) -> str:
    """A sentence on the shares freed from the verdict's own errors; empty where the errors were not measured."""
    if not corrected:
        return ""
    if corrected["shares"] is None:
        return (
            "Not freed from the verdict's own errors: no mixture of the known truths is judged like this (off by "
            f"{corrected['unexplained']:.2f})."
        )
    kept = {truth: m for truth, m in corrected["shares"].items() if m["ci"][1] >= 0.005}
    each = (f"{truth} {m['value']:.2f} [{m['ci'][0]:.2f}, {m['ci'][1]:.2f}]" for truth, m in kept.items())
    return f"Shares freed from the verdict's own measured errors, 95 % intervals: {', '.join(each)}."


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the result table."""
    header = ["model", "verdict", "truth", *COLUMNS.values()]
    body = [
        [row["name"], verdict_cell(row), row["truth"] or "–", *(cell_text(row.get(key)) for key in COLUMNS)]
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
        values = (cell_text(row.get(key), interval=False) for key in COLUMNS)
        grid.add_row(row["name"], *values, verdict_cell(row), row["truth"] or "–")
    console = Console()
    if not console.is_terminal:
        console.width = 150
    console.print(grid)
    if any(row.get("in_sample") for row in rows):
        console.print(IN_SAMPLE, soft_wrap=True, highlight=False)
    console.print(note, soft_wrap=True, highlight=False)
