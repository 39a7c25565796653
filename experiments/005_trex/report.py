"""Tables and figures of 005."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tables import plain, text, verdict_table

from mech_unlearn import attribution
from mech_unlearn.attribution import Attribution
from mech_unlearn.files import write_atomic
from mech_unlearn.report import figures as plots

FORMS = ("prompt", "cloze", "question", "multiple_choice", "reversed", "heldout")


def write(results: Path, summary: Mapping[str, Any], cells: Mapping[str, Mapping[str, Any]]) -> None:
    """tables.md and the figures."""
    write_atomic(results / "tables.md", tables(summary))
    figures(results, summary, cells)


def tables(summary: Mapping[str, Any]) -> str:
    head = ("size", "row", "recall", "held-out phrasing", "recall, kept", "KL, known text", "KL, unseen text")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in summary["rows"]:
        found = (row[k] for k in ("forget_recall", "heldout_recall", "neighbor_recall", "general_kl", "unseen_kl"))
        lines.append(f"| {row['size']} | {row['name']} | {' | '.join(map(text, found))} |")
    lines += ["", *verdict_table(summary)]
    lines += ["", f"| size | row | {' | '.join(FORMS)} |", "|" + "---|" * (len(FORMS) + 2)]
    for row in summary["rows"]:
        asked = [text(row["forms"][form]["recall"]) if form in row["forms"] else "–" for form in FORMS]
        lines.append(f"| {row['size']} | {row['name']} | {' | '.join(asked)} |")
    kinds = list(summary["rows"][0]["asked"])
    lines += ["", f"| size | row | {' | '.join(kinds)} |", "|" + "---|" * (len(kinds) + 2)]
    for row in summary["rows"]:
        lines.append(
            f"| {row['size']} | {row['name']} | {' | '.join(text(row['asked'][kind]['recall']) for kind in kinds)} |"
        )
    lines += ["", "| size | shards hit | model | recall, forgotten | recall, kept |", "|---|---|---|---|---|"]
    for size, found in summary["sisa"].items():
        for name, out in found["outputs"].items():
            lines.append(
                f"| {size} | {found['hit']} of {found['shards']} | {name} | {text(out['forget']['recall'])} "
                f"| {text(out['kept']['recall'])} |"
            )
    return "\n".join(lines) + "\n"


def figures(results: Path, summary: Mapping[str, Any], cells: Mapping[str, Mapping[str, Any]]) -> None:
    for size in cells:
        rows = [plain(row) for row in summary["rows"] if row["size"] == size and row["verdicts"]]
        if rows:
            attribution.save(
                results / f"verdicts_{size}.png", lambda ax, rows=rows: plots.verdict_bars(rows, ax), size=(7.5, 3.6)
            )

    def by_form(ax: Any) -> None:
        first = next(iter(cells))
        rows = [row for row in summary["rows"] if row["size"] == first]
        width = 0.8 / len(rows)
        for i, row in enumerate(rows):
            for k, form in enumerate(FORMS):
                if form in row["forms"]:
                    found = row["forms"][form]["recall"]
                    at, color = k + (i - len(rows) / 2) * width, attribution.CYCLE[i % len(attribution.CYCLE)]
                    ends = [[found["value"] - found["ci"][0]], [found["ci"][1] - found["value"]]]
                    ax.bar(at, found["value"], width, color=color, label=row["name"] if k == 0 else None)
                    ax.errorbar(at, found["value"], ends, color="#222222", lw=0.8)
        ax.set_xticks(range(len(FORMS)), [form.replace("_", " ") for form in FORMS])
        ax.set_ylabel(f"recall of the forgotten facts (forget{first})")
        ax.set_ylim(0, 1.05)
        ax.legend(frameon=False, fontsize=7, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))

    attribution.save(results / "forms.png", by_form, size=(8.5, 4.4))
    first = next(iter(cells))
    curves = {row: cell["curves"] for row, cell in cells[first].items() if cell.get("curves") and row != "full"}
    if any(value is not None for kinds in curves.values() for values in kinds.values() for value in values):
        attribution.save(
            results / "uds_by_layer.png", lambda ax: plots.restoration_by_layer(curves, ax, 3.0), size=(7.5, 4.6)
        )
    for name, found in cells[first]["locate"]["located"].items():
        result = Attribution.from_json(found)
        attribution.save(results / f"locate_{name}.png", lambda ax, result=result: attribution.heatmap(result, ax))
