"""Batches of answers and their log-probabilities, for losses that train: rows, masks, NLL."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.prompts import encode_all, make_queries, pad

Row = tuple[tuple[int, ...], int]
"""Token ids and the position where the answer begins."""
EVAL_BATCH = 256


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded rows; only tokens marked as answers are predicted, never a prompt or a pad."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    answer: Bool[Tensor, "batch pos"]
    row: Int[Tensor, " batch"]
    """Which row of the set each is."""


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """What a forward pass says about the answers of a batch."""

    logprob: Float[Tensor, " batch"]
    """Sum of the answer tokens' log-probabilities, nats."""
    tokens: Int[Tensor, " batch"]
    """Answer tokens per row."""
    exact: Bool[Tensor, " batch"]
    """Whether every answer token is the likeliest one."""
    row: Int[Tensor, " batch"]


def answer_rows(tokenizer: Any, facts: Sequence[Fact]) -> list[Row]:
    """Prompt and true answer of each fact in each phrasing that a method may see."""
    return [(query.full, len(query.prompt)) for query in make_queries(tokenizer, facts, distractors=False)]


def text_rows(tokenizer: Any, texts: Sequence[str]) -> list[Row]:
    """Running texts; every token but the first is predicted."""
    known = encode_all(tokenizer, texts)
    return [(known[text].ids, 1) for text in texts if len(known[text].ids) > 1]


def collate(rows: Sequence[Row], members: Sequence[int], fill: int, device: torch.device) -> Batch:
    """The chosen rows as one right-padded batch."""
    ids, mask, _ = pad([rows[i][0] for i in members], fill)
    starts = torch.tensor([rows[i][1] for i in members])
    answer = (torch.arange(ids.shape[1]) >= starts[:, None]) & mask.bool()
    return Batch(ids.to(device), mask.to(device), answer.to(device), torch.tensor(list(members), device=device))


def shuffled(n: int, size: int, order: random.Random) -> Iterator[list[int]]:
    """Endless batches of at most `size` of n indices: each index once per pass, every pass in a new order."""
    while True:
        members = list(range(n))
        order.shuffle(members)
        yield from (members[i : i + size] for i in range(0, n, size))


def answer_scores(logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> AnswerScores:
    """Sums of answer log-probabilities (float32, nats) and greedy hits from the logits of a batch."""
    rows, at = batch.answer[:, 1:].nonzero(as_tuple=True)
    wanted = batch.ids[rows, at + 1]
    chosen = logits[rows, at].float()
    logprob = chosen.gather(1, wanted[:, None])[:, 0] - chosen.logsumexp(1)
    sums = torch.zeros(len(batch.ids), device=logits.device).index_add(0, rows, logprob)
    misses = torch.zeros_like(sums).index_add(0, rows, (chosen.detach().argmax(1) != wanted).float())
    return AnswerScores(sums, batch.answer[:, 1:].sum(1), misses == 0, batch.row)


def forward(hf: Any, batch: Batch) -> AnswerScores:
    """Scores of one batch under an HF model."""
    return answer_scores(hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits, batch)


@torch.no_grad()
def score_rows(hf: Any, rows: Sequence[Row], fill: int, device: torch.device) -> AnswerScores:
    """Scores of every row, in order, without gradients."""
    spans = [range(i, min(i + EVAL_BATCH, len(rows))) for i in range(0, len(rows), EVAL_BATCH)]
    parts = [forward(hf, collate(rows, span, fill, device)) for span in spans]
    return AnswerScores(*(torch.cat([getattr(part, key) for part in parts]) for key in AnswerScores.__annotations__))


def nll(scores: AnswerScores) -> Float[Tensor, ""]:
    """Negative log-probability per answer token, nats: mean over each row's tokens, then over rows."""
    return -(scores.logprob / scores.tokens).mean()
