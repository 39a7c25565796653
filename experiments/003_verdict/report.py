"""Tables and figure of experiment 003 from its summary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mech_unlearn import attribution
from mech_unlearn.core import LABELS

COLORS = {
    "intact": "tab:blue",
    "suppressed": "tab:red",
    "deleted": "tab:green",
    "collapsed": "tab:gray",
    "undetermined": "lightgray",
}


def _text(m: Mapping[str, Any] | None) -> str:
    if m is None or m["value"] is None:
        return "–"
    return f"{m['value']:.3f} [{m['ci'][0]:.3f}, {m['ci'][1]:.3f}]"


def tables(summary: Mapping[str, Any]) -> str:
    """Markdown: the bars, every score side by side, and the labels by family."""
    lines = ["| quantity | value [95 % interval] | n (groups) |", "|---|---|---|"]
    for key in ("auc_deleted_vs_suppressed", "auc_deleted_vs_intact", "false_deleted", "false_deleted_worst_family",
                "undetermined", "retrained_deleted", "full_deleted", "spearman_mixtures"):  # fmt: skip
        lines.append(f"| {key} | {_text(summary[key])} | {summary[key]['n']} |")
    for key, m in summary["controls"].items():
        lines.append(f"| {key} | {_text(m)} | {m['n']} |")
    lines += ["", "| score | AUC suppressed / deleted | the same, from another full model | faithfulness AUC | "
              "robustness: rounding | relearning | both | models it calls forgotten |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    away = summary["another_full"]
    for name in ("verdict", *summary["auc_single"]):
        own = summary["auc_deleted_vs_suppressed"] if name == "verdict" else summary["auc_single"][name]
        r = summary["robustness"].get(name)
        shown = ["–"] * 4 if r is None else [
            *("–" if r[k] is None else f"{r[k]:.2f}" for k in ("quantisation", "relearning", "value")), str(r["n"])
        ]  # fmt: skip
        other = _text(away["auc_single"].get(name)) if away else "–"
        faithful = _text(summary["faithfulness_auc"].get(name))
        lines.append(f"| {name} | {_text(own)} | {other} | {faithful} | {' | '.join(shown)} |")
    score = summary["reliability"]
    lines += ["", f"Brier score of P(suppressed) against P(deleted): {_text(score['brier'])}", "",
              "| mean P(suppressed) | share suppressed | facts |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {row['mean']:.3f} | {row['suppressed']:.3f} | {row['n']} |" for row in score["bins"]]
    cost = summary.get("cost_fe", {})
    lines += ["", "| test | forward passes of one prompt, per fact and audited model |", "|---|---|"]
    lines += [f"| {name} | {value:.0f} |" for name, value in cost.items()]
    lines += [
        f"| verdict: all of them | {sum(cost.values()):.0f} |",
        "| ES, EM, probability, loss, zlib, Min-K, Min-K++ | 1 |",
        "| paraphrased probability | one per phrasing |",
        "| truth ratio | one per candidate |",
        "| ROUGE | one per answer token |",
        "| masked Fisher | 3 (a backward pass counts as two) |",
    ]
    lines += ["", f"| family | facts | {' | '.join(LABELS)} |", "|---|---|" + "---|" * len(LABELS)]
    families = dict(summary["by_family"]) | (away["by_family"] if away else {})
    for name, row in families.items():
        lines.append(f"| {name} | {row['n']} | {' | '.join(f'{row.get(label, 0):.2f}' for label in LABELS)} |")
    lines += ["", "| left-out family | called deleted | n (groups) |", "|---|---|---|"]
    for name, m in summary["false_deleted_by_left_out_family"].items():
        lines.append(f"| {name} | {_text(m)} | {m['n']} |")
    return "\n".join(lines) + "\n"


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
