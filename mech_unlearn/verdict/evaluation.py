"""How good is a verdict, and any single score, on models whose truth is known?

Groups are rotated: each is judged by a calibration that saw none of its models and, where the folds go by the retrained
models that deleted ones descend from, none of their other descendants. Intervals are percentile bootstraps over
groups, because neither facts of one model nor models of one group are independent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from mech_unlearn.core import LABELS, Label, Measurement
from mech_unlearn.verdict.calibration import ALPHA
from mech_unlearn.verdict.features import Pool, spread_out
from mech_unlearn.verdict.fitting import FOLDS, fit

LEAST_BASES = 4
"""Folds go by the retrained models that deleted ones descend from if there are so many."""
DRAWS = 1000


@dataclass(frozen=True, eq=False)
class Judged:
    """Rows of a pool with what was said of them."""

    pool: Pool
    label: tuple[Label, ...]
    suspicion: Float[np.ndarray, " row"]
    """P(suppressed) / (P(suppressed) + P(deleted)) by the classifier."""
    still_there: Float[np.ndarray, " row"]
    """P(suppressed) + P(intact)."""
    unlike: Bool[np.ndarray, " row"]


def folds(pool: Pool, seed: int = 0) -> list[list[str]]:
    """The groups in parts: those whose deleted models descend from one retrained model together, so that a judged one
    descends from a model that its calibration never saw; with fewer than `LEAST_BASES` such models, in `FOLDS` parts of
    nearly equal size and make-up, drawn with the seed."""
    base = {g: b for g, b, truth in zip(pool.group, pool.base, pool.truth, strict=True) if truth == "deleted"}
    names = spread_out(pool, seed)
    bases = sorted(set(base.values()))
    if len(bases) >= LEAST_BASES:
        others = {name: bases[i % len(bases)] for i, name in enumerate(n for n in names if n not in base)}
        return [[name for name in names if (base | others)[name] == each] for each in bases]
    return [names[i::FOLDS] for i in range(FOLDS)]


def rotate(pool: Pool, seed: int = 0, alpha: float = ALPHA, extra: Pool | None = None) -> Judged:
    """Every row judged by a calibration made without its fold of groups: fitted on the next fold, calibrated
    on the rest.

    Args:
        extra: rows to be judged that take no part in any calibration (mixtures), with groups of the pool.
    """
    parts = folds(pool, seed)
    found, n = [], len(parts)
    for k in range(n):
        rest = [name for i in range(2, n) for name in parts[(k + i) % n]]
        found.append(_judge(pool if extra is None else extra, pool, parts[k], parts[(k + 1) % n], rest, alpha))
    return _joined(found)


def leave_one_out(pool: Pool, seed: int = 0, alpha: float = ALPHA) -> dict[str, Judged]:
    """Each family of suppressors judged by calibrations that saw no model of it."""
    out = {}
    families = sorted({f for f, truth in zip(pool.family, pool.truth, strict=True) if truth == "suppressed"})
    for family in families:
        own = np.array(pool.family) == family
        out[family] = rotate(pool.where(~own), seed, alpha, extra=pool.where(own))
    return out


def _judge(
    rows: Pool, pool: Pool, judged: Sequence[str], fitted: Sequence[str], calibrated: Sequence[str], alpha: float
) -> Judged:
    made = fit(pool, fitted, calibrated)
    new = rows.where(np.isin(np.array(rows.group), list(judged)))
    x = made.read(new)
    p, said = made.probabilities(x), made.judge(x, alpha)
    both = p["suppressed"] + p["deleted"]
    suspicion = np.where(both > 0, p["suppressed"] / np.maximum(both, 1e-300), 0.5)
    return Judged(new, said.labels, suspicion, p["suppressed"] + p["intact"], said.unlike)


def _joined(parts: Sequence[Judged]) -> Judged:
    pools = [part.pool for part in parts]
    columns = ("kind", "family", "cluster", "group", "base")
    pool = Pool(
        np.concatenate([p.x for p in pools]),
        *(tuple(v for p in pools for v in getattr(p, key)) for key in columns),
        spread=pools[0].spread,
    )
    arrays = (np.concatenate([getattr(part, key) for part in parts]) for key in ("suspicion", "still_there", "unlike"))
    return Judged(pool, tuple(label for part in parts for label in part.label), *arrays)


def rates(judged: Judged, left_out: Mapping[str, Judged]) -> dict[str, Any]:
    """The error rates that go with a calibration: false "deleted" overall and of the worst family of suppressors that
    the calibration did not know, what stays undetermined, how often plain retrained models are called deleted, and
    truth -> label -> share, with the same counts group by group."""
    truth, family = np.array(judged.pool.truth), np.array(judged.pool.family)
    worst = {name: called(part, np.ones(len(part.label), bool), "deleted") for name, part in left_out.items()}
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for group, true, label in zip(judged.pool.group, judged.pool.truth, judged.label, strict=True):
        here = counts.setdefault(group, {}).setdefault(true, {})
        here[label] = here.get(label, 0) + 1
    label = np.array(judged.label)
    return {
        "false_deleted": called(judged, truth == "suppressed", "deleted"),
        "false_deleted_worst_family": max(worst.values(), key=lambda m: m["value"]),
        "false_deleted_by_left_out_family": worst,
        "undetermined": called(judged, np.isin(truth, ["suppressed", "deleted"]), "undetermined"),
        "retrained_deleted": called(judged, family == "retrained", "deleted") if "retrained" in family else None,
        "confusion": {
            t: {name: float((label[truth == t] == name).mean()) for name in LABELS} for t in sorted(set(truth))
        },
        "confusion_by_group": counts,
    }


def called(judged: Judged, mask: Bool[np.ndarray, " row"], label: str) -> dict[str, Any]:
    """Share of facts with a label, its bootstrap interval over groups, and the Clopper-Pearson interval of the share of
    groups with any such fact."""
    from scipy.stats import binomtest

    hits = (np.array(judged.label) == label)[mask].astype(float)
    names = np.array(judged.pool.group)[mask]
    found = clustered([hits], [tuple(names)], np.mean, f"share of facts called {label}; n counts groups")
    any_hit = [bool(hits[names == name].any()) for name in dict.fromkeys(names)]
    exact = binomtest(sum(any_hit), len(any_hit)).proportion_ci(method="exact")
    return {
        **found.to_json(),
        "groups_with_any": {
            "value": float(np.mean(any_hit)),
            "ci": [exact.low, exact.high],
            "n": len(any_hit),
            "unit": "share of groups",
        },
    }


def model_means(values: Float[np.ndarray, " row"], names: Sequence[str]) -> dict[str, float]:
    """Model -> mean of a score over its facts, of those where it was measured."""
    array = np.array(names)
    found = {name: values[array == name] for name in dict.fromkeys(names)}
    return {name: float(np.nanmean(v)) for name, v in found.items() if not np.isnan(v).all()}


def faithfulness(
    knows: Mapping[str, float], never: Mapping[str, float], group: Mapping[str, str], seed: int = 0
) -> Measurement:
    """AUC of a model-level score for models that know the facts against models that never did.

    Source: arXiv 2605.24614, meta-evaluation (P and N pools). The interval is a bootstrap over the models' groups.
    """
    sides = [np.array(list(side.values())) for side in (knows, never)]
    names = [[group[model] for model in side] for side in (knows, never)]
    return clustered(sides, names, auc, "AUC, knows against never knew; n counts groups", seed)


def threshold(knows: Sequence[float], never: Sequence[float]) -> float:
    """The score at or above which a model is said to know: Youden's J at its largest, the middle of its gap."""
    points = np.unique(np.concatenate([knows, never]))
    cuts = np.concatenate([[-np.inf], (points[1:] + points[:-1]) / 2, [np.inf]])
    gains = [np.mean(np.asarray(knows) >= cut) - np.mean(np.asarray(never) >= cut) for cut in cuts]
    return float(cuts[int(np.argmax(gains))])


