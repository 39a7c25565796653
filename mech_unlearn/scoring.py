"""Teacher-forced scores of answers, with or without activations written over on the way.

Every restoration test and every metric reads its numbers here. Rows of equal length share a batch, so nothing
is padded; candidates that share their input (all one-token answers of one prompt) share one row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.core import Fact, Site
from mech_unlearn.model import Model
from mech_unlearn.prompts import Query, buckets


@dataclass(frozen=True)
class Batch:
    """The rows a write function is given: which query each belongs to, and its tokens."""

    ids: Int[Tensor, "batch pos"]
    query: Int[Tensor, " batch"]
    span: Int[Tensor, "batch 2"]
    """Subject tokens [a, b) of each row."""
    end: Int[Tensor, " batch"]
    """Position of the last prompt token of each row."""


RowWrite = Callable[[Tensor, Batch], Tensor | None]


@dataclass(frozen=True)
class Scores:
    """Scores of a list of queries; the margin and the choice are definitions of this package."""

    logprob: Float[Tensor, "query candidate"]
    """Mean log-probability per answer token, in nats; candidate 0 is the true answer; NaN where there is none."""
    exact: Bool[Tensor, " query"]
    """Whether greedy decoding gives the true answer."""

    @property
    def margin(self) -> Float[Tensor, " query"]:
        """log p(true) - log mean p(distractor), per-token mean log-probabilities, nats; log p(true) without any."""
        wrong = self.logprob[:, 1:]
        count = (~wrong.isnan()).sum(1)
        mean = wrong.nan_to_num(nan=float("-inf")).logsumexp(1) - count.clamp(min=1).log()
        return self.logprob[:, 0] - torch.where(count > 0, mean, torch.zeros_like(mean))

    @property
    def choice(self) -> Float[Tensor, " query"]:
        """1 if the true answer is the likeliest candidate; k candidates in a tie share it as 1/k."""
        known = self.logprob.nan_to_num(nan=float("-inf"))
        best = known.amax(1, keepdim=True)
        tied = known == best
        return tied[:, 0].float() / tied.sum(1)


@dataclass(frozen=True)
class _Row:
    query: int
    ids: tuple[int, ...]


@torch.no_grad()
def score(
    model: Model,
    queries: Sequence[Query],
    writes: Mapping[Site | str, RowWrite] | None = None,
    *,
    max_tokens: int = 8192,
) -> Scores:
    """Score the candidates of each query, teacher-forced.

    Args:
        writes: place -> function of (activation [batch, pos, d], Batch) that gives back its replacement.
        max_tokens: tokens of one batch at the most.

    Raises:
        KeyError: `writes` names a place the model lacks.
    """
    rows: dict[tuple[int, tuple[int, ...]], int] = {}
    targets: list[list[tuple[int, int, tuple[int, ...]]]] = []
    for q, query in enumerate(queries):
        for c, answer in enumerate(query.answers):
            row = rows.setdefault((q, query.prompt + answer[:-1]), len(rows))
            if row == len(targets):
                targets.append([])
            targets[row].append((q, c, answer))
    inputs = [_Row(q, ids) for q, ids in rows]
    width = max((len(query.answers) for query in queries), default=0)
    logprob = torch.full((len(queries), width), float("nan"))
    exact = torch.zeros(len(queries), dtype=torch.bool)
    device = model.device
    for members in buckets([row.ids for row in inputs], max_tokens):
        batch = _batch([inputs[i] for i in members], queries, device)
        bound = [(place, partial(_call, write, batch)) for place, write in (writes or {}).items()]
        with model.hooks(*bound):
            logits = model.logits(batch.ids)
        where = [
            (i, len(queries[q].prompt) - 1 + t, q, c, token, t == 0)
            for i, member in enumerate(members)
            for q, c, answer in targets[member]
            for t, token in enumerate(answer)
        ]
        places = sorted({(i, pos) for i, pos, *_ in where})
        at = {place: k for k, place in enumerate(places)}
        row_index, pos_index = (torch.tensor(x, device=device) for x in zip(*places, strict=True))
        table = logits[row_index, pos_index].float().log_softmax(-1)
        index = torch.tensor([at[i, pos] for i, pos, *_ in where], device=device)
        tokens = torch.tensor([w[4] for w in where], device=device)
        values = table[index, tokens].cpu()
        greedy = (table.argmax(-1)[index] == tokens).cpu()
        sums: dict[tuple[int, int], list[float]] = {}
        hits: dict[int, bool] = {}
        for (_, _, q, c, _, _), value, hit in zip(where, values.tolist(), greedy.tolist(), strict=True):
            sums.setdefault((q, c), []).append(value)
            if c == 0:
                hits[q] = hits.get(q, True) and hit
        for (q, c), terms in sums.items():
            logprob[q, c] = sum(terms) / len(terms)
        for q, hit in hits.items():
            exact[q] = hit
    return Scores(logprob, exact)


def _call(write: RowWrite, batch: Batch, x: Tensor) -> Tensor | None:
    return write(x, batch)


def _batch(rows: Sequence[_Row], queries: Sequence[Query], device: torch.device) -> Batch:
    return Batch(
        torch.tensor([row.ids for row in rows], device=device),
        torch.tensor([row.query for row in rows], device=device),
        torch.tensor([queries[row.query].span for row in rows], device=device),
        torch.tensor([len(queries[row.query].prompt) - 1 for row in rows], device=device),
    )


@dataclass(frozen=True)
class FactScores:
    """Scores per fact, each the mean over its phrasings."""

    logprob: Float[Tensor, " fact"]
    margin: Float[Tensor, " fact"]
    choice: Float[Tensor, " fact"]
    recall: Float[Tensor, " fact"]
    """Share of phrasings after which greedy decoding gives the true answer."""


def per_fact(scores: Scores, queries: Sequence[Query], facts: Sequence[Fact]) -> FactScores:
    """Average the scores of queries over the phrasings of each fact.

    Raises:
        ValueError: a fact without a query.
    """
    order = {fact.id: i for i, fact in enumerate(facts)}
    index = torch.tensor([order[query.fact.id] for query in queries])
    count = torch.bincount(index, minlength=len(facts))
    if (count == 0).any():
        raise ValueError(f"fact {facts[int((count == 0).nonzero()[0])].id!r} has no prompt to be scored on")

    def mean(x: Tensor) -> Tensor:
        return torch.zeros(len(facts)).index_add(0, index, x.float()) / count

    return FactScores(mean(scores.logprob[:, 0]), mean(scores.margin), mean(scores.choice), mean(scores.exact))


@torch.no_grad()
def greedy(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[tuple[int, ...]]:
    """The greedy continuation of each prompt, token ids, up to the tokenizer's end-of-text token.

    Recomputes the whole row at each step, so that interventions which look for a subject always see it.
    """
    out: list[list[int]] = [[] for _ in prompts]
    end = model.tokenizer.eos_token_id
    for members in buckets(prompts):
        ids = torch.tensor([list(prompts[i]) for i in members], device=model.device)
        open_rows = torch.ones(len(members), dtype=torch.bool, device=model.device)
        for _ in range(max_new_tokens):
            token = model.logits(ids)[:, -1].argmax(-1)
            open_rows &= token != end
            for i, t, is_open in zip(members, token.tolist(), open_rows.tolist(), strict=True):
                if is_open:
                    out[i].append(t)
            if not open_rows.any():
                break
            ids = torch.cat([ids, token[:, None]], 1)
    return [tuple(tokens) for tokens in out]
