"""Is the verdict right? Pools of models of known truth, judged by calibrations that saw none of their groups.

    python -m experiments.003_verdict.run POOLS [--workers N]     score the pools (two hours on two cores; it resumes)
    python -m experiments.003_verdict.run --report                judge the scores that are committed here (a minute)

Scores of all models are kept in results/scores.jsonl.gz, weights are not. results/summary.json has the figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from experiments.runner import command_line, pack, provenance, unpack, write_results
from mech_unlearn.model.latents import load_sae
from mech_unlearn.model.load import load
from mech_unlearn.restoration import Case, audit, reference
from mech_unlearn.testbed import open_world
from mech_unlearn.testbed.families import CONTROLS, FAMILIES
from mech_unlearn.testbed.materials import TESTS, world_materials
from mech_unlearn.testbed.pools import ATTACKS, cells, make_pools, read_pool
from mech_unlearn.testbed.published import OUTPUT_SCORES, STATE_SCORES
from mech_unlearn.verdict.calibration import save
from mech_unlearn.verdict.evaluation import (
    Judged,
    auc,
    auc_between,
    called,
    clustered,
    faithfulness,
    leave_one_out,
    model_means,
    permuted,
    rates,
    recovery_likeness,
    rotate,
    steadiness,
    threshold,
)
from mech_unlearn.verdict.features import FEATURES, RECOVERY, Pool, matrix
from mech_unlearn.verdict.fitting import fit_whole

from .report import draw, tables

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SCORES = RESULTS / "scores.jsonl.gz"
WORLD = "biographies"
MIXED = ("mixture 0.25", "mixture 0.5", "mixture 0.75")
PUBLISHED = (*OUTPUT_SCORES, *STATE_SCORES)
SINGLE = ("output", *RECOVERY, "strongest", "group", *PUBLISHED)
"""Scores that the verdict is compared with, fact by fact; more means "still there"."""
MATCHED = {
    "head": "retrained, head",
    "last two layers": "retrained, last two layers",
    "first mlp": "retrained, first mlp",
    "attention": "retrained, attention",
    "refusal": "retrained, refusal",
}
"""Suppressor -> the deleted family with an edit of the same tensors, made the same way."""
SHIPPED = ("false_deleted", "false_deleted_worst_family", "undetermined", "retrained_deleted", "confusion",
           "confusion_by_group")  # fmt: skip
"""Measured rates that go with the calibration."""
Cell = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Scored:
    """Facts in models, with every single score, row by row."""

    pool: Pool
    single: Mapping[str, np.ndarray]

    def means(self, values: np.ndarray) -> dict[str, float]:
        return model_means(values, self.pool.cluster)


def scored(found: Sequence[Cell], spread: Mapping[str, float] | None = None, how: str | None = None) -> Scored:
    """The facts of cells, as they are or after an attack; the spread of retrained models from these cells, or given."""
    pairs = [
        (row, cell)
        for cell in found
        if how is None or cell["attacked"]
        for row in (cell["rows"] if how is None else cell["attacked"][how])
    ]
    used = read_pool(found).spread if spread is None else spread
    parts = [tuple(cell[key] for _, cell in pairs) for key in ("kind", "family", "cluster", "group", "base")]
    x = matrix([row for row, _ in pairs], parts[2], used)
    single = {name: x[:, FEATURES.index(name)] for name in FEATURES if name in SINGLE}
    single |= {name: np.array([row["published"][name] for row, _ in pairs]) for name in PUBLISHED}
    return Scored(Pool(x, *parts, spread=used), {name: single[name] for name in SINGLE})


def by_family(judged: Judged) -> dict[str, dict[str, Any]]:
    family, label = np.array(judged.pool.family), np.array(judged.label)
    return {
        f: {"n": int((family == f).sum()), **{n: float((label[family == f] == n).mean()) for n in sorted(set(label))}}
        for f in sorted(set(family))
    }


def mixtures(pool: Pool, mixed: Pool) -> dict[str, Any]:
    """Spearman correlation, group by group, of the way to retrained in the weights with -P(suppressed or intact)."""
    rows: dict[str, list[tuple[float, float]]] = {}
    shares = {m: float(m.split()[1]) for m in MIXED} | {"full, noise": 0.0, "retrained": 1.0}
    for judged in (rotate(pool, extra=mixed), rotate(pool)):
        for group, family, value in zip(judged.pool.group, judged.pool.family, judged.still_there, strict=True):
            if family in shares:
                rows.setdefault(group, []).append((shares[family], float(value)))
    rho, used = [], []
    for group, points in rows.items():
        x, y = np.array(points).T
        levels = sorted(set(x))
        if len(levels) == len(shares):
            rho.append(float(spearmanr(levels, [-y[x == level].mean() for level in levels])[0]))
            used.append(group)
    found = clustered([np.array(rho)], [used], lambda v: v.mean(), "mean Spearman over groups; n counts groups")
    return {**found.to_json(), "median": float(np.median(rho))}


def in_order(judged: Judged, pool: Pool, values: np.ndarray) -> np.ndarray:
    """Values of judged rows in the order of the pool's rows; a model's rows stay in order when groups are rotated."""
    out, at = np.full(len(pool), np.nan), {}
    for i, name in enumerate(pool.cluster):
        at.setdefault(name, []).append(i)
    for value, name in zip(values, judged.pool.cluster, strict=True):
        out[at[name].pop(0)] = value
    assert not any(at.values())
    return out


def meta_evaluation(table: Scored, attacked: Mapping[str, Scored]) -> dict[str, dict[str, Any]]:
    """Every score, ours and the published ones, on the same models: telling suppressed from deleted, telling who knows
    from who never knew, and standing still under rounding and relearning."""
    pool = table.pool
    judged = rotate(pool)
    verdict = {"": in_order(judged, pool, judged.still_there)}
    for how, hit in attacked.items():
        again = rotate(pool, extra=hit.pool)
        verdict[how] = in_order(again, hit.pool, again.still_there)
    truth, group = (dict(zip(pool.cluster, part, strict=True)) for part in (pool.truth, pool.group))
    out = {}
    for name in ("verdict", *SINGLE):
        values = verdict[""] if name == "verdict" else table.single[name]
        means = table.means(values)
        knows, never = ({m: v for m, v in means.items() if truth[m] == side} for side in ("intact", "deleted"))
        changed = {h: t.means(verdict[h] if name == "verdict" else t.single[name]) for h, t in attacked.items()}
        out[name] = {
            "auc": auc_between(values, pool, "suppressed", "deleted").to_json(),
            "faithfulness": faithfulness(knows, never, group).to_json(),
            "robustness": robustness(means, changed, threshold(list(knows.values()), list(never.values()))),
        }
    return out


def robustness(
    means: Mapping[str, float], changed: Mapping[str, Mapping[str, float]], bound: float
) -> dict[str, float | int | None]:
    """Q and R of arXiv 2605.24614 over the models that the score calls forgotten; R against the plain retrained model
    of the same group. None where it calls none forgotten."""
    never = {name.removeprefix("retrained "): name for name in changed["nf4"] if name.startswith("retrained ")}
    q, r = [], []
    said = [n for n in changed["nf4"] if n in changed["relearned"] and n in means and means[n] < bound]
    for name in said:
        q.append(steadiness(means[name], changed["nf4"][name]))
        base = next((full for group, full in never.items() if name.endswith(group)), name)
        if base != name and base in means:
            moved = changed["relearned"][base] - means[base]
            r.append(recovery_likeness(changed["relearned"][name] - means[name], moved))
    if not q or not r:
        return {"quantisation": None, "relearning": None, "value": None, "n": len(said)}
    a, b = float(np.mean(q)), float(np.mean(r))
    return {"quantisation": a, "relearning": b, "value": 2 * a * b / max(a + b, 1e-12), "n": len(said)}


def was_edited(known: Sequence[Cell], pairs: Mapping[str, str] = MATCHED) -> dict[str, Any]:
    """AUC of "how far the edit moved the model", nats per token from its own base on generic text, for suppressed
    against deleted among matched families: the truth must not show in the size of the edit."""
    sides = [[c for c in known if c["family"] in names] for names in (set(pairs), set(pairs.values()))]
    values = [np.array([c["edited"] for c in side]) for side in sides]
    names = [[c["group"] for c in side] for side in sides]
    return clustered(values, names, auc, "AUC, suppressed against deleted; n counts groups").to_json()


def another_full(control: Scored, table: Scored) -> dict[str, Any]:
    """Models that descend from another full model than the audit's, as deleted ones descend from other retrained
    models: their labels, and every score's AUC for the suppressed among them against the deleted. What a score owes to
    descent is lost here."""
    judged, plain = rotate(table.pool, extra=control.pool), rotate(table.pool)
    values = {
        "verdict": (
            in_order(judged, control.pool, judged.suspicion),
            in_order(plain, table.pool, plain.suspicion),
        )
    } | {name: (control.single[name], table.single[name]) for name in SINGLE}
    out = {}
    for name, sides in values.items():
        kept = []
        for value, part, side in zip(sides, (control.pool, table.pool), ("suppressed", "deleted"), strict=True):
            mask = (np.array(part.truth) == side) & ~np.isnan(value)
            kept.append((value[mask], tuple(np.array(part.group)[mask])))
        unit = "AUC, suppressed from another full model against deleted; n counts groups"
        out[name] = clustered([v for v, _ in kept], [c for _, c in kept], auc, unit).to_json()
    return {"auc_single": out, "by_family": by_family(judged)}


def person() -> Case:
    """The audit of one person, as the pools have it."""
    world = open_world(WORLD)
    full, retrained = load(world.full), tuple(map(load, world.retrained))
    facts = tuple(fact for fact in world.forget.facts if fact.subject == world.forget.facts[0].subject)
    return Case(
        full=full, facts=facts, retrained=retrained, others=world.retain.neighbors[:120],
        texts=world.retain.texts[:100], unknown=world.retain.unknown, sae=load_sae(world.sae, full),
    )  # fmt: skip


def costs(case: Case) -> dict[str, float]:
    """Test -> forward passes of one prompt per fact and audited model, as the tests count them, for one person."""
    found = audit(reference(case, TESTS), load(open_world(WORLD).full), "full")
    return {name: result.cost_fe for name, result in found.items()}


def sharpness(judged: Judged, bins: int = 10) -> dict[str, Any]:
    """How well P(suppressed) against P(deleted) is calibrated before any p-value: Brier score, and in bins of equal
    width its mean, the share of suppressed facts and their number."""
    truth = np.array(judged.pool.truth)
    here = np.isin(truth, ["suppressed", "deleted"])
    p, hit = judged.suspicion[here], (truth[here] == "suppressed").astype(float)
    names = np.array(judged.pool.group)[here]
    at = np.minimum((p * bins).astype(int), bins - 1)
    rows = [(float(p[at == b].mean()), float(hit[at == b].mean()), int((at == b).sum())) for b in sorted(set(at))]
    score = clustered(
        [(p - hit) ** 2], [tuple(names)], np.mean, "Brier score, suppressed against deleted; n counts groups"
    )
    return {
        "brier": score.to_json(),
        "bins": [dict(zip(("mean", "suppressed", "n"), row, strict=True)) for row in rows],
    }


def failed(found: Sequence[Cell]) -> dict[str, dict[str, int]]:
    """Family -> check -> models that failed it; they are left out."""
    out: dict[str, dict[str, int]] = {}
    for cell in found:
        for check, ok in cell["checks"].items():
            if not ok:
                out.setdefault(cell["family"], {}).setdefault(check, 0)
                out[cell["family"]][check] += 1
    return out


def judge(found: Sequence[Cell]) -> dict[str, Any]:
    """The figures of the experiment."""
    ok = [cell for cell in found if all(cell["checks"].values())]
    own = [cell for cell in ok if cell["family"] in FAMILIES]
    known = [cell for cell in own if not cell["kind"].startswith("mixture")]
    table = scored(known)
    pool = table.pool
    judged, left_out, chance = rotate(pool), leave_one_out(pool), rotate(permuted(pool))
    meta = meta_evaluation(table, {how: scored(known, pool.spread, how) for how in ATTACKS})
    mixed = scored([cell for cell in own if cell["family"] in MIXED], pool.spread)
    control = [cell for cell in ok if cell["family"] in CONTROLS]
    return {
        "auc_deleted_vs_suppressed": auc_between(judged.suspicion, judged.pool, "suppressed", "deleted").to_json(),
        "auc_single": {name: meta[name]["auc"] for name in SINGLE},
        "auc_deleted_vs_intact": auc_between(judged.still_there, judged.pool, "intact", "deleted").to_json(),
        **rates(judged, left_out),
        "full_deleted": called(judged, np.array(judged.pool.truth) == "intact", "deleted"),
        "spearman_mixtures": mixtures(pool, mixed.pool),
        "faithfulness_auc": {name: m["faithfulness"] for name, m in meta.items()},
        "robustness": {name: m["robustness"] for name, m in meta.items()},
        "by_family": by_family(judged),
        "another_full": another_full(scored(control, pool.spread), table) if control else None,
        "unlike_the_pool": float(judged.unlike.mean()),
        "reliability": sharpness(judged),
        "retrained_models": len({cell["base"] for cell in known if cell["kind"] == "deleted"}),
        "controls": {
            "auc_with_permuted_truths": auc_between(chance.suspicion, chance.pool, "suppressed", "deleted").to_json(),
            "auc_of_the_outputs_alone": meta["output"]["auc"],
            "auc_was_it_edited": was_edited(known),
            **{f"auc_was_it_edited, {name}": was_edited(known, {name: MATCHED[name]}) for name in MATCHED},
        },
        "models": {"made": len(found), "passed_the_audit_of_their_truth": len(ok), "failed": failed(found)},
        "groups": len(set(pool.group)),
        "facts": len(pool),
        "spread_in_retrained": dict(pool.spread),
    }


def main() -> None:
    parser = command_line(__doc__, HERE, report="only judge the stored scores")
    parser.add_argument("pools", nargs="?", type=Path, help="folder of the pools")
    parser.add_argument("--ship", type=Path, help="write the calibration of the whole pool to this file")
    given = parser.parse_args()
    if not given.report:
        if given.pools is None:
            parser.error("name a folder for the pools, or --report")
        materials = world_materials(WORLD, given.pools, fulls=2)
        make_pools(materials, given.pools, workers=given.workers)
        make_pools(materials, given.pools, families=tuple(CONTROLS), workers=given.workers)
        pack(SCORES, cells(given.pools))
    found = unpack(SCORES)
    summary = {"command": "experiments/003_verdict", "world": WORLD, **judge(found)}
    case = person()
    assert case.sae is not None
    summary["cost_fe"] = costs(case)
    full = case.full.hash()
    write_results(RESULTS, {**summary, "provenance": provenance(full=full)}, tables(summary))
    draw(summary, RESULTS)
    if given.ship:
        known = [c for c in found if c["family"] in FAMILIES and not c["kind"].startswith("mixture")]
        measured = {key: summary[key] for key in SHIPPED}
        made_of = {"made_by": "experiments/003_verdict", "world": WORLD, "sae": case.sae.site.hook}
        made_of |= {"references": len(case.retrained), "retrained_models": summary["retrained_models"]}
        save(fit_whole(read_pool(known), full, **made_of, **measured), given.ship)
    for key in ("auc_deleted_vs_suppressed", "false_deleted", "false_deleted_worst_family", "undetermined",
                "spearman_mixtures", "retrained_deleted"):  # fmt: skip
        print(key, summary[key]["value"], summary[key]["ci"])


if __name__ == "__main__":
    main()
