"""Tables and figure of experiment 003 from its summary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.tables import number, table
from mech_unlearn import attribution
from mech_unlearn.core import LABELS

COLORS = {
    "intact": "tab:blue",
    "suppressed": "tab:red",
    "deleted": "tab:green",
    "collapsed": "tab:gray",
    "undetermined": "lightgray",
}


BARS = (
    "auc_deleted_vs_suppressed", "auc_deleted_vs_intact", "false_deleted", "false_deleted_worst_family", "undetermined",
    "retrained_deleted", "full_deleted", "spearman_mixtures",
)  # fmt: skip


def tables(summary: Mapping[str, Any]) -> str:
    """Markdown: the bars, every score side by side, calibration, cost, and the labels by family."""
    measured = {key: summary[key] for key in BARS} | dict(summary["controls"])
    bars = [[key, number(m, 3), m["n"]] for key, m in measured.items()]
    score, away = summary["reliability"], summary["another_full"]
    bins = [[f"{row['mean']:.3f}", f"{row['suppressed']:.3f}", row["n"]] for row in score["bins"]]
    families = dict(summary["by_family"]) | (away["by_family"] if away else {})
    labels = [[name, row["n"], *(f"{row.get(label, 0):.2f}" for label in LABELS)] for name, row in families.items()]
    left_out = [[name, number(m, 3), m["n"]] for name, m in summary["false_deleted_by_left_out_family"].items()]
    brier = f"Brier score of P(suppressed) against P(deleted): {number(score['brier'], 3)}"
    parts = (
        table(("quantity", "value [95 % interval]", "n (groups)"), bars),
        score_table(summary),
        [brier],
        table(("mean P(suppressed)", "share suppressed", "facts"), bins),
        cost_table(summary.get("cost_fe", {})),
        table(("family", "facts", *LABELS), labels),
        table(("left-out family", "called deleted", "n (groups)"), left_out),
    )
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def score_table(summary: Mapping[str, Any]) -> list[str]:
    """The verdict and every single score on the same models."""
    head = ("score", "AUC suppressed / deleted", "the same, from another full model", "faithfulness AUC",
            "robustness: rounding", "relearning", "both", "models it calls forgotten")  # fmt: skip
    away, rows = summary["another_full"], []
    for name in ("verdict", *summary["auc_single"]):
        own = summary["auc_deleted_vs_suppressed"] if name == "verdict" else summary["auc_single"][name]
        other = away["auc_single"].get(name) if away else None
        r = summary["robustness"].get(name)
        steady = ["–"] * 4 if r is None else [
            *("–" if r[k] is None else f"{r[k]:.2f}" for k in ("quantisation", "relearning", "value")), r["n"]
        ]  # fmt: skip
        measured = (own, other, summary["faithfulness_auc"].get(name))
        rows.append([name, *(number(m, 3) for m in measured), *steady])
    return table(head, rows)


def cost_table(cost: Mapping[str, float]) -> list[str]:
    """What each test takes, with the published scores' cost as their papers have it."""
    published = {
        "ES, EM, probability, loss, zlib, Min-K, Min-K++": "1", "paraphrased probability": "one per phrasing",
        "truth ratio": "one per candidate", "ROUGE": "one per answer token",
        "masked Fisher": "3 (a backward pass counts as two)",
    }  # fmt: skip
    counted = {name: f"{value:.0f}" for name, value in cost.items()}
    rows = counted | {"verdict: all of them": f"{sum(cost.values()):.0f}"} | published
    return table(("test", "forward passes of one prompt, per fact and audited model"), list(rows.items()))


def draw(summary: Mapping[str, Any], folder: Path) -> None:
    """Two pictures: every score's AUC with its interval, and the labels of each family."""
    own = {"verdict": summary["auc_deleted_vs_suppressed"], **summary["auc_single"]}
    away = summary["another_full"]

    def scores(ax: Any) -> None:
        names = sorted(own, key=lambda name: own[name]["value"])
        for shift, marker, values, label in (
            (0.12, "o", own, "suppressed from the audit's full model"),
            (-0.18, "^", away["auc_single"] if away else {}, "suppressed from another full model"),
        ):
            ys = [i + shift for i, name in enumerate(names) if name in values]
            mid = [values[name]["value"] for name in names if name in values]
            ends = [values[name]["ci"] for name in names if name in values]
            if ys:
                bars = [[m - e[0] for m, e in zip(mid, ends)], [e[1] - m for m, e in zip(mid, ends)]]
                ax.errorbar(mid, ys, xerr=bars, fmt=marker, ms=4, label=label, color="C0" if marker == "o" else "C1")
        ax.axvline(0.5, color="gray", lw=0.8, ls=":")
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel("AUC, suppressed against deleted facts (95 % interval over groups)")
        ax.set_xlim(0, 1.02)
        ax.legend(fontsize=7, loc="lower right")

    def labels(ax: Any) -> None:
        families = dict(summary["by_family"]) | (away["by_family"] if away else {})
        names = list(families)[::-1]
        left = [0.0] * len(names)
        for label in LABELS:
            width = [families[name].get(label, 0.0) for name in names]
            ax.barh(range(len(names)), width, left=left, color=COLORS[label], label=label)
            left = [a + b for a, b in zip(left, width)]
        ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.set_xlabel("share of facts, judged by calibrations without their group")
        ax.set_xlim(0, 1)
        ax.legend(fontsize=7, ncol=5, loc="lower center", bbox_to_anchor=(0.4, 1.0))

    attribution.save(folder / "scores.png", scores, size=(7.5, 6.0))
    attribution.save(folder / "families.png", labels, size=(8.0, 7.0))
