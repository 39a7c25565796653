"""What do the outputs say? Functions of models and facts that give a `Measurement`."""

from mech_unlearn.metrics.drift import general_kl
from mech_unlearn.metrics.evaluate import score_answers
from mech_unlearn.metrics.intervals import RowScores, mean_ci, paired_difference, statistic_ci
from mech_unlearn.metrics.recall import forget_recall, heldout_recall, majority_recall, recall

__all__ = [
    "RowScores",
    "forget_recall",
    "general_kl",
    "heldout_recall",
    "majority_recall",
    "mean_ci",
    "paired_difference",
    "recall",
    "score_answers",
    "statistic_ci",
]
