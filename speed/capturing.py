"""Capture of three sites over 16 prompts of 128 tokens, the last site in the eighth of twelve layers.

Reference: the limit, namely nothing but the layers that are needed, called one after the other on the bare Hugging Face
blocks with eager attention, as ours has, and their outputs kept. Nothing else is held by ours: the store has exactly
3 x 2,048 x d_model numbers and an index of 2,048 x 2, which is checked in every run.
"""

from typing import Any

import torch
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.model.capture import capture
from speed.shapes import Shape, Way, blocks

PROMPTS, TOKENS = 16, 128


def _layers(shape: Shape) -> tuple[int, ...]:
    """1, 4 and 7 of twelve."""
    return tuple(shape.layers * 2 * i // 9 - 1 for i in (1, 2, 3)) if shape.layers < 9 else (1, 4, 7)


def _rows(shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.vocabulary - 2, (PROMPTS, TOKENS), generator=generator)


def plain(shape: Shape) -> Way:
    """States [site, prompt and position, d_model]."""
    hf = shape.bare()
    hf.set_attn_implementation("eager")
    rows, layers, body = _rows(shape), _layers(shape), hf.base_model

    @torch.no_grad()
    def run() -> Tensor:
        places = torch.arange(TOKENS)[None]
        mask = torch.full((TOKENS, TOKENS), torch.finfo(torch.float32).min).triu(1)[None, None]
        given: dict[str, Any] = dict(attention_mask=mask)
        if shape.architecture == "gpt2":
            x = body.wte(rows) + body.wpe(places)
        else:
            x = body.embed_tokens(rows)
            given["position_embeddings"] = body.rotary_emb(x, places)
        kept = []
        for layer, block in enumerate(blocks(hf)[: layers[-1] + 1]):
            out = block(x, **given)
            x = out[0] if isinstance(out, tuple) else out
            if layer in layers:
                kept.append(x.flatten(0, 1))
        return torch.stack(kept)

    return run


def ours(shape: Shape) -> Way:
    """`capture`, which ends the forward pass at the last site."""
    model, rows = shape.model(), _rows(shape).tolist()
    sites = [Site(layer, "resid_post") for layer in _layers(shape)]

    def run() -> Tensor:
        store = capture(model, rows, sites)
        assert store.held is not None and list(store.held.at) == sites
        held = [x.numel() for x in store.held.at.values()]
        assert held == [PROMPTS * TOKENS * shape.width] * len(sites) and store.index.numel() == 2 * PROMPTS * TOKENS
        return torch.stack([store[site] for site in sites])

    return run
