"""Tables and figures of 005."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.figures import draw_uds, draw_verdicts
from experiments.runner import write_results
from experiments.tables import shard_table, small, table, verdict_table
from mech_unlearn import attribution
from mech_unlearn.attribution import Attribution

HEAD = ("recall", "held-out phrasing", "recall, kept", "KL, known text", "KL, unseen text")
FORMS = ("prompt", "cloze", "question", "multiple_choice", "reversed", "heldout")


def write(results: Path, summary: Mapping[str, Any], cells: Mapping[str, Mapping[str, Any]]) -> None:
    """The summary, tables.md and the figures."""
    write_results(results, summary, tables(summary))
    figures(results, summary, cells)


def tables(summary: Mapping[str, Any]) -> str:
    rows = summary["rows"]
    keys = ("forget_recall", "heldout_recall", "neighbor_recall", "general_kl", "unseen_kl")
    kinds = list(rows[0]["asked"])
    shards = {"recall, forgotten": ("forget", "recall"), "recall, kept": ("kept", "recall")}

    def by_row(head: Sequence[str], values: Callable[[Any], Iterable[Any]]) -> list[str]:
        return table(("size", "row", *head), [[row["size"], row["name"], *map(small, values(row))] for row in rows])

    parts = (
        by_row(HEAD, lambda row: (row[key] for key in keys)),
        verdict_table(summary),
        by_row(FORMS, lambda row: (row["forms"].get(form, {}).get("recall") for form in FORMS)),
        by_row(kinds, lambda row: (row["asked"][kind]["recall"] for kind in kinds)),
        shard_table(summary, shards),
    )
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def figures(results: Path, summary: Mapping[str, Any], cells: Mapping[str, Mapping[str, Any]]) -> None:
    draw_verdicts(results, summary)

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
    draw_uds(results, cells)
    for name, found in next(iter(cells.values()))["locate"]["located"].items():
        result = Attribution.from_json(found)
        attribution.save(results / f"locate_{name}.png", lambda ax, result=result: attribution.heatmap(result, ax))
