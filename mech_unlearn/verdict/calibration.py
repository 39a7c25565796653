"""Error rates for verdicts, from models whose truth is known: classifier, conformal p-values, verdict sets.

A *pool* is a table of facts in models of known truth (`testbed/pools.py`): one row per fact, its features, and the
*cluster* it belongs to, which is one audited model, and the *group* of facts that the model is about. A `Calibration`
is fitted on some groups and calibrated on others; it gives each fact of a new model one p-value per truth: how unusual
the fact would be if that were so.

Source: class-conditional (Mondrian) conformal prediction (Vovk 2012, arXiv 1209.2673) with groups in place of rows,
because facts of one model and models of one group are not independent:
p_c = (1 + sum_g mean_j mean_i [a_c(x_gji) >= a_c(x)]) / (G + 1), over the models j of group g and their facts i.
What is exchangeable is the group. Deleted models descend from a few retrained ones; that a verdict holds for models of
another training run is measured by rotating over those (`meta_evaluation`), not guaranteed.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from mech_unlearn.core import Label
from mech_unlearn.files import write_json
from mech_unlearn.verdict.calibration_file import FORMAT, read_calibration
from mech_unlearn.verdict.features import FEATURES, RECOVERY, Matrix, Pool, summarised

TRUTHS: tuple[Label, ...] = ("intact", "suppressed", "deleted", "collapsed")
ALPHA = 0.05


@dataclass(frozen=True, eq=False)
class Scaler:
    """Missing values become medians with an indicator beside them; then every column is standardised."""

    median: Float[np.ndarray, " feature"]
    mean: Float[np.ndarray, " column"]
    scale: Float[np.ndarray, " column"]

    def __call__(self, x: Matrix) -> Float[np.ndarray, "row column"]:
        return (filled(x, self.median) - self.mean) / self.scale


def filled(x: Matrix, median: Float[np.ndarray, " feature"]) -> Float[np.ndarray, "row column"]:
    """Medians in place of what is missing, and an indicator of that behind each feature."""
    missing = np.isnan(x)
    return np.concatenate([np.where(missing, median, x), missing.astype(float)], 1)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What turns features into p-values."""

    features: tuple[str, ...]
    scaler: Scaler
    kinds: tuple[str, ...]
    weights: Float[np.ndarray, "kind column"]
    bias: Float[np.ndarray, " kind"]
    scores: Mapping[str, Mapping[str, Mapping[str, tuple[float, ...]]]]
    """Truth -> family -> group -> nonconformities of the facts of its model."""
    center: Float[np.ndarray, "kind column"]
    inverse: Float[np.ndarray, "column column"]
    far: float
    """Squared Mahalanobis distance from the nearest kind beyond which a fact is unlike the pool."""
    spread: Mapping[str, float]
    """As in the pool."""
    provenance: Mapping[str, Any]

    def describe(self) -> str:
        """One line that goes with every table of verdicts."""
        models = sum(len(groups) for families in self.scores.values() for groups in families.values())
        count = len({g for families in self.scores.values() for groups in families.values() for g in groups})
        suppressors = ", ".join(self.scores["suppressed"])
        bases = self.provenance.get("retrained_models")
        descent = f" Its deleted models descend from {bases} retrained ones." if bases else ""
        wrong = [self.provenance.get(f"false_deleted{key}") for key in ("", "_worst_family")]
        known, unknown = (f"{m['value']:.3f} [{m['ci'][0]:.3f}, {m['ci'][1]:.3f}]" if m else None for m in wrong)
        world = f" of the world {self.provenance['world']} only" if "world" in self.provenance else ""
        measured = (
            f" Measured by rotation on groups{world} that the judging one had not seen: {known} of suppressed facts "
            f"are called deleted{_of_groups(wrong[0])}, {unknown} in the worst family that it did not know."
            if known and unknown
            else ""
        )
        never = [f"{truth} (least p-value {p:.2f})" for truth, p in self.least_p().items() if p > ALPHA]
        return (
            f"Calibrated verdicts: a truth is ruled out at p <= {ALPHA}, from {models} models of {count} groups whose "
            f"truth is known.{descent}{measured} The error rate holds for single facts and for suppressors like those "
            f"known ({suppressors}), each of which blocks in one place: two blocks at once passed for a deletion "
            "where that was tried (biographies)."
            + (f" Too few groups were calibrated on to ever rule out {', '.join(never)}." if never else "")
        )

    @property
    def left_out(self) -> tuple[str, ...]:
        """Recoverabilities that are not read."""
        return tuple(self.provenance.get("left_out", ()))

    def in_sample(self, full: str | None, groups: Sequence[str]) -> tuple[bool, ...] | None:
        """Whether each group of facts was fitted or calibrated on, in the full model of this hash; None where the
        calibration does not tell which groups those were, or of which model."""
        told = self.provenance
        if full is None or "full" not in told or not {"fit_groups", "calibrate_groups"} <= told.keys():
            return None
        ours = {*told["fit_groups"], *told["calibrate_groups"]} if told["full"] == full else set()
        return tuple(group in ours for group in groups)

    def read(self, pool: Pool) -> Matrix:
        """The features of a pool's facts as this calibration reads them: summaries without what is left out."""
        return summarised(pool.x, pool.cluster, pool.spread, self.left_out) if self.left_out else pool.x

    def _models(self, truth: str) -> list[list[list[Sequence[float]]]]:
        """The models of each group, as one list, or one list per family of suppressors."""
        families = self.scores.get(truth, {}).values()
        if truth == "suppressed":
            return [[[values] for values in groups.values()] for groups in families]
        together: dict[str, list[Sequence[float]]] = {}
        for groups in families:
            for name, values in groups.items():
                together.setdefault(name, []).append(values)
        return [list(together.values())] if together else []

    def least_p(self) -> dict[str, float]:
        """Truth -> the smallest p-value that it can get, by the number of groups calibrated on."""
        return {truth: 1 / (min(map(len, self._models(truth)), default=0) + 1) for truth in TRUTHS}

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
        return {
            truth: np.max([conformal_p(1 - p, groups) for groups in self._models(truth)] or [np.ones(len(x))], 0)
            for truth, p in self.probabilities(x).items()
        }

    def judge(self, x: Matrix, alpha: float = ALPHA) -> "Judgement":
        """What is said of each row: the only truth left, unless the row is unlike the pool, or "deleted" is left while
        no test patched its states, or none tried to bring it back inside."""
        p, unlike = self.p_values(x), self.unlike(x)
        spoke = {name: ~np.isnan(x[:, FEATURES.index(name)]) for name in RECOVERY}
        blind = ~(spoke["uds_recovered"] | spoke["uds_subject_recovered"]) | ~(spoke["writeback"] | spoke["sae"])
        left = verdict_sets(p, alpha)
        labels: list[Label] = [
            "undetermined" if unlike[i] or (blind[i] and only == ("deleted",)) else label_of(only)
            for i, only in enumerate(left)
        ]
        return Judgement(tuple(labels), tuple(left), p, unlike, blind)

    def unlike(self, x: Matrix) -> Bool[np.ndarray, " row"]:
        """Whether a fact's features lie farther from every kind than nearly all of the pool's own."""
        return self._distance(x) > self.far

    def _distance(self, x: Matrix) -> Float[np.ndarray, " row"]:
        off = self.scaler(x)[:, None] - self.center
        return np.einsum("rkc,cd,rkd->rk", off, self.inverse, off).min(1)


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a calibration says of rows."""

    labels: tuple[Label, ...]
    left: tuple[tuple[Label, ...], ...]
    """The truths that are not ruled out."""
    p: Mapping[str, Float[np.ndarray, " row"]]
    unlike: Bool[np.ndarray, " row"]
    """Farther from every kind of the pool than nearly all of its own."""
    blind: Bool[np.ndarray, " row"]
    """The tests that spoke cannot show a deletion."""


def _of_groups(measured: Mapping[str, Any] | None) -> str:
    """The share of groups with any such fact, in brackets, where it was measured: what holds for facts is shown for
    groups far less sharply."""
    if not measured or "groups_with_any" not in measured:
        return ""
    found = measured["groups_with_any"]
    low, high = found["ci"]
    return f" (any of a group's: {found['value']:.3f} [{low:.3f}, {high:.3f}] of {found['n']} groups)"


def conformal_p(
    given: Float[np.ndarray, " row"], groups: Sequence[Sequence[Sequence[float]]]
) -> Float[np.ndarray, " row"]:
    """(1 + sum over groups of the mean over their models of the share of nonconformities at or above the given one) /
    (groups + 1).

    With G groups no p-value is below 1 / (G + 1); with none it is 1.
    """
    total = np.ones(len(given))
    for models in groups:
        total += np.mean([(np.asarray(values)[None] >= given[:, None]).mean(1) for values in models], 0)
    return total / (len(groups) + 1)


def verdict_sets(p: Mapping[str, Float[np.ndarray, " row"]], alpha: float = ALPHA) -> list[tuple[Label, ...]]:
    """The truths that each row does not rule out."""
    rows = len(next(iter(p.values())))
    return [tuple(truth for truth in TRUTHS if p[truth][i] > alpha) for i in range(rows)]


def label_of(left: Sequence[Label]) -> Label:
    """The only truth left, else undetermined."""
    return left[0] if len(left) == 1 else "undetermined"


SHIPPED = Path(__file__).parent / "calibrations"


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
    write_json(Path(path), {
        "format": FORMAT,
        "features": list(calibration.features),
        "scaler": {key: np.asarray(value).tolist() for key, value in vars(calibration.scaler).items()},
        "kinds": list(calibration.kinds),
        **{key: getattr(calibration, key).tolist() for key in ("weights", "bias", "center", "inverse")},
        "scores": {
            truth: {family: {g: list(v) for g, v in groups.items()} for family, groups in families.items()}
            for truth, families in calibration.scores.items()
        },
        "far": calibration.far,
        "spread": dict(calibration.spread),
        "provenance": dict(calibration.provenance),
    })  # fmt: skip


def load(path: str | os.PathLike) -> Calibration:
    """Read what `save` wrote.

    Raises:
        ValueError: no such file, a damaged one, not a calibration, or one of other features.
    """
    saved = read_calibration(path)
    return Calibration(
        features=FEATURES,
        scaler=Scaler(
            median=np.array(saved.scaler.median),
            mean=np.array(saved.scaler.mean),
            scale=np.array([np.inf if spread is None else spread for spread in saved.scaler.scale]),
        ),
        kinds=tuple(saved.kinds),
        weights=np.array(saved.weights),
        bias=np.array(saved.bias),
        scores={
            truth: {family: {g: tuple(v) for g, v in groups.items()} for family, groups in families.items()}
            for truth, families in saved.scores.items()
        },
        center=np.array(saved.center),
        inverse=np.array(saved.inverse),
        far=saved.far,
        spread=saved.spread,
        provenance=saved.provenance.model_dump(exclude_unset=True),
    )
