"""The rows at which a prompt's answer is predicted, and its score there."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.model.bridge import Model
from mech_unlearn.model.readout import readout
from mech_unlearn.model.tokens import Query

READ_ROWS = 512
"""States read out at a time; bounds the memory of the logits."""


def equal_shape(queries: Sequence[Query], max_tokens: int) -> Iterator[list[int]]:
    """Indices of queries of equal prompt, answer and subject place: rows that share positions.

    Args:
        max_tokens: tokens of one group at the most.
    """
    groups: dict[tuple, list[int]] = {}
    for i, query in enumerate(queries):
        groups.setdefault((len(query.full), len(query.prompt), query.span), []).append(i)
    for (length, *_), members in groups.items():
        size = max(1, max_tokens // length)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def answer_rows(queries: Sequence[Query]) -> list[int]:
    """The positions that predict the answer's tokens, for queries of equal shape."""
    start = len(queries[0].prompt) - 1
    return list(range(start, start + len(queries[0].answers[0])))


def answer_score(
    model: Model,
    final: Float[Tensor, "row answer_token d_model"],
    answers: Sequence[Sequence[int]],
    metric: str,
) -> Float[Tensor, " row"]:
    """Score of each row's answer from its final residual states: mean log-probability per token, its exponential
    (the geometric mean probability), or whether every token is the likeliest. On the model's device; differentiable
    for the first two."""
    size = final.shape[1]
    tokens = torch.tensor([list(answer) for answer in answers], device=model.device).flatten()
    states = final.flatten(0, 1)
    parts = []
    for some, wanted in zip(states.split(READ_ROWS), tokens.split(READ_ROWS), strict=True):
        logits = readout(model, some)
        if metric == "exact":
            parts.append((logits.argmax(-1) == wanted).float())
        else:
            parts.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
    by_row = torch.cat(parts).unflatten(0, (-1, size))
    if metric == "exact":
        return by_row.min(1).values
    mean = by_row.mean(1)
    return mean.exp() if metric == "probability" else mean
