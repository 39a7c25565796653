"""Error rates for verdicts, from models whose truth is known: classifier, conformal p-values, verdict sets.

A *pool* is a table of facts in models of known truth (`testbed/pools.py`): one row per fact, its features, and the
*cluster* it belongs to, which is one audited model. A `Calibration` is fitted on some groups of facts and calibrated on
others; it gives each fact of a new model one p-value per truth: how unusual the fact would be if that were so.

Source: class-conditional (Mondrian) conformal prediction (Vovk 2012, arXiv 1209.2673) with clusters in place of rows,
because facts of one model are not independent: p_c = (1 + sum_j mean_i [a_c(x_ij) >= a_c(x)]) / (J + 1).
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from mech_unlearn.core import Label
from mech_unlearn.features import FEATURES, RECOVERY, Matrix, Pool, spread_out

TRUTHS: tuple[Label, ...] = ("intact", "suppressed", "deleted", "collapsed")
ALPHA = 0.05
LEAST_GROUPS = 29
"""With fewer groups of facts `fit_whole` calibrates on less than 19 models a family: no p-value reaches `ALPHA`."""


@dataclass(frozen=True, eq=False)
class Scaler:
    """Missing values become medians with an indicator beside them; then every column is standardised."""

    median: Float[np.ndarray, " feature"]
    mean: Float[np.ndarray, " column"]
    scale: Float[np.ndarray, " column"]

    def __call__(self, x: Matrix) -> Float[np.ndarray, "row column"]:
        return (_filled(x, self.median) - self.mean) / self.scale


def _filled(x: Matrix, median: Float[np.ndarray, " feature"]) -> Float[np.ndarray, "row column"]:
    missing = np.isnan(x)
    return np.concatenate([np.where(missing, median, x), missing.astype(float)], 1)


def make_scaler(x: Matrix) -> Scaler:
    """Medians, means and spreads of some rows; a column without spread is left out by a spread of infinity."""
    known = ~np.isnan(x).all(0)
    median = np.zeros(x.shape[1])
    median[known] = np.nanmedian(x[:, known], 0)
    columns = _filled(x, median)
    spread = columns.std(0)
    return Scaler(median, columns.mean(0), np.where(spread > 1e-9, spread, np.inf))


@dataclass(frozen=True, eq=False)
class Calibration:
    """What turns features into p-values."""

    features: tuple[str, ...]
    scaler: Scaler
    kinds: tuple[str, ...]
    weights: Float[np.ndarray, "kind column"]
    bias: Float[np.ndarray, " kind"]
    scores: Mapping[str, Mapping[str, tuple[tuple[float, ...], ...]]]
    """Truth -> family -> nonconformities of its facts, one tuple per calibration model."""
    center: Float[np.ndarray, "kind column"]
    inverse: Float[np.ndarray, "column column"]
    far: float
    """Squared Mahalanobis distance from the nearest kind beyond which a fact is unlike the pool."""
    spread: Mapping[str, float]
    """As in the pool."""
    provenance: Mapping[str, Any]

    def describe(self) -> str:
        """One line that goes with every table of verdicts."""
        models = sum(count for families in self.provenance["models"].values() for count in families.values())
        suppressors = ", ".join(self.scores["suppressed"])
        never = [f"{truth} (least p-value {p:.2f})" for truth, p in self.least_p().items() if p > ALPHA]
        return (
            f"Calibrated verdicts: a truth is ruled out at p <= {ALPHA}, from {models} models whose truth is known. "
            f"The error rate holds for single facts and for suppressors like those known ({suppressors})."
            + (f" Too few models were calibrated on to ever rule out {', '.join(never)}." if never else "")
        )

    def least_p(self) -> dict[str, float]:
        """Truth -> the smallest p-value that it can get, by the number of models calibrated on."""
        counts = {truth: [len(clusters) for clusters in self.scores.get(truth, {}).values()] for truth in TRUTHS}
        return {
            truth: 1 / ((min(each, default=0) if truth == "suppressed" else sum(each)) + 1)
            for truth, each in counts.items()
        }

    def probabilities(self, x: Matrix) -> dict[str, Float[np.ndarray, " row"]]:
        """Truth -> probability by the classifier; those of the kinds of suppressors are summed."""
        z = self.scaler(x) @ self.weights.T + self.bias
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return {
            truth: p[:, [i for i, kind in enumerate(self.kinds) if kind.split("/")[0] == truth]].sum(1)
            for truth in TRUTHS
        }

    def p_values(self, x: Matrix) -> dict[str, Float[np.ndarray, " row"]]:
        """Truth -> p-value of each row. That of "suppressed" is the largest over the families of suppressors, so that
        it holds for a model of any one of them."""
        out = {}
        for truth, p in self.probabilities(x).items():
            families = self.scores.get(truth, {})
            if truth == "suppressed":
                each = [conformal_p(1 - p, clusters) for clusters in families.values()]
                out[truth] = np.max(each, 0) if each else np.ones(len(x))
            else:
                out[truth] = conformal_p(1 - p, [c for clusters in families.values() for c in clusters])
        return out

    def unlike(self, x: Matrix) -> Bool[np.ndarray, " row"]:
        """Whether a fact's features lie farther from every kind than nearly all of the pool's own."""
        return self._distance(x) > self.far

    def _distance(self, x: Matrix) -> Float[np.ndarray, " row"]:
        off = self.scaler(x)[:, None] - self.center
        return np.einsum("rkc,cd,rkd->rk", off, self.inverse, off).min(1)


def conformal_p(given: Float[np.ndarray, " row"], clusters: Sequence[Sequence[float]]) -> Float[np.ndarray, " row"]:
    """(1 + sum over clusters of the share of their nonconformities at or above the given one) / (clusters + 1).

    With J clusters no p-value is below 1 / (J + 1); with none it is 1.
    """
    shares = [(np.asarray(cluster)[None] >= given[:, None]).mean(1) for cluster in clusters]
    return (1 + np.sum(shares, 0) if shares else np.ones(len(given))) / (len(clusters) + 1)


def verdict_sets(p: Mapping[str, Float[np.ndarray, " row"]], alpha: float = ALPHA) -> list[tuple[Label, ...]]:
    """The truths that each row does not rule out."""
    rows = len(next(iter(p.values())))
    return [tuple(truth for truth in TRUTHS if p[truth][i] > alpha) for i in range(rows)]


def label_of(left: Sequence[Label]) -> Label:
    """The only truth left, else undetermined."""
    return left[0] if len(left) == 1 else "undetermined"


def fit(pool: Pool, fit_groups: Sequence[str], calibrate_groups: Sequence[str], seed: int = 0) -> Calibration:
    """Fit the classifier on the models of some groups and take nonconformities from those of others.

    Multinomial logistic regression with an L2 penalty chosen by cross-validation over groups. A recoverability that
    speaks for "deleted" rather than for the suppressors that it can see is left out.

    Raises:
        ValueError: a group on both sides, or a truth that one of the sides lacks.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, GroupKFold

    if both := set(fit_groups) & set(calibrate_groups):
        raise ValueError(f"group {sorted(both)[0]!r} is both in the fit and in the calibration")
    groups = np.array(pool.group)
    first, second = (pool.where(np.isin(groups, list(some))) for some in (fit_groups, calibrate_groups))
    for name, part in (("fit", first), ("calibration", second)):
        if absent := [truth for truth in TRUTHS if truth not in part.truth]:
            raise ValueError(f"the {name} groups have no model whose truth is {absent[0]!r}")
    kept = np.ones(pool.x.shape[1], dtype=bool)
    while True:
        x = np.where(kept, first.x, np.nan)
        scaler = make_scaler(x)
        search = GridSearchCV(
            LogisticRegression(max_iter=2000, class_weight="balanced"),
            {"C": [0.01, 0.1, 1.0, 10.0]},
            cv=GroupKFold(min(5, len(set(first.group)))),
            scoring="neg_log_loss",
        )
        search.fit(scaler(x), first.kind, groups=first.group)
        model = search.best_estimator_
        wrong = _against(model, kept)
        if not wrong:
            break
        kept[wrong] = False
    z = scaler(np.where(kept, first.x, np.nan))
    kinds = tuple(model.classes_)
    center = np.stack([z[np.array(first.kind) == kind].mean(0) for kind in kinds])
    within = z - center[[kinds.index(kind) for kind in first.kind]]
    inverse = np.linalg.inv(np.cov(within.T) + 0.05 * np.eye(z.shape[1]))
    blank = Calibration(
        FEATURES, scaler, kinds, np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_), {}, center, inverse,
        np.inf, pool.spread, {},
    )  # fmt: skip
    scores = _scores(blank, second)
    far = float(np.quantile(blank._distance(second.x), 0.99))
    provenance = {
        "C": float(search.best_params_["C"]),
        "fit_groups": sorted(set(first.group)),
        "calibrate_groups": sorted(set(second.group)),
        "left_out": [FEATURES[i] for i in np.flatnonzero(~kept)],
        "models": {truth: {f: len(c) for f, c in families.items()} for truth, families in scores.items()},
        "seed": seed,
    }
    return replace(blank, scores=scores, far=far, provenance=provenance)


