"""What a fact is judged by: numbers from the restoration tests and the model's health; pools of known truth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from mech_unlearn.verdict.result import Result

READS: Mapping[str, str] = {
    "uds_recovered": "uds",
    "uds_subject_recovered": "uds_subject",
    **{name: name for name in ("writeback", "sae", "logit_lens", "probe")},
}
"""Feature -> the restoration test whose recoverability it is: 0 as in a model that never knew, 1 as in the full one.
UDS itself runs the other way and keeps its name in tables."""
RECOVERY = tuple(READS)
"""Features that say how much of the fact is still there; each is blind somewhere, so their maximum is one more."""
FEATURES = ("output", "heldout", *RECOVERY, "strongest", "group", "neighbor_loss", "general_kl")
"""What a fact is judged by: kappa of the margin on seen and held-out phrasings (0 = retrained, 1 = full),
recoverabilities, the largest of them over their spread in retrained models, its mean over the facts of the group (what
was removed together mostly stands or falls together, and single facts are noisy), and the model's health: recall lost
by neighbours, and nats of drift on text."""
HEALTHY: Mapping[str, tuple[float, float]] = {"neighbor_loss": (0.2, 1.0), "general_kl": (0.5, 5.0)}
"""Health is read between these bounds only. Below the first a model works, and how far it is from the full one tells
from which model it descends, which is no evidence about a fact."""
LEAST_SPREAD = 0.1
"""A recoverability is not trusted more finely than this, however little retrained models vary."""

Matrix = Float[np.ndarray, "row feature"]


@dataclass(frozen=True, eq=False)
class Pool:
    """Facts in models of known truth, row by row."""

    x: Matrix
    """NaN where a feature was not measured."""
    kind: tuple[str, ...]
    """Truth, of a suppressor with its side: intact, deleted, collapsed, suppressed/late, /early, /path."""
    family: tuple[str, ...]
    cluster: tuple[str, ...]
    """The audited model."""
    group: tuple[str, ...]
    """What was removed together; groups are never split between fitting, calibrating and testing."""
    base: tuple[str, ...]
    """The model that the audited one was made from."""
    spread: Mapping[str, float] = field(default_factory=dict)
    """Recoverability -> its standard deviation over the facts of plain retrained models."""

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def truth(self) -> tuple[str, ...]:
        return tuple(kind.split("/")[0] for kind in self.kind)

    def where(self, mask: Bool[np.ndarray, " row"]) -> "Pool":
        """The rows of a mask."""
        rows = np.flatnonzero(mask)
        parts = (tuple(part[i] for i in rows) for part in (self.kind, self.family, self.cluster, self.group, self.base))
        return Pool(self.x[rows], *parts, spread=self.spread)


def matrix(
    rows: Sequence[Mapping[str, float | None]],
    together: Sequence[str],
    spread: Mapping[str, float],
    without: Sequence[str] = (),
) -> Matrix:
    """Features as numbers, from rows of measurements by name (None or absent: not measured).

    Health is cut to its bounds. Two features are added; see `summarised`.

    Args:
        without: recoverabilities that are not read.
    """
    x = np.array([[_number(row.get(name)) for name in FEATURES] for row in rows], dtype=float).reshape(
        -1, len(FEATURES)
    )
    for name, (low, high) in HEALTHY.items():
        column = FEATURES.index(name)
        x[:, column] = np.clip(x[:, column], low, high)
    return summarised(x, together, spread, without)


def summarised(x: Matrix, together: Sequence[str], spread: Mapping[str, float], without: Sequence[str] = ()) -> Matrix:
    """The features with `strongest`, the largest recoverability of a row after each was divided by its spread in
    retrained models (`LEAST_SPREAD` at least), and `group`, the mean of that over rows with the same name in
    `together` (of one model: the facts' group); recoverabilities in `without` are blanked and take no part."""
    x = x.copy()
    x[:, [FEATURES.index(name) for name in without]] = np.nan
    scaled = np.stack([x[:, FEATURES.index(name)] / max(spread[name], LEAST_SPREAD) for name in RECOVERY], 1)
    silent = np.isnan(scaled).all(1)
    strongest = np.where(silent, np.nan, np.where(np.isnan(scaled), -np.inf, scaled).max(1))
    x[:, FEATURES.index("strongest")] = strongest
    names = np.array(together)
    for name in dict.fromkeys(together):
        mine = names == name
        spoke = strongest[mine & ~silent]
        x[mine, FEATURES.index("group")] = spoke.mean() if len(spoke) else np.nan
    return x


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def measurements(
    results: Mapping[str, Result], neighbor_loss: float | None, general_kl: float | None
) -> list[dict[str, float | None]]:
    """What each fact is judged by, from the results of an audit; None where a test did not speak.

    Args:
        neighbor_loss: recall that other facts lost against the full model.
        general_kl: nats per token of generic text from the full model.
    """
    output = results["output"]
    assert output.kappa is not None
    base = output.score_retrained.mean(0)
    gap = output.score_full - base
    heldout = output.columns.get("heldout_margin")
    columns = {"output": output.kappa, "heldout": None if heldout is None else (heldout - base) / gap}
    columns |= {name: results[test].recoverability if test in results else None for name, test in READS.items()}
    rows = []
    for i in range(len(output.facts)):
        values = {name: None if column is None else column[i].item() for name, column in columns.items()}
        known = {name: None if value is None or value != value else value for name, value in values.items()}
        rows.append({**known, "neighbor_loss": neighbor_loss, "general_kl": general_kl})
    return rows


def spread_out(pool: Pool, seed: int = 0) -> list[str]:
    """The groups in an order drawn with the seed, those with models of most kinds first, which not every group has.

    Dealt out in turn, every hand gets its share of them.
    """
    names = sorted(set(pool.group))
    np.random.default_rng(seed).shuffle(names)
    kinds = {name: len({k for k, g in zip(pool.kind, pool.group, strict=True) if g == name}) for name in names}
    return sorted(names, key=lambda name: -kinds[name])
