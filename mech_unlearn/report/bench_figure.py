"""The table of a benchmark as a figure: one line per number that is a share, one mark per model, a band per kind."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mech_unlearn import attribution


def draw_bench(result: Mapping[str, Any], path: Path) -> None:
    """Values with 95 % intervals of the rows that lie in 0..1 for every model; the other rows are in bench.json.

    Numbers of different kinds (generated, teacher-forced, ...) stand in bands of their own. No such row: no figure.
    """
    rows = [row for row in (*result["rows"], *result["restoration"]) if _is_share(row, result["models"])]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    ordered = [row for kind in kinds for row in rows if row["kind"] == kind]
    if ordered:
        size = (8.0, 1.2 + 0.26 * len(ordered))
        attribution.save(path, lambda ax: _draw(ordered, kinds, result["models"], ax), size=size)


def _is_share(row: Mapping[str, Any], models: Sequence[str]) -> bool:
    values = [row[model]["value"] for model in models if row.get(model)]
    return bool(values) and all(value is not None and 0 <= value <= 1 for value in values)


def _draw(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str], models: Sequence[str], ax: Any) -> Any:
    for k, kind in enumerate(kinds):
        at = [i for i, row in enumerate(rows) if row["kind"] == kind]
        if k % 2 == 0:
            ax.axhspan(at[0] - 0.5, at[-1] + 0.5, color="#f4f1ea", zorder=0)
        ax.text(1.03, sum(at) / len(at), kind, rotation=270, va="center", fontsize=7, color="#555555")
    for k, model in enumerate(models):
        shift = 0.6 * (k / max(1, len(models) - 1) - 0.5)
        shown = [(i + shift, row[model]) for i, row in enumerate(rows) if row.get(model)]
        if not shown:
            continue
        values = [number["value"] for _, number in shown]
        ends = [[v if e is None else e for e in number["ci"]] for v, (_, number) in zip(values, shown, strict=True)]
        low, high = ([abs(v - end[side]) for v, end in zip(values, ends, strict=True)] for side in (0, 1))
        color = attribution.CYCLE[k % len(attribution.CYCLE)]
        ax.errorbar(values, [y for y, _ in shown], xerr=[low, high], fmt="o", ms=4, lw=1, color=color, label=model)
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(-0.02, 1.02)
    ax.set_xlabel("value with its 95 % interval")
    ax.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
    return ax
