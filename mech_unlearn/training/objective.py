"""What training minimises."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mech_unlearn.training.rows import BatchScores, TrainRow

Loss = Callable[[BatchScores], Tensor]
RetainLoss = Literal["nll", "kl"]


@dataclass(frozen=True, eq=False)
class Objective:
    """What is minimised: forget_weight x forget loss + retain_weight x loss on retained answers and texts."""

    forget: Callable[[BatchScores], Loss]
    """From the scores of all forget rows before training to the loss of a batch of them."""
    retain_weight: float
    forget_weight: float = 1.0
    retain: RetainLoss | Loss = "nll"
    """NLL per token, KL from the untrained model's next-token distributions, or a loss on the scores of a batch of
    retained rows; a loss of one's own is given the untrained model's logits and states too."""
    teacher: bool = False
    """Whether the forget loss needs the untrained model: `scores.each.before` and `scores.states.before`, one forward
    pass more."""
    rows: Sequence[TrainRow] = ()
    """Forget rows in place of the facts' prompts and answers; a loss on states needs no answer in them."""
    others: Sequence[TrainRow] = ()
    """One other answer per forget row. A batch then holds b forget rows and, in the same order, their b others."""
    layer: int | None = None
    """Layer whose resid_post the losses read as `scores.states`."""
    logits: bool = True
    """Whether the losses read logits; if not, forward passes end after `layer`."""


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on the untrained model's resid_post after a layer, where it is read for retained rows."""

    layer: int
    nu: float
    """Variance as a share of the mean square of the states."""
    seed: int
