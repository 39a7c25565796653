"""How good is a verdict, and any single score, on models whose truth is known?

Groups are rotated: each is judged by a calibration that saw none of its models. Intervals are percentile bootstraps
over clusters (audited models), because facts of one model are not independent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from mech_unlearn.calibration import ALPHA, fit, label_of, verdict_sets
from mech_unlearn.core import Label, Measurement
from mech_unlearn.features import FEATURES, Pool, spread_out

FOLDS = 8
"""Rotations: one fold of groups is judged, one is fitted on, the others calibrate."""
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
    """The groups in FOLDS parts of nearly equal size and make-up, drawn with the seed."""
    names = spread_out(pool, seed)
    return [names[i::FOLDS] for i in range(FOLDS)]


def rotate(pool: Pool, seed: int = 0, alpha: float = ALPHA, extra: Pool | None = None) -> Judged:
    """Every row judged by a calibration made without its group.

    Args:
        extra: rows to be judged that take no part in any calibration (mixtures), with groups of the pool.
    """
    parts = folds(pool, seed)
    found = []
    for k in range(FOLDS):
        rest = [name for i in range(2, FOLDS) for name in parts[(k + i) % FOLDS]]
        found.append(_judge(pool if extra is None else extra, pool, parts[k], parts[(k + 1) % FOLDS], rest, alpha))
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
    p = made.probabilities(new.x)
    both = p["suppressed"] + p["deleted"]
    labels: tuple[Label, ...] = tuple(label_of(left) for left in verdict_sets(made.p_values(new.x), alpha))
    suspicion = np.where(both > 0, p["suppressed"] / np.maximum(both, 1e-300), 0.5)
    return Judged(new, labels, suspicion, p["suppressed"] + p["intact"], made.unlike(new.x))


def _joined(parts: Sequence[Judged]) -> Judged:
    pools = [part.pool for part in parts]
    pool = Pool(
        np.concatenate([p.x for p in pools]),
        *(tuple(v for p in pools for v in getattr(p, key)) for key in ("kind", "family", "cluster", "group")),
        spread=pools[0].spread,
    )
    arrays = (np.concatenate([getattr(part, key) for part in parts]) for key in ("suspicion", "still_there", "unlike"))
    return Judged(pool, tuple(label for part in parts for label in part.label), *arrays)


def model_means(values: Float[np.ndarray, " row"], names: Sequence[str]) -> dict[str, float]:
    """Model -> mean of a score over its facts, of those where it was measured."""
    array = np.array(names)
    found = {name: values[array == name] for name in dict.fromkeys(names)}
    return {name: float(np.nanmean(v)) for name, v in found.items() if not np.isnan(v).all()}


def faithfulness(knows: Mapping[str, float], never: Mapping[str, float], seed: int = 0) -> Measurement:
    """AUC of a model-level score for models that know the facts against models that never did.

    Source: arXiv 2605.24614, meta-evaluation (P and N pools). The interval is a bootstrap over models.
    """
    sides = [np.array(list(side.values())) for side in (knows, never)]
    return clustered(sides, [list(knows), list(never)], auc, "AUC, knows against never knew; n counts models", seed)


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
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positive, negative]))
    return float((ranks[: len(positive)].sum() / len(positive) - (len(positive) + 1) / 2) / len(negative))


def clustered(
    values: Sequence[Float[np.ndarray, " side"]], clusters: Sequence[Sequence[str]], statistic, unit: str, seed: int = 0
) -> Measurement:
    """A statistic of one or two samples with its 95 % bootstrap interval over clusters; n counts clusters."""
    generator = np.random.default_rng(seed)
    rows = []
    for side in clusters:
        names = np.array(side)
        rows.append([np.flatnonzero(names == name) for name in dict.fromkeys(side)])
    draws = []
    for _ in range(DRAWS):
        picked = [np.concatenate([part[i] for i in generator.integers(len(part), size=len(part))]) for part in rows]
        draws.append(statistic(*(v[at] for v, at in zip(values, picked, strict=True))))
    low, high = np.nanquantile(draws, [0.025, 0.975])
    value = float(statistic(*values))
    return Measurement(value=value, ci=(float(low), float(high)), n=sum(map(len, rows)), unit=unit)


def auc_between(
    score: Float[np.ndarray, " row"], pool: Pool, positive: str, negative: str, seed: int = 0
) -> Measurement:
    """AUC of a score for one truth against another; rows where it was not measured are left out."""
    truth, names = np.array(pool.truth), np.array(pool.cluster)
    here = [(truth == side) & ~np.isnan(score) for side in (positive, negative)]
    return clustered(
        [score[mask] for mask in here],
        [tuple(names[mask]) for mask in here],
        auc,
        f"AUC, {positive} against {negative}; n counts models",
        seed,
    )


def share(judged: Judged, truth: str, label: str, seed: int = 0) -> Measurement:
    """Share of the facts of a truth that got a label; clusters are models."""
    mask = np.array(judged.pool.truth) == truth
    hits = (np.array(judged.label) == label)[mask].astype(float)
    names = tuple(np.array(judged.pool.cluster)[mask])
    return clustered(
        [hits], [names], lambda x: x.mean(), f"share of {truth} facts called {label}; n counts models", seed
    )


def single_scores(pool: Pool, seed: int = 0) -> dict[str, Measurement]:
    """AUC of every single feature for suppressed against deleted."""
    return {name: auc_between(pool.x[:, i], pool, "suppressed", "deleted", seed) for i, name in enumerate(FEATURES)}


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
        spread=pool.spread,
    )
