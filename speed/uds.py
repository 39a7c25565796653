"""UDS of four examples, prompts of about 40 tokens and answers of about 8, with one source model or two.

Reference: the steps of the paper's code (arXiv 2605.24614) on bare Hugging Face models, without its log-only
generation: per example one forward pass of the full model; per source model one for its states, and for each layer one
of the full model with the answer's rows written over by a hook; logits of every position. With two sources (retrained,
unlearned) these are 27 forward passes per example on twelve layers. True resid_post also at the last layer (see
restoration/states/uds.py).
"""

import gc
from collections.abc import Sequence

import torch
from torch import Tensor

from mech_unlearn.model.tokens import Query
from mech_unlearn.restoration.states.uds import drops, read_rows, rowset
from speed.shapes import Shape, Way, blocks, query_of, write

LENGTHS = ((36, 6), (39, 8), (41, 8), (44, 10))
"""Tokens of prompt and answer of each example: no two are alike, as in a real forget set."""


def examples(shape: Shape) -> tuple[Query, ...]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(shape.vocabulary - 2, (p + a,), generator=generator).tolist() for p, a in LENGTHS]
    return tuple(query_of(row[:p], row[p:]) for row, (p, _) in zip(rows, LENGTHS, strict=True))


def plain(shape: Shape, sources: Sequence[int] = (1,)) -> Way:
    """Drops of the mean log-probability per answer token, nats: [source, layer, example]."""
    full, others, queries = shape.bare(), [shape.bare(seed) for seed in sources], examples(shape)

    def logprob(query: Query) -> float:
        p, answer = len(query.prompt), torch.tensor(query.answers[0])
        logits = full(torch.tensor([query.full]), use_cache=False).logits[0]
        return logits[p - 1 : -1].log_softmax(-1).gather(1, answer[:, None]).mean().item()

    def patched(query: Query, layer: int, states: Tensor) -> float:
        span = slice(len(query.prompt) - 1, len(query.full) - 1)

        def put(x: Tensor) -> Tensor:
            x = x.clone()
            x[0, span] = states[span]
            return x

        handle = write(blocks(full)[layer], put)
        found = logprob(query)
        handle.remove()
        return found

    def states_of(hf, query: Query) -> list[Tensor]:
        kept: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            kept.append(x[0])
            return x

        handles = [write(block, keep) for block in blocks(hf)]
        hf(torch.tensor([query.full]), use_cache=False)
        for handle in handles:
            handle.remove()
        return kept

    @torch.no_grad()
    def run() -> Tensor:
        found = torch.zeros(len(sources), shape.layers, len(queries))
        for i, query in enumerate(queries):
            baseline = logprob(query)
            for s, other in enumerate(others):
                for layer, states in enumerate(states_of(other, query)):
                    found[s, layer, i] = baseline - patched(query, layer, states)
        return found

    return run


def ours(shape: Shape, sources: Sequence[int] = (1,)) -> Way:
    """`uds.read_rows` and `uds.drops`: per source one forward pass of it and one suffix sweep of the full model."""
    full, others, queries = shape.model(), [shape.model(seed) for seed in sources], examples(shape)
    rows = rowset(queries, "answer")

    def run() -> Tensor:
        return drops(full, queries, rows, torch.stack([read_rows(other, queries, rows) for other in others]))

    return run


def one_at_a_time(shape: Shape, sources: Sequence[int] = (1,)) -> Way:
    """Ours where no two models are held at once: a source's rows are read and the source is dropped, the full model
    comes last."""
    queries = examples(shape)
    rows = rowset(queries, "answer")

    def read(seed: int) -> Tensor:
        states = read_rows(shape.model(seed), queries, rows)
        gc.collect()
        return states

    def run() -> Tensor:
        states = torch.stack([read(seed) for seed in sources])
        gc.collect()
        return drops(shape.model(), queries, rows, states)

    return run
