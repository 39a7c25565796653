"""Matplotlib figures: each function draws one result on one axis and gives the axis back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mech_unlearn import attribution
from mech_unlearn.attribution import CYCLE, Attribution
from mech_unlearn.core import LABELS
from mech_unlearn.files import inside, read_json
from mech_unlearn.report import figures as plots
from mech_unlearn.report.tables import FORM_NAMES

COLORS = {
    "deleted": "#3b7a57",
    "suppressed": "#c8553d",
    "intact": "#4a6fa5",
    "collapsed": "#3d3d3d",
    "undetermined": "#c9c5bc",
}


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


def draw_figures(folder: Path) -> None:
    """(Re)draw the figures of a finished run from what lies in its folder."""

    def read(name: str) -> Any:
        return read_json(inside(folder, name))

    rows = read("summary.json")["rows"]
    figures = folder / "figures"
    if (folder / "locate.json").is_file():
        trace = Attribution.from_json(read("locate.json")["causal_trace"])
        attribution.save(figures / "1_causal_trace.png", lambda ax: attribution.heatmap(trace, ax))
    curves = {row["name"]: read(f"cells/{row['name']}.json")["curves"] for row in rows}
    if any(curves.values()):
        attribution.save(figures / "2_restoration_by_layer.png", lambda ax: plots.restoration_by_layer(curves, ax))
    guess = read("captions.json").get("chance") if (folder / "captions.json").is_file() else None
    attribution.save(figures / "3_recall.png", lambda ax: plots.recall_bars(rows, ax, guess))
    attribution.save(figures / "4_verdicts.png", lambda ax: plots.verdict_bars(rows, ax), size=(7.5, 3.4))
    if any(row.get("forms") for row in rows):
        attribution.save(figures / "5_forms.png", lambda ax: plots.form_grid(rows, FORM_NAMES, ax), size=(7.5, 3.4))
