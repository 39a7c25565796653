"""Teacher-forced scores of many answers at once: loss, probability, extraction strength, exact memorization.

Paper: as in memorization.py: probability arXiv 2401.06121, section 2.2.2; extraction strength and exact memorization
    as OpenUnlearning computes them, arXiv 2506.12618.
Needs: one forward pass per row; rows of equal length share a batch, so nothing is padded, and rows that differ in
    their last token only (one-token answers of one prompt) share one row.
Differs: prompt and answer are tokenized jointly, with one space between them where the prompt does not end in one; the
    answer's tokens are those that cover its characters. No end-of-text token is scored. The last token predicts
    nothing and is not run. Only the positions that predict an answer of the batch are unembedded.
Fails: what is likely under teacher forcing need not be what the model says by itself: never put these numbers into one
    column with scores of generated text.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.core import Measurement
from mech_unlearn.metrics.intervals import mean_ci
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.forward import last_logits
from mech_unlearn.model.tokens import Encoding, buckets, encode_all, has_unknown

UNITS = {
    "answer_loss": "nats per answer token, mean over rows",
    "answer_probability": "geometric mean probability per answer token, mean over rows",
    "extraction_strength": "share of the answer behind its last wrong teacher-forced prediction, mean over rows",
    "exact_memorization": "share of answer tokens predicted under teacher forcing, mean over rows",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class AnswerScores:
    """Scores per row, float32 on the CPU; all of them teacher-forced."""

    loss: Float[Tensor, " row"]
    """Mean negative log-likelihood per answer token, nats."""
    exact_memorization: Float[Tensor, " row"]
    """Share of the answer's tokens that are the likeliest after the true tokens before them."""
    extraction_strength: Float[Tensor, " row"]
    """Share of the answer's tokens behind the last one that is not."""
    tokens: Int[Tensor, " row"]
    """Length of the answer in tokens."""

    @property
    def probability(self) -> Float[Tensor, " row"]:
        """exp(-loss): the geometric mean of the answer tokens' probabilities."""
        return (-self.loss).exp()

    def measurements(self, clusters: Sequence[Hashable] | None = None, seed: int = 0) -> dict[str, Measurement]:
        """The mean of each score over the rows, by the names of `UNITS`.

        Raises:
            ValueError: another number of clusters than of rows.
        """
        values = (self.loss, self.probability, self.extraction_strength, self.exact_memorization)
        return {n: mean_ci(v, unit, clusters, seed) for (n, unit), v in zip(UNITS.items(), values, strict=True)}


@dataclass(frozen=True)
class TokenRow:
    """Token ids of a prompt and its answer; the last `answer` of them are the answer's."""

    ids: tuple[int, ...]
    answer: int


def encode_pairs(
    tokenizer: Any, rows: Sequence[tuple[str, str]], names: Sequence[str] | None = None
) -> tuple[TokenRow, ...]:
    """Tokenize (prompt, answer) pairs jointly, from one call of the tokenizer.

    Args:
        names: what errors call the rows; their numbers by default.

    Raises:
        ValueError: no rows; an empty answer; or an answer whose first token covers the end of the prompt, that no token
            precedes, or that the tokenizer has no tokens for (row, answer and how to mend it).
    """
    if not rows:
        raise ValueError("no rows to score: give at least one pair of prompt and answer")
    called = names or [f"row {number}" for number in range(len(rows))]
    starts, texts = [], []
    for name, (prompt, answer) in zip(called, rows, strict=True):
        if not answer.strip():
            raise ValueError(f"{name}: the answer to {prompt[-60:]!r} is empty; leave the row out")
        joint = prompt if not prompt or prompt[-1].isspace() else prompt + " "
        starts.append(len(joint) + len(answer) - len(answer.lstrip()))
        texts.append(joint + answer)
    known = encode_all(tokenizer, texts)
    return tuple(
        _token_row(name, tokenizer, known[text], text, start)
        for name, text, start in zip(called, texts, starts, strict=True)
    )


