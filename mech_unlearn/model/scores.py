"""Teacher-forced scores of answers, with or without activations written over on the way.

Every restoration test and every metric reads its numbers here. Rows of equal length share a batch, so nothing
is padded; candidates that share their input (all one-token answers of one prompt) share one row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.core import Fact, Site
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.forward import last_logits, next_logits
from mech_unlearn.model.readout import readout
from mech_unlearn.model.sweep import Patch, record, sweep
from mech_unlearn.model.tokens import Query, buckets


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
Writes = Mapping[Site, RowWrite] | Mapping[str, RowWrite] | Mapping[Site | str, RowWrite]


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
    answers: tuple[tuple[int, tuple[int, ...]], ...]
    """(Candidate, its tokens) of all that share this input."""


def _rows(queries: Sequence[Query]) -> list[_Row]:
    """The rows that have to be run; candidates that share their input share one."""
    rows: dict[tuple[int, tuple[int, ...]], list[tuple[int, tuple[int, ...]]]] = {}
    for q, query in enumerate(queries):
        for c, answer in enumerate(query.answers):
            rows.setdefault((q, query.prompt + answer[:-1]), []).append((c, answer))
    return [_Row(q, ids, tuple(answers)) for (q, ids), answers in rows.items()]


@dataclass(frozen=True, eq=False)
class _Reading:
    """Where in a batch the answers' tokens are predicted, and what is read there."""

    where: list[tuple[int, int]]
    """(Query, candidate) of each answer token."""
    row: Int[Tensor, " place"]
    pos: Int[Tensor, " place"]
    index: Int[Tensor, " token"]
    """The place of each answer token."""
    tokens: Int[Tensor, " token"]

    def into(self, scores: Scores, logits: Float[Tensor, "place d_vocab"]) -> None:
        """Put the scores of this batch into those of all."""
        table = logits.float().log_softmax(-1)
        values = table[self.index, self.tokens].cpu()
        greedy = (table.argmax(-1)[self.index] == self.tokens).cpu()
        sums: dict[tuple[int, int], list[float]] = {}
        hits: dict[int, bool] = {}
        for (q, c), value, hit in zip(self.where, values.tolist(), greedy.tolist(), strict=True):
            sums.setdefault((q, c), []).append(value)
            if c == 0:
                hits[q] = hits.get(q, True) and hit
        for (q, c), terms in sums.items():
            scores.logprob[q, c] = sum(terms) / len(terms)
        for q, hit in hits.items():
            scores.exact[q] = hit


def _reading(rows: Sequence[_Row], queries: Sequence[Query], device: torch.device) -> _Reading:
    asked = [
        (i, len(queries[row.query].prompt) - 1 + t, row.query, c, token)
        for i, row in enumerate(rows)
        for c, answer in row.answers
        for t, token in enumerate(answer)
    ]
    places = sorted({(i, pos) for i, pos, *_ in asked})
    at = {place: k for k, place in enumerate(places)}
    row, pos = (torch.tensor(x, device=device) for x in zip(*places, strict=True))
    index = torch.tensor([at[i, pos] for i, pos, *_ in asked], device=device)
    tokens = torch.tensor([a[4] for a in asked], device=device)
    return _Reading([(q, c) for _, _, q, c, _ in asked], row, pos, index, tokens)


def _empty(queries: Sequence[Query]) -> Scores:
    width = max((len(query.answers) for query in queries), default=0)
    return Scores(torch.full((len(queries), width), float("nan")), torch.zeros(len(queries), dtype=torch.bool))


