"""Matplotlib figures: each function draws one result on one axis and gives the axis back."""

import textwrap
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
    """A two-axis Attribution, first axis downwards, unit on the colour bar; rows without a value are left out."""
    rows, columns = result.axes
    kept = (~result.values.isnan().all(1)).nonzero()[:, 0].tolist()
    values = result.values[kept]
    low = min(0.0, values.nan_to_num().min().item())
    image = ax.imshow(values.numpy(), aspect="auto", cmap="magma", vmin=low)
    ax.set_yticks(range(len(kept)), [str(result.labels[rows][i]) for i in kept])
    ax.set_xticks(range(len(result.labels[columns])), [str(x) for x in result.labels[columns]])
    ax.set_xlabel(columns)
    ax.set_title(_title(result), loc="left")
    ax.figure.colorbar(image, ax=ax, label=textwrap.fill(result.unit, 34))
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
    ax.set_title(_title(result), loc="left")
    return ax


def _title(result: Attribution) -> str:
    return textwrap.fill(f"{result.name} (n = {result.n})", 40)


WIDE = 64
"""Labels of an axis above which single cells can no longer be read."""


def top_bars(result: Attribution, ax: Any, k: int = 20) -> Any:
    """The k largest values with their 95 % intervals, for results with a long axis (neurons, latents)."""
    best = result.top(k)
    places = [tuple(result.labels[axis].index(at[axis]) for axis in result.axes) for at, _ in best]
    values = [value for _, value in best]
    names = ["  ".join(f"{axis} {at[axis]}" for axis in result.axes) for at, _ in best]
    ax.barh(range(len(best)), values, color=CYCLE[0])
    if result.low is not None and result.high is not None:
        reach = [
            [max(0.0, v - result.low[p].item()) for p, v in zip(places, values, strict=True)],
            [max(0.0, result.high[p].item() - v) for p, v in zip(places, values, strict=True)],
        ]
        ax.errorbar(values, range(len(best)), xerr=reach, fmt="none", color="#222222", capsize=2, lw=1)
    ax.set_yticks(range(len(best)), names, fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel(result.unit)
    ax.set_title(_title(result), loc="left")
    return ax


def draw(result: Attribution, ax: Any) -> Any:
    """A curve for one short axis, a heatmap for two, bars of the largest values otherwise."""
    short = all(len(result.labels[axis]) <= WIDE for axis in result.axes)
    if short and len(result.axes) == 1:
        return curve(result, ax)
    return heatmap(result, ax) if short and len(result.axes) == 2 else top_bars(result, ax)


def side_by_side(results: Sequence[Attribution], figure: Any) -> Any:
    """One panel per result, in a row, on a matplotlib figure."""
    for result, ax in zip(results, figure.subplots(1, len(results), squeeze=False)[0], strict=True):
        draw(result, ax)
    return figure


def new_axis(size: tuple[float, float] = (7.5, 4.2)) -> Any:
    """An axis on a new figure that needs no display."""
    return _figure(size).add_subplot()


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_html(result: Attribution, k: int = 10) -> str:
    """The figure of a result and a table of its largest values, as one piece of HTML."""
    import base64
    import html
    import io

    buffer = io.BytesIO()
    draw(result, new_axis()).figure.savefig(buffer, dpi=100, format="png")
    head = "".join(f"<th>{html.escape(axis)}</th>" for axis in (*result.axes, result.unit))
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(at[axis]))}</td>' for axis in result.axes)}<td>{value:.4f}</td></tr>"
        for at, value in result.top(k)
    )
    picture = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/png;base64,{picture}" alt="{html.escape(result.name)}">'
        f"<table><tr>{head}</tr>{body}</table><p>n = {result.n}; {html.escape(result.note)}</p>"
    )


