"""Causal tracing of one fact of twelve tokens: all tokens and layers, ten noise samples, an answer of one token.

Reference: ROME's code (arXiv 2202.05262) in its own steps on a bare Hugging Face model: for each token and layer one
forward pass of a clean and ten corrupted rows, logits of every position.
"""

import zlib

import torch
from torch import Tensor

from mech_unlearn.locate.patching.causal_trace import causal_trace_tokens
from mech_unlearn.model.tokens import make_queries
from speed.shapes import Shape, Way, blocks, fact, words, write

SAMPLES = 10


def plain(shape: Shape) -> Way:
    """The clean row's state copied into the corrupted rows by a hook. Effects [token, layer]."""
    hf = shape.bare()
    (query,) = make_queries(words(shape.vocabulary), [fact()], "prompt", distractors=False)
    a, b = query.span
    generator = torch.Generator().manual_seed(zlib.crc32(f"0 {query.fact.id}".encode()))
    noise = 3 * shape.spread * torch.randn(SAMPLES, b - a, shape.width, generator=generator)
    rows = torch.tensor([query.prompt]).repeat(SAMPLES + 1, 1)

    def corrupt(x: Tensor) -> Tensor:
        x = x.clone()
        x[1:, a:b] += noise
        return x

    def restored(token: int, layer: int | None) -> float:
        def restore(x: Tensor) -> Tensor:
            x = x.clone()
            x[1:, token] = x[0, token]
            return x

        handles = [write(hf.get_input_embeddings(), corrupt)]
        handles += [] if layer is None else [write(blocks(hf)[layer], restore)]
        logits = hf(rows, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return logits[1:, -1].softmax(-1)[:, query.answers[0][0]].mean().item()

    @torch.no_grad()
    def run() -> Tensor:
        low = restored(0, None)
        grid = [[restored(token, layer) - low for layer in range(shape.layers)] for token in range(len(query.prompt))]
        return torch.tensor(grid)

    return run


def ours(shape: Shape) -> Way:
    """`causal_trace_tokens`: one suffix sweep over all tokens and layers."""
    model = shape.model()
    return lambda: causal_trace_tokens(model, fact(), samples=SAMPLES, sigma=shape.spread).values
