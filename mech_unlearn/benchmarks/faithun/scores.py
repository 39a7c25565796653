"""FaithUn: is forgetting superficial, too little (paraphrases, several hops) or too much (same answer elsewhere)?

Paper: Yang et al. 2025, arXiv 2502.19207: five sets of questions: base, paraphrased and multi-hop ones of the forgotten
    clusters, those of the test clusters, and other questions with the same answer.
Needs: multiple-choice accuracy of each set (multiple_choice.py; the benchmark gives false options).
Differs: the names of the numbers and their mean are this package's: the paper's own formulas were not to be found.
    `score` is the mean of (1 - UA_base, 1 - UA_paraphrase, 1 - UA_multihop, TA, SA_keep). Questions of one cluster are
    drawn together over all sets.
Fails: with four options accuracy cannot fall below guessing for a model that only forgot: `score` of a perfect deletion
    is below 1; compare with a retrained model.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Measurement
from mech_unlearn.metrics.intervals import RowScores, statistic_ci

SETS = {
    "base": "UA_base",
    "paraphrase": "UA_paraphrase",
    "multihop": "UA_multihop",
    "test": "TA",
    "same_answer": "SA_keep",
}
"""Set of questions -> the name of its accuracy: UA of what is to be forgotten (lower is better), TA and SA_keep of what
is to be kept (higher is better)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class FaithUnScores:
    """What one model answers in the five sets."""

    correct: Mapping[str, RowScores]
    """By set."""
    accuracy: Mapping[str, Measurement]
    """By the names in `SETS`."""
    score: Measurement
    """Mean of (1 - UA_base, 1 - UA_paraphrase, 1 - UA_multihop, TA, SA_keep)."""
    under_erased: Measurement
    """Superficial by too little: the larger of UA_paraphrase and UA_multihop, minus UA_base."""


def summary(correct: Mapping[str, RowScores], seed: int = 0) -> FaithUnScores:
    """The numbers of FaithUn from which questions were answered, by set.

    Raises:
        ValueError: a set that is missing, unknown or empty, or sets scored in different variants.
    """
    _check({name: scores.values for name, scores in correct.items()})
    units = {scores.unit for scores in correct.values()}
    if len(units) > 1:
        raise ValueError(f"the sets were scored in different variants: {', '.join(sorted(units))}")
    table, clusters = _joint(correct)
    unit = units.pop()
    return FaithUnScores(
        correct=dict(correct),
        accuracy={called: correct[name].mean(seed) for name, called in SETS.items()},
        score=statistic_ci(table, _score, f"FaithUn score from {unit}", clusters, seed),
        under_erased=statistic_ci(
            table, lambda m: m[:, 1:3].amax(1) - m[:, 0], f"excess over base of {unit}", clusters, seed
        ),
    )


def _check(sets: Mapping[str, Sequence | Tensor]) -> None:
    if set(sets) != set(SETS):
        raise ValueError(f"FaithUn has the sets {', '.join(SETS)}; found {', '.join(sets) or 'none'}")
    for name, rows in sets.items():
        if len(rows) == 0:
            raise ValueError(f"FaithUn set {name!r} holds no question")


def _joint(correct: Mapping[str, RowScores]) -> tuple[Float[Tensor, "row set"], list[Hashable]]:
    """All questions in one table, a column per set, so that a cluster's questions are drawn together."""
    rows, clusters = [], []
    for column, name in enumerate(SETS):
        scores = correct[name]
        part = torch.full((len(scores.values), len(SETS)), torch.nan, dtype=torch.float64)
        part[:, column] = scores.values.double()
        rows.append(part)
        clusters += scores.clusters or [(name, i) for i in range(len(part))]
    return torch.cat(rows), clusters


def _score(means: Float[Tensor, "draw set"]) -> Float[Tensor, " draw"]:
    return ((1 - means[:, :3]).sum(1) + means[:, 3:].sum(1)) / len(SETS)