def restoration_by_layer(curves: Mapping[str, Mapping[str, Sequence[float | None]]], ax: Any, cap: float = 1.5) -> Any:
    """Erased share by layer: model -> {"uds_subject": ..., "uds": ...}; 0 is as in full, 1 as in a retrained model.

    The subject's last token is drawn as a line, the rows that predict the answer dashed; None where retrained states
    cost nothing. Shares above `cap` (states that break the full model) are drawn at `cap`.
    """
    styles = {"uds_subject": ("-", "o"), "uds": ("--", "s")}
    for (name, variants), color in zip(curves.items(), CYCLE * 2):
        for variant, (line, marker) in styles.items():
            values = variants.get(variant, [])
            points = [float("nan") if v is None else min(v, cap) for v in values]
            label = name if variant == "uds" else None
            ax.plot(range(len(points)), points, ls=line, marker=marker, ms=5, color=color, label=label, alpha=0.85)
            ax.set_xticks(range(len(points)))
    for level in (0, 1):
        ax.axhline(level, color="#999999", lw=0.8, ls=":")
    ax.set_xlabel("layer patched into the full model (line: subject's last token, dashed: answer rows)")
    ax.set_ylabel("erased share (D of U / D of retrained)")
    ax.set_ylim(-0.1, cap + 0.1)
    ax.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0))
    return ax


def recall_bars(rows: Sequence[Mapping[str, Any]], ax: Any, chance: float | None = None) -> Any:
    """Forget recall before the edit and after it (95 % intervals), and what the stronger weight attack adds.

    The third bar is no measured recall: it is recall + recovery x (before - recall), where recovery is the share of
    the lost margin (nats) that relearning or 4-bit rounding gives back beyond what it gives retrained models.
    """
    before = next((row["forget_recall"]["value"] for row in rows if row["name"] == "full"), 1.0)
    shown = [row for row in rows if row["forget_recall"] and row["name"] != "full"]
    for i, row in enumerate(shown):
        recall = row["forget_recall"]
        low, high = recall["ci"]
        value = recall["value"]
        ax.bar(i - 0.27, before, 0.25, color="#d8d4cb", label="before" if i == 0 else None)
        ax.bar(i, value, 0.25, color=CYCLE[0], label="after unlearning" if i == 0 else None)
        ax.errorbar(i, value, [[value - low], [high - value]], color="#222222", capsize=2, lw=1)
        attacks = [row[key]["value"] for key in ("relearn_recovery", "int4_recovery") if row[key]]
        if attacks:
            back = value + max(attacks) * max(before - value, 0.0)
            ax.bar(
                i + 0.27,
                back,
                0.25,
                color=CYCLE[1],
                label="plus the margin that an attack recovers" if i == 0 else None,
            )
    if chance is not None:
        ax.axhline(chance, color="#555555", lw=1, ls="--", label=f"chance {chance:.2f}")
    ax.set_xticks(range(len(shown)), [row["name"] for row in shown], rotation=15, ha="right")
    ax.set_ylabel("recall on the forget set")
    ax.set_ylim(0, 1.05)
    ax.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
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


def form_grid(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], ax: Any) -> Any:
    """Recall of the forget set by model and form of the question, (recall - chance) / (1 - chance), in numbers.

    `names`: form -> what it is called on the axis. Empty where a form was not asked.
    """
    shown = [row for row in rows if row.get("forms")]
    values = torch.full((len(shown), len(names)), float("nan"))
    for i, row in enumerate(shown):
        for j, form in enumerate(names):
            number = row["forms"].get(form)
            if number and number["value"] is not None:
                values[i, j] = (number["value"] - number["chance"]) / (1 - number["chance"])
    image = ax.imshow(values.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for i, line in enumerate(values.tolist()):
        for j, value in enumerate(line):
            text = "" if value != value else f"{value:.2f}"
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if value > 0.6 else "#222222")
    ax.set_yticks(range(len(shown)), [row["name"] for row in shown])
    ax.set_xticks(range(len(names)), list(names.values()), rotation=15, ha="right")
    ax.figure.colorbar(image, ax=ax, label="recall above chance")
    return ax


def save(path: Path, draw_on: Any, size: tuple[float, float] = (7.5, 4.2)) -> Path:
    """Draw on a fresh axis and write a PNG, atomically; no display is needed."""
    ax = new_axis(size)
    draw_on(ax)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.png")
    ax.figure.savefig(partial, dpi=130)
    partial.replace(path)
    return path
