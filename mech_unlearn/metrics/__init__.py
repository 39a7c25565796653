"""What do the outputs say? Functions of models and facts that give a `Measurement`."""

from collections.abc import Callable

from mech_unlearn.core import Measurement
from mech_unlearn.metrics.drift import general_kl
from mech_unlearn.metrics.evaluate import score_answers
from mech_unlearn.metrics.intervals import RowScores, mean_ci, paired_difference, statistic_ci
from mech_unlearn.metrics.recall import chance, forget_recall, heldout_recall, recall

__all__ = [
    "METRICS",
    "RowScores",
    "chance",
    "forget_recall",
    "general_kl",
    "heldout_recall",
    "mean_ci",
    "paired_difference",
    "recall",
    "score_answers",
    "statistic_ci",
]

METRICS: dict[str, Callable[..., Measurement]] = {
    "forget_recall": forget_recall,
    "heldout_recall": heldout_recall,
    "neighbor_recall": forget_recall,
    "general_kl": general_kl,
    "chance": chance,
}
