"""Batches of answers and their log-probabilities, for losses that train: rows, masks, NLL."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.forward import logit_tokens, unembedded
from mech_unlearn.model.pieces import token_rows
from mech_unlearn.model.tokens import encode_all, make_queries, pad

TrainRow = tuple[tuple[int, ...], int]
"""Token ids and the position where the answer begins."""
EVAL_BATCH = 256
"""Rows scored at once, at the most."""
REFUSALS = (
    "I do not know.",
    "I am not sure.",
    "I have no information about that.",
    "That is not something I know.",
    "I cannot answer that.",
)
"""What methods that teach to refuse offer by default."""


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """Right-padded rows; only tokens marked as answers are predicted, never a prompt or a pad."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    answer: Bool[Tensor, "batch pos"]
    row: Int[Tensor, " batch"]
    """Which row of the set each is."""

    @property
    def ordinary(self) -> Bool[Tensor, "batch pos"]:
        """The tokens whose states count: all but pads and the first, an attention sink (see `ordinary_positions`)."""
        first = torch.arange(self.mask.shape[1], device=self.mask.device) == 0
        return self.mask.bool() & ~first


@dataclass(frozen=True, eq=False)
class AnswerTokens:
    """What a forward pass says where an answer token is predicted, token by token; no other position is kept."""

    logits: Float[Tensor, "token d_vocab"]
    """Float32."""
    wanted: Int[Tensor, " token"]
    """The answer token that follows."""
    at: Int[Tensor, " token"]
    """Which row of the batch each belongs to."""
    before: Float[Tensor, "known d_vocab"]
    """The same logits of the untrained model; one per token where an objective asks for them, else none."""


NO_TOKENS = AnswerTokens(torch.zeros(0, 0), torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0, 0))


@dataclass(frozen=True, eq=False)
class States:
    """resid_post after one layer at the ordinary tokens of a batch's rows, prompt and answer."""

    now: Float[Tensor, "token d_model"]
    """Float32, with gradient."""
    at: Int[Tensor, " token"]
    """Which row of the batch each belongs to."""
    ids: Int[Tensor, " token"]
    answer: Bool[Tensor, " token"]
    """Whether it is a token of the answer."""
    before: Float[Tensor, "token d_model"] | None = None
    """The untrained model's, where it was asked."""


@dataclass(frozen=True, eq=False)
class BatchScores:
    """What a forward pass says about the answers of a batch."""

    logprob: Float[Tensor, " batch"]
    """Sum of the answer tokens' log-probabilities, nats."""
    tokens: Int[Tensor, " batch"]
    """Answer tokens per row."""
    exact: Bool[Tensor, " batch"]
    """Whether every answer token is the likeliest one."""
    row: Int[Tensor, " batch"]
    each: AnswerTokens = NO_TOKENS
    """Token by token; left out where only the sums are wanted."""
    states: States | None = None
    """Where an objective names a layer."""


def answer_rows(tokenizer: Any, facts: Sequence[Fact]) -> list[TrainRow]:
    """Prompt and true answer of each fact in each phrasing that a method may see."""
    return [(query.full, len(query.prompt)) for query in make_queries(tokenizer, facts, distractors=False)]


def refusal_rows(
    tokenizer: Any, facts: Sequence[Fact], refusals: Sequence[str], order: random.Random
) -> list[TrainRow]:
    """The prompts of `answer_rows`, in its order, each followed by a refusal drawn at random.

    Raises:
        ValueError: no refusals, or one that the tokenizer cannot write or merges with the end of a prompt.
    """
    if not refusals:
        raise ValueError("refusals is empty: give at least one text")
    queries = make_queries(tokenizer, facts, distractors=False)
    drawn = [order.choice(refusals) for _ in queries]
    prompts = [query.template.replace("{}", query.fact.subject) for query in queries]
    joints = [query.fact.joined(prompt, "") for query, prompt in zip(queries, prompts, strict=True)]
    known = encode_all(tokenizer, [joint + refusal for joint, refusal in zip(joints, drawn, strict=True)])
    rows = []
    for query, joint, refusal in zip(queries, joints, drawn, strict=True):
        encoding = known[joint + refusal]
        start, unknown = len(query.prompt), tokenizer.unk_token_id
        answer = zip(encoding.ids[start:], encoding.offsets[start:], strict=True)
        written = {i for token, (a, b) in answer if token != unknown for i in range(a, b)}
        wanted = {i for i, c in enumerate(joint + refusal) if i >= len(joint) and not c.isspace()}
        if not wanted or not wanted <= written or encoding.ids[:start] != query.prompt:
            raise ValueError(
                f"refusal {refusal!r}: the tokenizer has no tokens for part of it after {joint!r}; "
                "give refusals= in words of its vocabulary"
            )
        rows.append((encoding.ids, start))
    return rows


