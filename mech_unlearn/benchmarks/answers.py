"""What a model answered, row by row, as it lies in a run's cells, and the numbers that are read from it.

A cell is written once per model and benchmark; numbers that compare two models are read from two cells, so that no
model is asked twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Fact, Measurement, RetainSet
from mech_unlearn.metrics.intervals import RowScores

ScoreKind = Literal["generated", "teacher-forced", "weights", "both"]
"""Greedy text, given answers, the model's weights, or a mean of the first two that a benchmark itself takes."""
Answers = Mapping[str, Any]
"""A cell: JSON values only."""


@dataclass(frozen=True)
class Number:
    """A number of a benchmark and what it was measured on."""

    kind: ScoreKind
    value: Measurement | str
    """Or why there is none."""


Numbers = dict[str, Number]


@dataclass(frozen=True, kw_only=True)
class BenchmarkFacts:
    """The facts of a benchmark that the restoration tests ask for, and those to be kept."""

    facts: tuple[Fact, ...] = ()
    retain: RetainSet = RetainSet()
    notes: tuple[str, ...] = ()
    """What is asked for by no fact, and why; one line each."""


def keep(scores: Mapping[str, RowScores], kind: ScoreKind) -> dict[str, Any]:
    """Scores by name, as JSON."""
    return {
        name: {
            "kind": kind,
            "unit": found.unit,
            "values": found.values.tolist(),
            "clusters": None if found.clusters is None else [str(cluster) for cluster in found.clusters],
            "texts": list(found.texts),
        }
        for name, found in scores.items()
    }


def scores_of(kept: Mapping[str, Any]) -> RowScores:
    """One entry of `keep`, read back."""
    clusters = kept["clusters"]
    return RowScores(
        values=numbers_in(kept["values"]),
        unit=kept["unit"],
        clusters=None if clusters is None else tuple(clusters),
        texts=tuple(kept["texts"]),
    )


def numbers_in(values: Sequence[float | None]) -> Float[Tensor, " row"]:
    """A JSON list as a tensor; null, which stands for no number, is NaN."""
    return torch.tensor([float("nan") if x is None else x for x in values], dtype=torch.float64)


def means(answers: Answers, seed: int) -> Numbers:
    """The mean of each of the cell's scores, in their order; a reason where no row has a number."""
    out = {}
    for name, kept in answers["scores"].items():
        found = scores_of(kept)
        empty = bool(found.values.isnan().all())
        out[name] = Number(kept["kind"], "no row has a value" if empty else found.mean(seed))
    return out


def pooled(scores: Sequence[RowScores]) -> RowScores:
    """The rows of several scores of one unit, together."""
    known = all(one.clusters is not None for one in scores)
    return RowScores(
        values=torch.cat([one.values for one in scores]),
        unit=scores[0].unit,
        clusters=tuple(c for one in scores for c in one.clusters or ()) if known else None,
        texts=tuple(text for one in scores for text in one.texts),
    )


def counted(reasons: Sequence[str]) -> str:
    """Reasons with how often each was given, commonest first, in one line."""
    from collections import Counter

    return "; ".join(f"{count} ({reason})" for reason, count in Counter(reasons).most_common())