def _against(model: Any, kept: Bool[np.ndarray, " feature"]) -> list[int]:
    """Recoverabilities whose coefficient for every kind of suppressor is below that for "deleted"."""
    kinds = list(model.classes_)
    suppressed = [i for i, kind in enumerate(kinds) if kind.startswith("suppressed")]
    deleted = kinds.index("deleted")
    columns = [FEATURES.index(name) for name in RECOVERY if kept[FEATURES.index(name)]]
    return [j for j in columns if max(model.coef_[i, j] - model.coef_[deleted, j] for i in suppressed) < 0]


def _scores(calibration: Calibration, pool: Pool) -> dict[str, dict[str, tuple[tuple[float, ...], ...]]]:
    probability = calibration.probabilities(pool.x)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for i, truth in enumerate(pool.truth):
        here = found.setdefault(truth, {}).setdefault(pool.family[i], {})
        here.setdefault(pool.cluster[i], []).append(float(1 - probability[truth][i]))
    return {
        truth: {family: tuple(map(tuple, clusters.values())) for family, clusters in families.items()}
        for truth, families in found.items()
    }


SHIPPED = Path(__file__).parent / "testbed" / "calibrations"


def require_enough(groups: int) -> None:
    """ValueError where fewer than `LEAST_GROUPS` are given: no truth could ever be ruled out."""
    if groups < LEAST_GROUPS:
        raise ValueError(
            f"with facts about {groups} subjects no p-value could reach {ALPHA}, every verdict would be undetermined; "
            f"give facts about {LEAST_GROUPS} or more (40 leave room for models that fail the audit of their truth)"
        )