def _token_row(name: str, tokenizer: Any, encoding: Encoding, text: str, start: int) -> TokenRow:
    said = repr(text[start:][:60])
    first = next((i for i, (a, b) in enumerate(encoding.offsets) if b > start and b > a), None)
    if first is None or has_unknown(tokenizer, encoding):
        raise ValueError(f"{name}: the tokenizer has no tokens for part of the prompt or of the answer {said}")
    if text[encoding.offsets[first][0] : start].strip():
        raise ValueError(f"{name}: the tokens of {said} merge with the end of the prompt; end it in a full word")
    if first == 0:
        raise ValueError(f"{name}: no token precedes {said}, so nothing predicts it; give it a prompt")
    return TokenRow(encoding.ids, len(encoding.ids) - first)


@torch.no_grad()
def score_tokens(model: Model, rows: Sequence[TokenRow], *, max_tokens: int = 8192) -> AnswerScores:
    """Score the answers of rows that are token ids already; see `score_answers`."""
    inputs: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        inputs.setdefault(row.ids[:-1], []).append(i)
    unique = list(inputs)
    loss, memorized, strength = torch.zeros(3, len(rows))
    counts = torch.tensor([row.answer for row in rows])
    for members in buckets(unique, max_tokens):
        asked = [i for u in members for i in inputs[unique[u]]]
        place = torch.tensor([k for k, u in enumerate(members) for _ in inputs[unique[u]]], device=model.device)
        width = max(rows[i].answer for i in asked)
        logits = last_logits(model, torch.tensor([unique[u] for u in members], device=model.device), width).float()
        targets = torch.tensor([rows[i].ids[-width:] for i in asked], device=model.device)
        length = counts[asked].to(model.device)
        answer = torch.arange(width, device=model.device) >= width - length[:, None]
        steps = torch.arange(width, device=model.device)
        logprob = logits[place[:, None], steps, targets] - logits.logsumexp(-1)[place]
        hit = (logits.argmax(-1)[place] == targets) & answer
        loss[asked] = (-logprob.masked_fill(~answer, 0).sum(1) / length).cpu()
        memorized[asked] = (hit.sum(1) / length).cpu()
        strength[asked] = (_right_tail(hit, answer) / length).cpu()
    return AnswerScores(loss=loss, exact_memorization=memorized, extraction_strength=strength, tokens=counts)


def _right_tail(hit: Bool[Tensor, "row step"], answer: Bool[Tensor, "row step"]) -> Int[Tensor, " row"]:
    """Number of answer tokens behind the last wrong one."""
    wrong_from_here = (answer & ~hit).flip(1).int().cummax(1).values.flip(1)
    return (answer & (wrong_from_here == 0)).sum(1)


def score_answers(model: Model, rows: Sequence[tuple[str, str]], *, max_tokens: int = 8192) -> AnswerScores:
    """Teacher-forced scores of (prompt, answer) pairs, in their order.

    The scores of a row do not depend on the other rows or on `max_tokens`, but for the rounding of the matrix products.
    Activation interventions in force stay in force.

    Args:
        max_tokens: tokens of one batch at the most.

    Raises:
        ValueError: as `encode_pairs`, or a row longer than the model's positions.
    """
    return score_tokens(model, encode_pairs(model.tokenizer, rows), max_tokens=max_tokens)


def score_options(
    model: Model, rows: Sequence[tuple[str, Sequence[str]]], *, max_tokens: int = 8192
) -> Float[Tensor, "row option"]:
    """Mean log-probability per token, nats, of each option after its prompt; NaN where a row has fewer options.

    Raises:
        ValueError: a row without an option, or as `score_answers`; the message names row and option.
    """
    for number, (prompt, options) in enumerate(rows):
        if not options:
            raise ValueError(f"row {number}: no options for the prompt {prompt[-60:]!r}")
    pairs = [(prompt, option) for prompt, options in rows for option in options]
    names = [f"row {i}, option {o}" for i, (_, options) in enumerate(rows) for o in range(len(options))]
    flat = iter(-score_tokens(model, encode_pairs(model.tokenizer, pairs, names), max_tokens=max_tokens).loss)
    table = torch.full((len(rows), max(len(options) for _, options in rows)), torch.nan)
    for i, (_, options) in enumerate(rows):
        table[i, : len(options)] = torch.stack([next(flat) for _ in options])
    return table