def steadiness(before: float, after: float) -> float:
    """1 - |m' - m| / (|m| + |m'|), in [0, 1]: how little an attack moves a score. Source: arXiv 2605.24614, Q."""
    return float(np.clip(1 - abs(after - before) / (abs(before) + abs(after) + 1e-12), 0, 1))


def recovery_likeness(moved: float, moved_retrained: float) -> float:
    """1 - |d_U - d_R| / (|d_U| + |d_R|), in [0, 1]: whether a score moves under relearning as in a retrained model.

    Source: arXiv 2605.24614, R.
    """
    return float(np.clip(1 - abs(moved - moved_retrained) / (abs(moved) + abs(moved_retrained) + 1e-12), 0, 1))


def auc(positive: Float[np.ndarray, " p"], negative: Float[np.ndarray, " n"]) -> float:
    """Chance that a positive row scores above a negative one, ties by half; NaN without both."""
    if not len(positive) or not len(negative):
        return float("nan")
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score([1] * len(positive) + [0] * len(negative), np.concatenate([positive, negative])))


def clustered(
    values: Sequence[Float[np.ndarray, " _"]],
    groups: Sequence[Sequence[str]],
    statistic: Callable[..., float],
    unit: str,
    seed: int = 0,
) -> Measurement:
    """A statistic of one or two samples with its 95 % bootstrap interval over groups, which both samples share."""
    generator = np.random.default_rng(seed)
    names = list(dict.fromkeys(name for side in groups for name in side))
    rows = [[np.flatnonzero(np.array(side) == name) for name in names] for side in groups]
    draws = []
    for _ in range(DRAWS):
        picked = generator.integers(len(names), size=len(names))
        at = [np.concatenate([part[i] for i in picked]) for part in rows]
        if all(map(len, at)):
            draws.append(statistic(*(v[some] for v, some in zip(values, at, strict=True))))
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Measurement(value=float(statistic(*values)), ci=(float(low), float(high)), n=len(names), unit=unit)


def auc_between(
    score: Float[np.ndarray, " row"], pool: Pool, positive: str, negative: str, seed: int = 0
) -> Measurement:
    """AUC of a score for one truth against another; rows where it was not measured are left out."""
    truth, names = np.array(pool.truth), np.array(pool.group)
    here = [(truth == side) & ~np.isnan(score) for side in (positive, negative)]
    return clustered(
        [score[mask] for mask in here],
        [tuple(names[mask]) for mask in here],
        auc,
        f"AUC, {positive} against {negative}; n counts groups",
        seed,
    )


def permuted(pool: Pool, seed: int = 0) -> Pool:
    """The pool with the truths dealt anew among its models: what a calibration finds in it is chance."""
    models = list(dict.fromkeys(pool.cluster))
    first = {name: pool.cluster.index(name) for name in models}
    order = np.random.default_rng(seed).permutation(len(models))
    dealt: Mapping[str, int] = {name: first[models[i]] for name, i in zip(models, order, strict=True)}
    rows = [dealt[name] for name in pool.cluster]
    return Pool(
        pool.x,
        tuple(pool.kind[i] for i in rows),
        tuple(pool.family[i] for i in rows),
        pool.cluster,
        pool.group,
        ("",) * len(pool),
        spread=pool.spread,
    )
