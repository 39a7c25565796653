"""From verdicts on facts to claims about lists, entities and models: false discoveries, and shares freed from errors.

A p-value of .05 holds for one fact. Of a list of "deleted" claims some are wrong by chance; of a model's shares of
labels some are the verdict's own errors. Source: Benjamini and Hochberg 1995; Benjamini and Yekutieli 2001.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from mech_unlearn.core import LABELS, Fact, Verdict

NULLS = ("suppressed", "intact", "collapsed")
"""What a fact may be that is wrongly called deleted."""
EXPLAINED = 0.05
"""Shares are corrected only where the corrected ones give every label's share back to this."""
BOOTSTRAP = 2000


def discoveries(
    verdicts: Sequence[Verdict], facts: Sequence[Fact], q: float = 0.05, method: Literal["bh", "by"] = "bh"
) -> tuple[str, ...]:
    """The groups of facts (people) called deleted by calibration whose claim survives at a false discovery rate of q.

    Every group with a testable fact is a hypothesis "some testable fact of this group is not deleted", whatever the
    labels, because they were chosen by the same p-values. Its p-value is that of `entity_claim`, and 1 where a testable
    fact got another label. Groups and not facts: the facts of a group stand or fall together, and p-values of a
    calibration on G groups are 1 / (G + 1) or more, which no long list of single facts survives under `by`.

    Args:
        facts: what the verdicts are about; they tell a fact's group, or its subject where it has none.
        method: "bh" (Benjamini and Hochberg 1995) holds for independent or positively dependent p-values, which is
            taken for granted of people judged by one calibration; "by" (Benjamini and Yekutieli 2001) holds for any,
            at the price of a factor of 1 + 1/2 + ... + 1/n, so that with p-values of 1 / (G + 1) long lists are out
            of reach: a warning says so.

    Raises:
        ValueError: q outside (0, 1), a verdict on none of the facts, or a deleted one without p-values (a provisional
            one).
    """
    if not 0 < q < 1:
        raise ValueError(f"q must be between 0 and 1, got {q}")
    group = {fact.id: fact.group or fact.subject for fact in facts}
    tested: dict[str, list[Verdict]] = {}
    for v in verdicts:
        if v.fact_id not in group:
            raise ValueError(f"the verdict on {v.fact_id!r} is about none of the facts given")
        if "not_testable" not in v.flags:
            tested.setdefault(group[v.fact_id], []).append(v)
    p = [entity_claim(some) if all(v.label == "deleted" for v in some) else 1.0 for some in tested.values()]
    said = [name for name, some in tested.items() if all(v.label == "deleted" for v in some)]
    if not said:
        return ()
    from scipy.stats import false_discovery_control

    adjusted = false_discovery_control(p, method=method)
    found = tuple(name for name, value in zip(tested, adjusted, strict=True) if value <= q and name in said)
    if not found:
        warnings.warn(
            f"none of {len(said)} claims of deletion survives at a false discovery rate of {q:g} ({method}): the least "
            f"p-value is {min(p):.3f}, {min(adjusted):.2f} when {len(tested)} groups are counted; a calibration on "
            "more groups gives smaller ones",
            stacklevel=2,
        )
    return found


def entity_claim(verdicts: Sequence[Verdict]) -> float:
    """p-value for "some fact of this entity is not deleted": the largest over its facts.

    Differs: twice the mean tests "no fact is deleted", and is above the largest where p-values are alike.

    Raises:
        ValueError: no verdict, or one without p-values.
    """
    if not verdicts:
        raise ValueError("a claim about an entity needs at least one verdict")
    return max(map(not_deleted, verdicts))


def not_deleted(verdict: Verdict) -> float:
    """p-value for "this fact is suppressed, intact or collapsed": the largest of the three.

    Raises:
        ValueError: a verdict without these p-values.
    """
    if missing := [truth for truth in NULLS if truth not in verdict.p_values]:
        raise ValueError(
            f"the verdict on {verdict.fact_id!r} has no p-value of {missing[0]!r}: it was judged without a calibration"
        )
    return max(verdict.p_values[truth] for truth in NULLS)


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
    table = np.array([[confusion[t].get(label, 0.0) for label in LABELS] for t in confusion])
    wanted = np.array([shares.get(label, 0.0) for label in LABELS])
    return dict(zip(confusion, _solved(wanted, table).tolist(), strict=True))


def unexplained(
    shares: Mapping[str, float], truths: Mapping[str, float], confusion: Mapping[str, Mapping[str, float]]
) -> float:
    """The largest difference, over labels, between these shares and those that the corrected ones would give: large
    where facts are judged like none of the known truths, for which a correction means nothing."""
    given = {label: sum(part * confusion[t].get(label, 0.0) for t, part in truths.items()) for label in LABELS}
    return max(abs(shares.get(label, 0.0) - given[label]) for label in LABELS)


def corrected_intervals(
    labels: Mapping[str, Mapping[str, int]], known: Mapping[str, Mapping[str, Mapping[str, int]]], seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Truth -> 95 % interval of `corrected_shares`: a joint percentile bootstrap over the audited groups and over those
    of known truth, because both the shares and the confusion were measured.

    Args:
        labels: audited group -> label -> facts.
        known: group of known truth -> truth -> label -> facts.
    """
    generator = np.random.default_rng(seed)
    ours = np.array([[row.get(label, 0) for label in LABELS] for row in labels.values()], dtype=float)
    truths = sorted({truth for group in known.values() for truth in group})
    theirs = np.array(
        [[[g.get(t, {}).get(label, 0) for label in LABELS] for t in truths] for g in known.values()], dtype=float
    )
    draws = []
    for _ in range(BOOTSTRAP):
        counts = theirs[generator.integers(len(theirs), size=len(theirs))].sum(0)
        seen = counts.sum(1) > 0
        table = counts[seen] / counts[seen].sum(1, keepdims=True)
        mine = ours[generator.integers(len(ours), size=len(ours))].sum(0)
        found = np.zeros(len(truths))
        found[seen] = _solved(mine / mine.sum(), table)
        draws.append(found)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return {truth: (float(a), float(b)) for truth, a, b in zip(truths, low, high, strict=True)}


def _solved(shares: np.ndarray, table: np.ndarray) -> np.ndarray:
    """pi >= 0 with sum 1 that brings table' pi nearest to the shares."""
    from scipy.optimize import nnls

    weight = 1e4
    found, _ = nnls(np.vstack([table.T, weight * np.ones(len(table))]), np.append(shares, weight))
    return found / found.sum()
