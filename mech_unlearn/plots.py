"""Matplotlib figures: each function draws one result on one axis and gives the axis back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mech_unlearn.core import LABELS, Attribution

COLORS = {
    "deleted": "#3b7a57",
    "suppressed": "#c8553d",
    "intact": "#4a6fa5",
    "collapsed": "#3d3d3d",
    "undetermined": "#c9c5bc",
}
CYCLE = ("#4a6fa5", "#c8553d", "#3b7a57", "#8e6c8a", "#d19a2a", "#5b8e9c", "#7f7f7f", "#a05a2c")


def heatmap(result: Attribution, ax: Any) -> Any:
    """A two-axis Attribution, first axis downwards, with its unit on the colour bar."""
    rows, columns = result.axes
    low = min(0.0, result.values.nan_to_num().min().item())
    image = ax.imshow(result.values.numpy(), aspect="auto", cmap="magma", vmin=low)
    ax.set_yticks(range(len(result.labels[rows])), [str(x) for x in result.labels[rows]])
    ax.set_xticks(range(len(result.labels[columns])), [str(x) for x in result.labels[columns]])
    ax.set_xlabel(columns)
    ax.set_title(f"{result.name} (n = {result.n})", loc="left")
    ax.figure.colorbar(image, ax=ax, label=result.unit)
    return ax


def curve(result: Attribution, ax: Any, label: str | None = None) -> Any:
    """A one-axis Attribution as a line with its 95 % band."""
    (axis,) = result.axes
    x = range(len(result.labels[axis]))
    (line,) = ax.plot(x, result.values.numpy(), marker="o", label=label or result.name)
    if result.low is not None and result.high is not None:
        ax.fill_between(x, result.low.numpy(), result.high.numpy(), alpha=0.2, color=line.get_color())
    ax.set_xticks(list(x), [str(v) for v in result.labels[axis]])
    ax.set_xlabel(axis)
    ax.set_ylabel(result.unit)
    ax.set_title(f"{result.name} (n = {result.n})", loc="left")
    return ax


def restoration_by_layer(curves: Mapping[str, Sequence[float | None]], ax: Any, ylabel: str) -> Any:
    """One line per model over the layers; 0 is as in the full model, 1 as in a retrained one."""
    for (name, values), color in zip(curves.items(), CYCLE * 2):
        points = [float("nan") if v is None else v for v in values]
        ax.plot(range(len(points)), points, marker="o", label=name, color=color)
    ax.axhline(0, color="#999999", lw=0.8, ls=":")
    ax.axhline(1, color="#999999", lw=0.8, ls=":")
    ax.set_xlabel("layer whose residual stream is patched into the full model")
    ax.set_ylabel(ylabel)
    ax.set_ylim(-0.1, 1.15)
    ax.legend(frameon=False, fontsize=8, ncols=2)
    return ax


def recall_bars(rows: Sequence[Mapping[str, Any]], ax: Any, chance: float | None = None) -> Any:
    """Forget recall after the edit, and what the strongest weight attack gets back, with 95 % intervals.

    The attack's bar is the recovered share of what was lost: recall + recovery x (1 - recall).
    """
    shown = [row for row in rows if row["forget_recall"]]
    for i, row in enumerate(shown):
        recall = row["forget_recall"]
        low, high = recall["ci"]
        value = recall["value"]
        ax.bar(i - 0.2, value, 0.38, color=CYCLE[0], label="after unlearning" if i == 0 else None)
        ax.errorbar(i - 0.2, value, [[value - low], [high - value]], color="#222222", capsize=2, lw=1)
        attacks = [row[key]["value"] for key in ("relearn_recovery", "int4_recovery") if row[key]]
        if attacks:
            back = value + max(attacks) * (1 - value)
            ax.bar(i + 0.2, back, 0.38, color=CYCLE[1], label="after the stronger attack" if i == 0 else None)
    if chance is not None:
        ax.axhline(chance, color="#555555", lw=1, ls="--", label=f"chance {chance:.2f}")
    ax.set_xticks(range(len(shown)), [row["name"] for row in shown], rotation=20, ha="right")
    ax.set_ylabel("recall on the forget set")
    ax.set_ylim(0, 1.05)
    ax.legend(frameon=False, fontsize=8)
    return ax


def verdict_bars(rows: Sequence[Mapping[str, Any]], ax: Any) -> Any:
    """Share of testable facts by verdict, one stacked bar per model."""
    shown = [row for row in rows if row["verdicts"]]
    left = torch.zeros(len(shown))
    for label in LABELS:
        share = torch.tensor([float(row["verdicts"][label]) for row in shown])
        ax.barh(range(len(shown)), share, left=left, color=COLORS[label], label=label)
        left = left + share
    ax.set_yticks(range(len(shown)), [row["name"] for row in shown])
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of testable facts")
    ax.legend(frameon=False, fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(0, 1.0))
    return ax


def save(path: Path, draw: Any, size: tuple[float, float] = (7.5, 4.2)) -> Path:
    """Draw on a fresh axis and write a PNG, atomically; no display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial, dpi=130)
    partial.replace(path)
    return path
