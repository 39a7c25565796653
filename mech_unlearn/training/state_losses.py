"""Losses on hidden states as plain functions: what is steered, what is held, and how large a state is.

Inputs are those of `rows.States`: one row per real token, so that no pad is counted. A squared distance is a mean
over features, then over the tokens of each row, then over rows: a long row counts as much as a short one.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.training.losses import mean_of_rows
from mech_unlearn.training.rows import BatchScores, States


def states_of(scores: BatchScores) -> tuple[States, Float[Tensor, "token d_model"]]:
    """(States, the untrained model's states).

    Raises:
        ValueError: the objective named no layer, or did not ask for the untrained model.
    """
    if scores.states is None or scores.states.before is None:
        raise ValueError("the loss needs states of both models: set Objective.layer, and teacher for forget rows")
    return scores.states, scores.states.before


def state_mse(
    now: Float[Tensor, "token d_model"], target: Float[Tensor, "*token d_model"], at: Int[Tensor, " token"]
) -> Float[Tensor, ""]:
    """Squared distance of states to their targets: mean over features, over each row's tokens, over rows.

    Source: 2403.03218, eq. for the forget and the retain loss of RMU.
    """
    return mean_of_rows((now - target).square().mean(1), at)


def held(scores: BatchScores) -> Float[Tensor, ""]:
    """`state_mse` to the untrained model's states, on all tokens.

    Source: 2403.03218, the retain loss of RMU.
    """
    states, before = states_of(scores)
    return state_mse(states.now, before, states.at)


def row_norms(states: Float[Tensor, "token d_model"], at: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    """For each token the mean norm of the states of its row."""
    norms, count = states.norm(dim=1), torch.bincount(at)
    return (torch.zeros(len(count), device=states.device).index_add(0, at, norms) / count.clamp(min=1))[at]


def row_means(states: Float[Tensor, "token d_model"], at: Int[Tensor, " token"]) -> Float[Tensor, " d_model"]:
    """Mean state: over the tokens of each row, then over the rows that have any."""
    count = torch.bincount(at)
    return (states / count[at, None]).sum(0) / (count > 0).sum()


def random_direction(width: int, seed: int, legacy: bool = False) -> Float[Tensor, " width"]:
    """A random unit vector on the CPU, Gaussian; with `legacy` uniform in [0, 1) before it is scaled to length 1.

    The uniform one lies in the positive orthant, cosine sqrt(3) / 2 = 0.87 to the all-ones vector for every seed.

    Source: 2403.03218 and, for `legacy`, its code.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand if legacy else torch.randn
    direction = draw(width, generator=generator)
    return direction / direction.norm()


def feature_importance(
    forget: Float[Tensor, " d_model"], retain: Float[Tensor, " d_model"], w_max: float, eps: float = 1e-6
) -> Float[Tensor, " d_model"]:
    """w_j = clip(E_f|h_j| / (E_r|h_j| + eps), 0, w_max), then scaled to mean 1.

    Args:
        forget: mean magnitude of each feature on forget rows. retain: on retained rows.

    Source: after 2512.16297 (importance map over features); the ratio is a working definition.
    """
    w = (forget / (retain + eps)).clamp(0, w_max)
    return w / w.mean().clamp(min=eps)
