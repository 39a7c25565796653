"""Forget quality beside verdicts: what 004 adds to the summary, its table and its figures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.figures import draw_uds, draw_verdicts
from experiments.runner import write_results
from experiments.tables import shard_table, small, table, verdict_table
from mech_unlearn import attribution
from mech_unlearn.attribution import Attribution
from mech_unlearn.benchmarks.tofu.scores import forget_quality, interval, resampled_forget_quality

DRAWS = 400
MARKERS = {"10": "o", "05": "s", "01": "^"}


def quality(own: Sequence[float], never: Sequence[float], owners: Sequence[str]) -> dict[str, Any]:
    """TOFU's forget quality against one retrained model, its interval over authors, and the KS statistic."""
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (own, never))
    found = forget_quality(a, b)
    order = {name: i for i, name in enumerate(dict.fromkeys(owners))}
    index = torch.tensor([order[name] for name in owners])
    drawn = torch.randint(len(order), (DRAWS, len(order)), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(DRAWS, len(order), dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64)
    )[:, index]
    statistic, p = resampled_forget_quality(a, b, counts, counts)
    return {
        "value": found.pvalue, "ci": list(interval(p)), "n": len(a), "unit": "p of a KS test of truth ratios",
        "statistic": {
            "value": found.statistic, "ci": list(interval(statistic)), "n": len(a), "unit": "KS distance, 0 to 1",
        },
    }  # fmt: skip


def contrast(summary: Mapping[str, Any], cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Size -> row -> forget quality, utility and its parts."""
    out: dict[str, Any] = {}
    for size, found in cells.items():
        never, out[size] = found["sisa"]["reference_extra"], {}
        for row, cell in found.items():
            if "extra" not in cell:
                continue
            extra = cell["extra"]
            out[size][row] = {
                "forget_quality": quality(extra["truth_ratio"], never["truth_ratio"], extra["owners"]),
                "utility": {
                    "value": extra["utility"], "ci": None, "n": len(extra["parts"]), "unit": "harmonic mean of parts",
                },
                **{key: extra[key] for key in ("forget probability", "forget ROUGE", "parts")},
            }  # fmt: skip
    return out


def write(results: Path, summary: dict[str, Any], cells: Mapping[str, Mapping[str, Any]]) -> None:
    """The summary with TOFU's numbers, tables.md and the figures."""
    summary["tofu"] = contrast(summary, cells)
    write_results(results, summary, tables(summary))
    figures(results, summary, cells)


def tables(summary: Mapping[str, Any]) -> str:
    head = ("recall, cloze", "tokens, questions", "recall, kept", "KL (nats)", "forget quality", "utility")
    rows = []
    for row in summary["rows"]:
        tofu = summary["tofu"][row["size"]][row["name"]]
        found = (
            row["forget_recall"], row["asked"]["question"]["tokens"], row["neighbor_recall"], row["general_kl"],
            tofu["forget_quality"], tofu["utility"],
        )  # fmt: skip
        rows.append([row["size"], row["name"], *map(small, found)])
    shards = {"tokens, forgotten questions": ("question", "tokens"), "tokens, kept": ("kept", "tokens")}
    parts = (table(("size", "row", *head), rows), verdict_table(summary), shard_table(summary, shards))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def figures(results: Path, summary: Mapping[str, Any], cells: Mapping[str, Mapping[str, Any]]) -> None:
    def against(ax: Any) -> None:
        names = list(dict.fromkeys(row["name"] for row in summary["rows"]))
        for row in summary["rows"]:
            if not row["verdicts"]:
                continue
            fq = summary["tofu"][row["size"]][row["name"]]["forget_quality"]
            share = row["verdicts"]["deleted"]
            color = attribution.CYCLE[names.index(row["name"]) % len(attribution.CYCLE)]
            x = fq["statistic"]
            bars = [[[abs(m["value"] - m["ci"][0])], [abs(m["ci"][1] - m["value"])]] for m in (x, share)]
            ax.errorbar(
                x["value"], share["value"], xerr=bars[0], yerr=bars[1], fmt=MARKERS[row["size"]], color=color, ms=8,
                lw=0.8, alpha=0.9, mec="black" if fq["value"] > 0.05 else color, mew=1.8,
            )  # fmt: skip
        for i, name in enumerate(names):
            ax.plot([], [], "o", color=attribution.CYCLE[i % len(attribution.CYCLE)], label=name)
        for size in dict.fromkeys(row["size"] for row in summary["rows"]):
            ax.plot([], [], MARKERS[size], color="#777777", label=f"forget{size}")
        ax.set_xlabel("KS distance of truth ratios to a retrained model (black edge: forget quality p > .05)")
        ax.set_xlim(-0.02, 1.02)
        ax.set_ylabel("share of facts judged deleted")
        ax.set_ylim(-0.05, 1.05)
        ax.legend(frameon=False, fontsize=7, ncols=5, loc="lower left", bbox_to_anchor=(0, 1.0))

    attribution.save(results / "forget_quality.png", against, size=(7.5, 4.8))
    draw_verdicts(results, summary)
    draw_uds(results, cells)
    trace = Attribution.from_json(next(iter(cells.values()))["locate"]["located"]["causal_trace"])
    assert math.isfinite(trace.values.nan_to_num().sum().item())
    attribution.save(results / "causal_trace.png", lambda ax: attribution.heatmap(trace, ax))
