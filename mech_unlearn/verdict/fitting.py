"""How a calibration is made from a pool: a classifier fitted on some groups, nonconformities taken from the others."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mech_unlearn.verdict.calibration import ALPHA, TRUTHS, Calibration, Scaler, filled
from mech_unlearn.verdict.features import FEATURES, RECOVERY, Matrix, Pool, spread_out, summarised

FOLDS = 8
"""One of so many parts of the groups is fitted on: a few groups are enough for that, and each group more that
calibrates makes p-values finer."""
LEAST_GROUPS = 27
"""With fewer groups of facts, a calibration that leaves one part out to be measured on has less than 19 to calibrate
on: no p-value reaches `ALPHA`."""
SEES: Mapping[str, tuple[str, ...]] = {
    "uds_recovered": ("late",), "uds_subject_recovered": ("late", "path"), "logit_lens": ("late",), "probe": ("late",),
    "writeback": ("early",), "sae": ("early",),
}  # fmt: skip
"""Recoverability -> where a block sits that it can see: reading states out shows what is blocked behind them, writing
states in what is blocked before."""


def make_scaler(x: Matrix) -> Scaler:
    """Medians, means and spreads of some rows; a column without spread is left out by a spread of infinity."""
    known = ~np.isnan(x).all(0)
    median = np.zeros(x.shape[1])
    median[known] = np.nanmedian(x[:, known], 0)
    columns = filled(x, median)
    spread = columns.std(0)
    return Scaler(median, columns.mean(0), np.where(spread > 1e-9, spread, np.inf))


def fit(pool: Pool, fit_groups: Sequence[str], calibrate_groups: Sequence[str]) -> Calibration:
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
    out: tuple[str, ...] = ()
    while True:
        x = summarised(first.x, first.cluster, first.spread, out)
        scaler = make_scaler(x)
        search = GridSearchCV(
            LogisticRegression(max_iter=2000, class_weight="balanced"),
            {"C": [0.01, 0.1, 1.0, 10.0]},
            cv=GroupKFold(min(5, len(set(first.group)))),
            scoring=_log_likelihood,
            error_score="raise",  # pyright: ignore[reportArgumentType]
        )
        search.fit(scaler(x), first.kind, groups=first.group)
        model = search.best_estimator_
        wrong = _against(model, out)
        if not wrong:
            break
        out = (*out, *wrong)
    z, kinds = scaler(x), tuple(model.classes_)
    center = np.stack([z[np.array(first.kind) == kind].mean(0) for kind in kinds])
    within = z - center[[kinds.index(kind) for kind in first.kind]]
    inverse = np.linalg.inv(np.cov(within.T) + 0.05 * np.eye(z.shape[1]))
    provenance = {
        "C": float(search.best_params_["C"]),
        "fit_groups": sorted(set(first.group)),
        "calibrate_groups": sorted(set(second.group)),
        "left_out": list(out),
    }
    blank = Calibration(
        FEATURES, scaler, kinds, np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_), {}, center, inverse,
        np.inf, pool.spread, provenance,
    )  # fmt: skip
    read = blank.read(second)
    far = float(np.quantile(blank._distance(read), 0.99))
    return replace(blank, scores=_scores(blank, second, read), far=far)


def _log_likelihood(model: Any, x: Matrix, kinds: Sequence[str]) -> float:
    """Mean log-probability (nats) of the rows' kinds, over the kinds that the model was fitted with: a fold may lack
    one."""
    known = list(model.classes_)
    rows = [i for i, kind in enumerate(kinds) if kind in known]
    p = model.predict_proba(x)[rows, [known.index(kinds[i]) for i in rows]]
    return float(np.log(np.maximum(p, 1e-12)).mean())


def _against(model: Any, out: Sequence[str]) -> list[str]:
    """Recoverabilities whose coefficient is below that for "deleted" for all the suppressors that they can see."""
    kinds = list(model.classes_)
    deleted = kinds.index("deleted")
    wrong = []
    for name in RECOVERY:
        seen = [kinds.index(f"suppressed/{side}") for side in SEES[name] if f"suppressed/{side}" in kinds]
        column = FEATURES.index(name)
        if name not in out and seen and max(model.coef_[i, column] - model.coef_[deleted, column] for i in seen) < 0:
            wrong.append(name)
    return wrong


def _scores(calibration: Calibration, pool: Pool, x: Matrix) -> dict[str, dict[str, dict[str, tuple[float, ...]]]]:
    probability = calibration.probabilities(x)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for i, truth in enumerate(pool.truth):
        here = found.setdefault(truth, {}).setdefault(pool.family[i], {})
        here.setdefault(pool.group[i], []).append(float(1 - probability[truth][i]))
    return {
        truth: {family: {g: tuple(v) for g, v in groups.items()} for family, groups in families.items()}
        for truth, families in found.items()
    }


def require_enough(groups: int) -> None:
    """ValueError where fewer than `LEAST_GROUPS` are given: no truth could ever be ruled out."""
    if groups < LEAST_GROUPS:
        raise ValueError(
            f"with facts about {groups} subjects no p-value could reach {ALPHA}, every verdict would be undetermined; "
            f"give facts about {LEAST_GROUPS} or more (40 leave room for models that fail the audit of their truth)"
        )


def fit_whole(pool: Pool, full: str, seed: int = 0, **provenance: Any) -> Calibration:
    """The calibration for use: fitted on one of `FOLDS` parts of the groups, calibrated on the others.

    Args:
        full: hash of the full model that the pool was made from.
    """
    names = spread_out(pool, seed)
    made = fit(pool, names[::FOLDS], [name for i, name in enumerate(names) if i % FOLDS])
    return replace(made, provenance={**made.provenance, "seed": seed, "full": full, **provenance})