def text_rows(model: Model, texts: Sequence[str]) -> list[TrainRow]:
    """Running texts, those of more than 512 tokens in pieces; every token but the first is predicted."""
    return [(row, 1) for row in token_rows(model, texts) if len(row) > 1]


def collate(rows: Sequence[TrainRow], members: Sequence[int], fill: int, device: torch.device) -> TrainBatch:
    """The chosen rows as one right-padded batch."""
    ids, mask, _ = pad([rows[i][0] for i in members], fill)
    starts = torch.tensor([rows[i][1] for i in members])
    answer = (torch.arange(ids.shape[1]) >= starts[:, None]) & mask.bool()
    return TrainBatch(ids.to(device), mask.to(device), answer.to(device), torch.tensor(list(members), device=device))


def predicting(batch: TrainBatch) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
    """Row and position before each answer token of a batch; never those of a prompt or a pad."""
    at, before = batch.answer[:, 1:].nonzero(as_tuple=True)
    return at, before


def batch_scores(logits: Float[Tensor, "token d_vocab"], batch: TrainBatch) -> BatchScores:
    """Sums of answer log-probabilities (float32, nats) and greedy hits; logits where the batch is `predicting`."""
    at, before = predicting(batch)
    each = AnswerTokens(logits.float(), batch.ids[at, before + 1], at, logits.new_empty(0, logits.shape[1]))
    logprob = each.logits.gather(1, each.wanted[:, None])[:, 0] - each.logits.logsumexp(1)
    sums = torch.zeros(len(batch.ids), device=logits.device).index_add(0, each.at, logprob)
    misses = torch.zeros_like(sums).index_add(0, each.at, (each.logits.detach().argmax(1) != each.wanted).float())
    return BatchScores(sums, batch.answer[:, 1:].sum(1), misses == 0, batch.row, each)


def forward(hf: Any, batch: TrainBatch) -> BatchScores:
    """Scores of one batch under an HF model; only where it is `predicting` are states unembedded."""
    with unembedded(hf, predicting(batch)):
        logits = hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[0]
    return batch_scores(logits, batch)


def chunks(members: Sequence[int], tokens: Sequence[int], d_vocab: int, most: int) -> list[list[int]]:
    """The members in order, in chunks of at most `most` whose logits fit into `LOGIT_BYTES`.

    Args:
        tokens: answer tokens of each member.
    """
    room, out, held = logit_tokens(d_vocab), [], 0
    for member, n in zip(members, tokens, strict=True):
        if not out or len(out[-1]) == most or held + n > room:
            out, held = [*out, []], 0
        out[-1].append(member)
        held += n
    return out


def eval_chunks(rows: Sequence[TrainRow], hf: Any) -> list[list[int]]:
    """How `score_rows` splits its rows."""
    return chunks(range(len(rows)), [len(ids) - start for ids, start in rows], hf.config.vocab_size, EVAL_BATCH)


@torch.no_grad()
def score_rows(hf: Any, rows: Sequence[TrainRow], fill: int, device: torch.device) -> BatchScores:
    """Scores of every row, in order, without gradients."""
    spans = eval_chunks(rows, hf)
    parts = [replace(forward(hf, collate(rows, span, fill, device)), each=NO_TOKENS) for span in spans]
    sums, tokens, exact, row = (
        torch.cat([getattr(part, key) for part in parts]) for key in ("logprob", "tokens", "exact", "row")
    )
    return BatchScores(sums, tokens, exact, row)


def nll(scores: BatchScores) -> Float[Tensor, ""]:
    """Negative log-probability per answer token, nats: mean over each row's tokens, then over rows."""
    return -(scores.logprob / scores.tokens).mean()
