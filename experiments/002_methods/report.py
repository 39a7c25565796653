"""From finished cells to summary.json, tables.md and the Pareto figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.runner import write_results
from experiments.tables import number, table
from mech_unlearn.core import LABELS

MEASURES = (
    "forget_recall", "heldout_recall", "neighbor_recall", "general_kl", "uds", "rho_sae", "relearn_recovery",
    "int4_recovery",
)  # fmt: skip
REFERENCES = ("full", "retrained")
FLOOR = 0.003
"""Smallest share that the figure's logarithmic axes show."""


def headline(cell: Mapping[str, Any]) -> str:
    row = cell["row"]
    shown = ("forget_recall", "heldout_recall", "neighbor_recall", "uds", "relearn_recovery")
    return " ".join(f"{key}={row[key]['value']:.2f}" for key in shown if row.get(key))


def over_seeds(measured: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Mean over seeds; the interval reaches from the lowest lower to the highest upper end of the seeds' own
    bootstrap intervals (over subjects), so that it covers both."""
    given = [m for m in measured if m]
    if not given:
        return None
    return {
        "value": sum(m["value"] for m in given) / len(given),
        "ci": [min(m["ci"][0] for m in given), max(m["ci"][1] for m in given)],
        "n": given[0]["n"],
        "unit": given[0]["unit"],
        "seeds": [m["value"] for m in given],
    }


def summary_row(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row per method: the shape of every summary, with seconds, settings and the selective request beside it."""
    rows = [cell["row"] for cell in cells]
    first = cells[0]
    return {
        "name": first["name"],
        "method": rows[0]["method"],
        "truth": rows[0]["truth"],
        **{key: over_seeds([row[key] for row in rows]) for key in MEASURES},
        "verdicts": {label: sum(row["verdicts"].get(label, 0.0) for row in rows) / len(rows) for label in LABELS},
        "seeds": len(cells),
        "seconds": sum(c["seconds"] for c in cells) / len(cells) if "seconds" in first else None,
        "n_forward": first.get("n_forward"),
        "n_backward": first.get("n_backward"),
        "settings": first.get("settings"),
        "selective": next((c["selective"] for c in cells if c.get("selective")), None),
        "uds_by_layer": first.get("curves", {}).get("uds_subject"),
    }


def recovered(row: Mapping[str, Any]) -> float | None:
    """The strongest restoration test's share of what a full model has: 0 as retrained, 1 as full."""
    shares = [row[key]["value"] for key in ("rho_sae", "relearn_recovery", "int4_recovery") if row[key]]
    if row["uds"]:
        shares.append(1 - row["uds"]["value"])
    return min(1.0, max(0.0, *shares)) if shares else None


def write(folder: Path, cells: Sequence[Mapping[str, Any]], chance: Mapping[str, float], source: Any) -> None:
    worlds: dict[str, Any] = {}
    for world in sorted({cell["world"] for cell in cells}):
        done: dict[str, list] = {}
        for cell in cells:
            if cell["stage"] == "test" and cell["world"] == world and "error" not in cell:
                done.setdefault(cell["name"], []).append(cell)
        rows = [summary_row(done[name]) for name in sorted(done, key=lambda n: (n not in REFERENCES, n))]
        failed = {c["name"]: c["error"] for c in cells if c["world"] == world and "error" in c}
        worlds[world] = {"chance": chance[world], "rows": rows, "failed": failed}
    searched = [
        {key: cell.get(key) for key in ("world", "name", "settings", "forget_recall", "neighbor_recall", "cost")}
        for cell in cells
        if cell["stage"] == "tune"
    ]
    rows = [{"world": world, **row} for world, found in worlds.items() for row in found["rows"]]
    seconds = sum(c.get("seconds") or 0 for c in cells)
    summary = {
        "command": "experiments/002_methods", "world": None, "seconds": seconds, "peak_rss_mib": None, "rows": rows,
        "chance": dict(chance), "failed": {world: found["failed"] for world, found in worlds.items()},
        "search": searched, "provenance": source, "calibrated": calibrated(cells),
    }  # fmt: skip
    write_results(folder, summary, tables(worlds, summary["calibrated"]))
    pareto(folder / "pareto.png", worlds)


def calibrated(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Method -> recall, writeback and shares of calibrated verdicts; seed 0, the world whose calibration ships."""
    keys = ("forget_recall", "neighbor_recall", "uds", "writeback", "rho_sae", "verdicts", "corrected")
    found = {c["name"]: c["row"] for c in cells if c["stage"] == "judged" and "row" in c}
    return {name: {key: found[name].get(key) for key in keys} for name in sorted(found)}


def tables(worlds: Mapping[str, Any], judged: Mapping[str, Any]) -> str:
    return "\n".join([*(world_table(world, found) for world, found in worlds.items()), calibrated_table(judged)])


def calibrated_table(found: Mapping[str, Any]) -> str:
    head = ("method", "forget", "neighbours", "UDS", "writeback", "rho SAE", f"{' / '.join(LABELS)}, %")
    title = "## Calibrated verdicts, biographies, seed 0 (in-sample: the calibration was measured on these people)"
    keys = ("forget_recall", "neighbor_recall", "uds", "writeback", "rho_sae")
    rows = [
        [name, *(number(row[key], lacking="") for key in keys), _shares(row["verdicts"])]
        for name, row in sorted(found.items(), key=lambda item: -item[1]["verdicts"].get("deleted", 0))
    ]
    return "\n".join([title, "", *table(head, rows)]) + "\n"


def _shares(verdicts: Mapping[str, float]) -> str:
    return " / ".join(f"{100 * verdicts.get(label, 0):.0f}" for label in LABELS)


def world_table(world: str, found: Mapping[str, Any]) -> str:
    head = ("method", "forget", "held-out", "neighbours", "general KL", "UDS", "rho SAE", "relearn", "int4",
            "same subject kept", f"{' / '.join(LABELS)}, %", "s", "seeds")  # fmt: skip
    rows = []
    for row in found["rows"]:
        same = (row["selective"] or {}).get("same_subject")
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        numbers = [number(row[key], 3 if key == "general_kl" else 2, "") for key in MEASURES]
        rows.append([row["name"], *numbers, number(same, lacking=""), _shares(row["verdicts"]), seconds, row["seeds"]])
    lines = [f"## {world} (chance {found['chance']:.3f})", "", *table(head, rows)]
    lines += [f"\nFailed: {name}: {error}" for name, error in found["failed"].items()]
    return "\n".join(lines) + "\n"


def pareto(path: Path, worlds: Mapping[str, Any]) -> None:
    """Forgetting against retention, one panel per world, both as what is missing, on logarithmic axes; colour is the
    strongest restoration test's share. Lower left and light is better."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(worlds), squeeze=False)[0]
    colours = matplotlib.colormaps["viridis_r"]
    for ax, (world, found) in zip(axes, worlds.items(), strict=True):
        rows = [row for row in found["rows"] if row["neighbor_recall"]]
        names = []
        for place, row in enumerate(rows, 1):
            worst = max(row[key]["value"] for key in ("forget_recall", "heldout_recall") if row[key])
            x, y = max(FLOOR, 1 - row["neighbor_recall"]["value"]), max(FLOOR, worst)
            share = recovered(row)
            colour = "lightgrey" if share is None else colours(share)
            ax.scatter(x, y, s=170, c=[colour], edgecolors="black", linewidths=0.6, zorder=3, alpha=0.85,
                       marker="s" if row["name"] in REFERENCES else "o")  # fmt: skip
            ax.annotate(str(place), (x, y), ha="center", va="center", fontsize=6.5, zorder=4,
                        color="white" if share is not None and share > 0.45 else "black")  # fmt: skip
            names.append(f"{place} {row['name']}")
        ax.axhline(max(FLOOR, found["chance"]), color="grey", linewidth=0.8, linestyle=":")
        ax.set(xscale="log", yscale="log", xlim=(FLOOR / 1.4, 1.3), ylim=(FLOOR / 1.4, 1.3), title=world)
        ax.set_xlabel(f"neighbour recall lost (at most {FLOOR} at the left edge)")
        ax.set_ylabel("forget recall left, worse of trained and held-out phrasings (dotted: chance)")
        third = -(-len(names) // 3)
        for i in range(3):
            column = names[i * third : (i + 1) * third]
            ax.text(i / 3, -0.12, "\n".join(column), transform=ax.transAxes, va="top", fontsize=6.5)
    scale = matplotlib.cm.ScalarMappable(cmap=colours)
    label = "strongest restoration test: 0 as retrained, 1 as full (grey: none could be made)"
    figure.colorbar(scale, ax=list(axes), label=label)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