@torch.no_grad()
def score(
    model: Model,
    queries: Sequence[Query],
    writes: Writes | None = None,
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
    rows, scores = _rows(queries), _empty(queries)
    for members in buckets([row.ids for row in rows], max_tokens):
        some = [rows[i] for i in members]
        batch = _batch(some, queries, model.device)
        bound = [(place, partial(_call, write, batch)) for place, write in (writes or {}).items()]
        reading = _reading(some, queries, model.device)
        first = int(reading.pos.min())
        with model.hooks(*bound):
            logits = last_logits(model, batch.ids, batch.ids.shape[1] - first)
        reading.into(scores, logits[reading.row, reading.pos - first])
    return scores


@torch.no_grad()
def score_each(
    model: Model, queries: Sequence[Query], arms: Sequence[Mapping[Site, RowWrite]], *, max_tokens: int = 8192
) -> list[Scores]:
    """`score` with each of several sets of writes: the layers below them run once, all arms climb in one sweep.

    Raises:
        KeyError: an arm names a site the model lacks.
    """
    if (
        model.in_force.interventions or len(arms) < 2
    ):  # layers called one by one would miss interventions; one arm shares with nobody
        return [score(model, queries, arm, max_tokens=max_tokens) for arm in arms]
    rows, scores = _rows(queries), [_empty(queries) for _ in arms]
    for members in buckets([row.ids for row in rows], max_tokens):
        some = [rows[i] for i in members]
        batch = _batch(some, queries, model.device)
        every = torch.arange(len(some), device=model.device)
        patches = [Patch(every, tuple((site, _whole(write, batch)) for site, write in arm.items())) for arm in arms]
        reading = _reading(some, queries, model.device)
        read, place = reading.pos.unique(return_inverse=True)
        swept = sweep(record(model, batch.ids, cache=False), patches, read.tolist(), max_tokens=8 * max_tokens)
        for final, scored in zip(swept, scores, strict=True):
            reading.into(scored, readout(model, final[reading.row, place]))
    return scores


def _whole(write: RowWrite, batch: Batch) -> Callable[[Tensor, int], Tensor]:
    """A write over whole rows, as the sweep calls it."""

    def run(x: Tensor, first: int) -> Tensor:
        out = write(x, batch)
        return x if out is None else out

    return run


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


def end_tokens(model: Model) -> tuple[int, ...]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation settings (chat models)."""
    settings = getattr(model.hf.generation_config, "eos_token_id", None)
    own = settings if isinstance(settings, list | tuple) else [settings]
    return tuple(sorted({token for token in (model.tokenizer.eos_token_id, *own) if token is not None}))


@torch.no_grad()
def greedy(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, max_tokens: int = 8192
) -> list[tuple[int, ...]]:
    """The greedy continuation of each prompt, token ids, up to the first of the model's `end_tokens`.

    Where nothing but the weights acts, each step reads one new token and the model's own cache of keys and values, if
    it keeps its prefix so.
    Where an intervention or any hook is in force, each step reads the whole row again, so that what looks for a
    subject or writes to earlier positions always sees them; a cache would keep what a shorter row made of them.

    Args:
        max_tokens: tokens of one batch at the most, those to come included.

    Raises:
        ValueError: more tokens than the model has positions.
    """
    out: list[list[int]] = [[] for _ in prompts]
    ends = torch.tensor(end_tokens(model), dtype=torch.long, device=model.device)
    plain = model.keeps_prefix and model.in_force.nothing()
    for members in buckets([range(len(prompt) + max_new_tokens) for prompt in prompts], max_tokens):
        ids = torch.tensor([list(prompts[i]) for i in members], device=model.device)
        open_rows = torch.ones(len(members), dtype=torch.bool, device=model.device)
        cache: Any = None
        for _ in range(max_new_tokens):
            if plain:
                logits, cache = next_logits(model, ids, cache)
            else:
                logits = last_logits(model, ids, 1)[:, -1]
            token = logits.argmax(-1)
            open_rows &= ~torch.isin(token, ends)
            for i, t, is_open in zip(members, token.tolist(), open_rows.tolist(), strict=True):
                if is_open:
                    out[i].append(t)
            if not open_rows.any():
                break
            ids = torch.cat([ids, token[:, None]], 1)
    return [tuple(tokens) for tokens in out]
