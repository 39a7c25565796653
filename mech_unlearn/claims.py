"""From verdicts on facts to claims about lists, entities and models: false discoveries, and shares freed from errors.

A p-value of .05 holds for one fact. Of a list of "deleted" claims some are wrong by chance; of a model's shares of
labels some are the verdict's own errors. Source: Benjamini and Yekutieli 2001; Vovk and Wang, arXiv 1212.4966 (twice
the mean of p-values is one again, however they depend on each other).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from mech_unlearn.core import LABELS, Verdict


def discoveries(verdicts: Sequence[Verdict], q: float = 0.05, method: Literal["bh", "by"] = "by") -> tuple[str, ...]:
    """The fact ids called deleted by calibration whose claim survives at a false discovery rate of q.

    Args:
        method: "by" holds however the facts depend on each other, "bh" needs them independent or positively dependent.

    Raises:
        ValueError: q outside (0, 1), or a deleted verdict without a p-value of suppression (a provisional one).
    """
    if not 0 < q < 1:
        raise ValueError(f"q must be between 0 and 1, got {q}")
    said = [v for v in verdicts if v.label == "deleted"]
    if not said:
        return ()
    from scipy.stats import false_discovery_control

    adjusted = false_discovery_control([_suppressed(v) for v in said], method=method)
    return tuple(v.fact_id for v, p in zip(said, adjusted, strict=True) if p <= q)


def entity_claim(verdicts: Sequence[Verdict]) -> float:
    """p-value for "the facts of this entity are suppressed": twice the mean over its facts, at most 1.

    Raises:
        ValueError: no verdict, or one without a p-value of suppression.
    """
    if not verdicts:
        raise ValueError("a claim about an entity needs at least one verdict")
    return float(min(1.0, 2 * np.mean([_suppressed(v) for v in verdicts])))


def _suppressed(verdict: Verdict) -> float:
    if "suppressed" not in verdict.p_values:
        raise ValueError(
            f"the verdict on {verdict.fact_id!r} has no p-value of suppression: it was judged without a calibration"
        )
    return verdict.p_values["suppressed"]


def corrected_shares(shares: Mapping[str, float], confusion: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Truth -> its share among the facts, from the shares of labels and how often each truth gets each label.

    Least squares q = C' pi over shares pi that are not negative and sum to one.

    Args:
        shares: label -> share of the facts, as `verdict.shares` gives them.
        confusion: truth -> label -> share, measured on models of known truth.

    Raises:
        ValueError: shares that do not sum to one, or no truth.
    """
    total = sum(shares.values())
    if not confusion or abs(total - 1) > 1e-6:
        raise ValueError(f"shares must sum to 1 (got {total:g}) and the confusion must have a truth")
    from scipy.optimize import nnls

    truths, weight = list(confusion), 1e4
    table = np.array([[confusion[t].get(label, 0.0) for t in truths] for label in LABELS])
    wanted = np.array([shares.get(label, 0.0) for label in LABELS])
    found, _ = nnls(np.vstack([table, weight * np.ones(len(truths))]), np.append(wanted, weight))
    return dict(zip(truths, (found / found.sum()).tolist(), strict=True))