def fit_whole(pool: Pool, full: str, seed: int = 0, **provenance: Any) -> Calibration:
    """The calibration for use: fitted on a third of the groups, calibrated on the others.

    Args:
        full: hash of the full model that the pool was made from.
    """
    names = spread_out(pool, seed)
    made = fit(pool, names[::3], [name for i, name in enumerate(names) if i % 3], seed)
    return replace(made, provenance={**made.provenance, "full": full, **provenance})


def shipped(full: str) -> Calibration | None:
    """The calibration that comes with the package for the full model of this hash, if there is one.

    Error rates hold for the models they were measured on, so a model that none was made for gets none.
    """
    for path in sorted(SHIPPED.glob("*.json")):
        made = load(path)
        if made.provenance.get("full") == full:
            return made
    return None


def save(calibration: Calibration, path: str | os.PathLike) -> None:
    """Write as JSON, atomically."""
    from mech_unlearn.run import write_json

    write_json(Path(path), {
        "format": "mech_unlearn.calibration/1",
        "features": list(calibration.features),
        "scaler": {key: np.asarray(value).tolist() for key, value in vars(calibration.scaler).items()},
        "kinds": list(calibration.kinds),
        **{key: getattr(calibration, key).tolist() for key in ("weights", "bias", "center", "inverse")},
        "scores": {t: {f: [list(c) for c in cs] for f, cs in fs.items()} for t, fs in calibration.scores.items()},
        "far": calibration.far,
        "spread": dict(calibration.spread),
        "provenance": dict(calibration.provenance),
    })  # fmt: skip


def load(path: str | os.PathLike) -> Calibration:
    """Read what `save` wrote.

    Raises:
        ValueError: not a calibration, or one of other features.
    """
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    if data.get("format") != "mech_unlearn.calibration/1" or tuple(data["features"]) != FEATURES:
        raise ValueError(f"{os.fspath(path)!r} is no calibration of the features {', '.join(FEATURES)}; make it anew")
    scaler = {key: np.array([np.inf if v is None else v for v in values]) for key, values in data["scaler"].items()}
    return Calibration(
        features=FEATURES,
        scaler=Scaler(**scaler),
        kinds=tuple(data["kinds"]),
        weights=np.array(data["weights"]),
        bias=np.array(data["bias"]),
        scores={t: {f: tuple(map(tuple, cs)) for f, cs in fs.items()} for t, fs in data["scores"].items()},
        center=np.array(data["center"]),
        inverse=np.array(data["inverse"]),
        far=data["far"],
        spread=data["spread"],
        provenance=data["provenance"],
    )
