"""The rows at which a prompt's answer is predicted, its score there, and how sure a model is of what it answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.model.bridge import Model
from mech_unlearn.model.forward import last_logits
from mech_unlearn.model.readout import readout
from mech_unlearn.model.tokens import Query, buckets, encode_all

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


@dataclass(frozen=True, eq=False)
class NextToken:
    """How sure a model is of the token behind each name's prompts."""

    likeliest: Float[Tensor, "name template"]
    """Probability of the likeliest token."""
    entropy: Float[Tensor, "name template"]
    """Of the whole distribution, nats."""


@torch.no_grad()
def next_token(model: Model, names: Sequence[str], templates: Sequence[str]) -> NextToken:
    """How sure a model is of the first token of its answer about each name, in each template."""
    texts = [template.replace("{}", name) for name in names for template in templates]
    known = encode_all(model.tokenizer, texts)
    rows = [known[text].ids for text in texts]
    likeliest, entropy = torch.zeros(len(rows)), torch.zeros(len(rows))
    for members in buckets(rows):
        ids = torch.tensor([list(rows[i]) for i in members], device=model.device)
        table = last_logits(model, ids, 1)[:, -1].float().log_softmax(-1)
        likeliest[members] = table.exp().amax(-1).cpu()
        entropy[members] = -(table.exp() * table.clamp(min=-1e4)).sum(-1).cpu()
    shape = (len(names), len(templates))
    return NextToken(likeliest.unflatten(0, shape), entropy.unflatten(0, shape))
