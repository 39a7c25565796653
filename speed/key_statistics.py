"""Second moments of the MLP keys of three layers that end at the fifth of twelve, over 32 x 128 tokens; no disk.

Reference: bare forward passes of the whole Hugging Face model over the same texts, with the attention that transformers
picks, keys kept but for each text's first. Ours ends at the fifth layer and forms the d_mlp x d_mlp products.
`key_statistics_limit` is against the limit: the five layers alone, bare, where the products are, even by halves,
another 0.45 of the arithmetic.
"""

from typing import Any

import torch
from torch import Tensor

from mech_unlearn.methods.writing.key_statistics import second_moments
from mech_unlearn.methods.writing.keys import default_layers
from speed.shapes import Shape, Way, blocks

TEXTS, TOKENS = 32, 128


def _rows(shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.vocabulary - 2, (TEXTS, TOKENS), generator=generator)


def whole(shape: Shape) -> Way:
    """Keys [layer, token, d_mlp] from whole forward passes."""
    hf = shape.bare()
    rows, layers = _rows(shape), default_layers(shape.layers)
    kept = _kept(shape, hf, layers)

    @torch.no_grad()
    def run() -> Tensor:
        hf(rows, use_cache=False)
        return torch.stack([kept[layer] for layer in layers])

    return run


def _kept(shape: Shape, hf: Any, layers: tuple[int, ...]) -> dict[int, Tensor]:
    """Filled with the keys of each layer whenever the model runs."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int):
        def hook(_: Any, given: tuple) -> None:
            kept[layer] = given[0][:, 1:].flatten(0, 1)

        return hook

    for layer in layers:
        mlp: Any = blocks(hf)[layer].mlp
        out: Any = mlp.c_proj if shape.architecture == "gpt2" else mlp.down_proj
        out.register_forward_pre_hook(keep(layer))
    return kept


def limit(shape: Shape) -> Way:
    """Keys [layer, token, d_mlp] from the layers up to the deepest, one after the other, with eager attention."""
    hf = shape.bare()
    hf.set_attn_implementation("eager")
    rows, layers, body = _rows(shape), default_layers(shape.layers), hf.base_model
    places = torch.arange(rows.shape[1])[None]
    mask = torch.full((rows.shape[1], rows.shape[1]), torch.finfo(torch.float32).min).triu(1)[None, None]
    kept = _kept(shape, hf, layers)

    @torch.no_grad()
    def run() -> Tensor:
        given: dict[str, Any] = dict(attention_mask=mask)
        if shape.architecture == "gpt2":
            x = body.wte(rows) + body.wpe(places)
        else:
            x = body.embed_tokens(rows)
            given["position_embeddings"] = body.rotary_emb(x, places)
        for block in blocks(hf)[: layers[-1] + 1]:
            out = block(x, **given)
            x = out[0] if isinstance(out, tuple) else out
        return torch.stack([kept[layer] for layer in layers])

    return run


def moments(keys: Tensor) -> Tensor:
    """E[k k^T] of each layer in float64, [layer, d_mlp, d_mlp]."""
    return torch.stack([some.double().T @ some.double() / len(some) for some in keys])


def ours(shape: Shape) -> Way:
    """`second_moments`: one pass for all layers, which ends at the deepest."""
    model, layers = shape.model(), default_layers(shape.layers)
    rows = [tuple(row) for row in _rows(shape).tolist()]

    def run() -> Tensor:
        found = second_moments(model, rows, layers)
        return torch.stack([found[layer] for layer in layers])

    return run
