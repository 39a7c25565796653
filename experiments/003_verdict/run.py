"""Is the verdict right? Pools of models of known truth, judged by calibrations that saw none of their groups.

    python experiments/003_verdict/run.py POOLS [--workers N]     score the pools (hours; it resumes), judge
    python experiments/003_verdict/run.py --judge                 judge the scores that are committed here (a minute)

Scores of all models are kept in results/scores.jsonl.gz, weights are not. results/summary.json has the figures.
"""

import argparse
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta, spearmanr

from mech_unlearn.calibration import FEATURES, Pool
from mech_unlearn.meta_evaluation import (
    Judged,
    auc_between,
    clustered,
    leave_one_out,
    permuted,
    rotate,
    share,
    single_scores,
)
from mech_unlearn.run import provenance, write_json
from mech_unlearn.testbed.families import FAMILIES
from mech_unlearn.testbed.pools import cells, make_pools, read_pool

RESULTS = Path(__file__).parent / "results"
SCORES = RESULTS / "scores.jsonl.gz"
WORLD = "biographies"
MIXED = ("mixture 0.25", "mixture 0.5", "mixture 0.75")


def keep(folder: Path) -> None:
    """The cells of a pool folder as one compressed file."""
    SCORES.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(cell) + "\n" for cell in cells(folder))
    SCORES.write_bytes(gzip.compress(lines.encode(), mtime=0))


def stored() -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(SCORES.read_bytes()).decode().splitlines()]


def exact(judged: Judged, mask: np.ndarray, label: str) -> dict[str, Any]:
    """Share of facts with a label, its bootstrap interval over models, and the Clopper-Pearson interval of the share of
    models with any such fact."""
    hits = (np.array(judged.label) == label)[mask].astype(float)
    names = np.array(judged.pool.cluster)[mask]
    found = clustered([hits], [tuple(names)], lambda x: x.mean(), f"share of facts called {label}; n counts models")
    any_hit = [hits[names == name].any() for name in dict.fromkeys(names)]
    k, n = int(np.sum(any_hit)), len(any_hit)
    low = 0.0 if k == 0 else float(beta.ppf(0.025, k, n - k + 1))
    high = 1.0 if k == n else float(beta.ppf(0.975, k + 1, n - k))
    return {
        **found.to_json(),
        "models_with_any": {"value": k / n, "ci": [low, high], "n": n, "unit": "share of models"},
    }


def confusion(judged: Judged) -> dict[str, dict[str, float]]:
    truth, label = np.array(judged.pool.truth), np.array(judged.label)
    return {
        t: {name: float((label[truth == t] == name).mean()) for name in sorted(set(label))} for t in sorted(set(truth))
    }


def by_family(judged: Judged) -> dict[str, dict[str, Any]]:
    family, label = np.array(judged.pool.family), np.array(judged.label)
    return {
        f: {"n": int((family == f).sum()), **{n: float((label[family == f] == n).mean()) for n in sorted(set(label))}}
        for f in sorted(set(family))
    }


def mixtures(pool: Pool, mixed: Pool) -> dict[str, Any]:
    """Spearman correlation, group by group, of how far the weights went to retrained with P(suppressed or intact)."""
    judged = rotate(pool, extra=mixed)
    ends = rotate(pool)
    rows: dict[str, list[tuple[float, float]]] = {}
    for part, shares in (
        (judged, {m: float(m.split()[1]) for m in MIXED}),
        (ends, {"full, noise": 0.0, "retrained": 1.0}),
    ):
        for i, family in enumerate(part.pool.family):
            if family in shares:
                rows.setdefault(part.pool.group[i], []).append((shares[family], float(part.still_there[i])))
    rho, used = [], []
    for group, points in rows.items():
        x, y = np.array(points).T
        levels = sorted(set(x))
        if len(levels) == len(MIXED) + 2:
            rho.append(float(spearmanr(levels, [-y[x == level].mean() for level in levels])[0]))
            used.append(group)
    found = clustered([np.array(rho)], [used], lambda v: v.mean(), "mean Spearman over groups; n counts groups")
    return {**found.to_json(), "median": float(np.median(rho))}


def judge(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of the experiment."""
    known = [cell for cell in found if not cell["kind"].startswith("mixture")]
    pool, spread = read_pool(known)
    mixed, _ = read_pool([c for c in found if c["kind"].startswith("mixture") or c["family"] == "retrained"])
    mixed = mixed.where(np.isin(np.array(mixed.family), MIXED))
    judged = rotate(pool)
    single = single_scores(pool)
    left_out = leave_one_out(pool)
    suppressed = np.array(judged.pool.truth) == "suppressed"
    both = np.isin(np.array(judged.pool.truth), ["suppressed", "deleted"])
    worst = {name: exact(part, np.ones(len(part.label), bool), "deleted") for name, part in left_out.items()}
    dealt = permuted(pool)
    chance = rotate(dealt)
    output = auc_between(-pool.x[:, FEATURES.index("output")], pool, "suppressed", "deleted")
    passed = [all(cell["checks"].values()) for cell in known]
    return {
        "auc_deleted_vs_suppressed": auc_between(judged.suspicion, judged.pool, "suppressed", "deleted").to_json(),
        "auc_single": {name: m.to_json() for name, m in single.items()},
        "auc_deleted_vs_intact": auc_between(judged.still_there, judged.pool, "intact", "deleted").to_json(),
        "false_deleted": exact(judged, suppressed, "deleted"),
        "false_deleted_worst_family": max(worst.values(), key=lambda m: m["value"]),
        "false_deleted_by_left_out_family": worst,
        "undetermined": exact(judged, both, "undetermined"),
        "retrained_deleted": exact(judged, np.array(judged.pool.family) == "retrained", "deleted"),
        "full_deleted": share(judged, "intact", "deleted").to_json(),
        "spearman_mixtures": mixtures(pool, mixed),
        "confusion": confusion(judged),
        "by_family": by_family(judged),
        "unlike_the_pool": float(judged.unlike.mean()),
        "controls": {
            "auc_with_permuted_truths": auc_between(chance.suspicion, chance.pool, "suppressed", "deleted").to_json(),
            "auc_of_the_outputs_alone": output.to_json(),
        },
        "models": {"made": len(known), "passed_the_audit_of_their_truth": int(sum(passed)), "failed": failed(known)},
        "spread_in_retrained": spread,
    }


def failed(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Family -> check -> models that failed it; they are left out."""
    out: dict[str, dict[str, int]] = {}
    for cell in found:
        for check, ok in cell["checks"].items():
            if not ok:
                out.setdefault(cell["family"], {}).setdefault(check, 0)
                out[cell["family"]][check] += 1
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pools", nargs="?", type=Path, help="folder of the pools")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--judge", action="store_true", help="judge the stored scores only")
    given = parser.parse_args()
    if not given.judge:
        if given.pools is None:
            parser.error("name a folder for the pools, or --judge")
        make_pools(WORLD, given.pools, families=tuple(FAMILIES), workers=given.workers)
        keep(given.pools)
    found = stored()
    summary = {
        "command": "experiments/003_verdict",
        "world": WORLD,
        **judge(found),
        "provenance": provenance({}, 0, "cpu"),
    }
    write_json(RESULTS / "summary.json", summary)
    for key in ("auc_deleted_vs_suppressed", "false_deleted", "false_deleted_worst_family", "undetermined",
                "spearman_mixtures", "retrained_deleted"):  # fmt: skip
        print(key, summary[key]["value"], summary[key]["ci"])


if __name__ == "__main__":
    main()
