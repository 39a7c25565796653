"""One name redirected to another in three layers, in six contexts of 4 to 9 tokens, as in the paper's code.

Reference: the time of 15 bare forward passes of a Hugging Face model over the edit's own batch of mentions, so that a
ratio of 1 means an edit costs 15 of them. What it gives back was made before, from the equations: a dense d_mlp x d_mlp
solve per layer on the bare model. Statistics (the protected directions) and the hash of the checkpoint are made
before in both ways: they are had once per model.
"""

from typing import Any

import torch
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.methods.writing import keys
from speed.shapes import Shape, Way, blocks

FORWARDS = 15
RIDGE = 0.05
NAME, ANCHOR = "w12 w13 w14", "w22 w23 w24"
CONTEXTS = tuple(" ".join([*(f"w{40 + i + j}" for j in range(i + 1)), "{}", "w9"]) for i in range(6))


def _basis(shape: Shape, width: int) -> Tensor:
    """Half of all directions, orthonormal."""
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(width, width // 2, generator=generator, dtype=torch.float64)).Q


def _out(hf: Any, layer: int, shape: Shape) -> Any:
    mlp: Any = blocks(hf)[layer].mlp
    return mlp.c_proj if shape.architecture == "gpt2" else mlp.down_proj


def _width(shape: Shape) -> int:
    return shape.width * 4 if shape.architecture == "gpt2" else shape.width * 8 // 3


def _ids(name: str) -> list[list[int]]:
    """Token ids of each context up to the name's last token; word i of the vocabulary is token i."""
    return [[int(word[1:]) for word in context.split("{}")[0].split() + name.split()] for context in CONTEXTS]


def _dense(hf: Any, shape: Shape) -> Tensor:
    """The delta of each layer times the probe, [layer, d_mlp], by the equations; the model is left as it was."""
    layers = keys.default_layers(shape.layers)
    seen: dict[str, Tensor] = {}

    def look(name: str, layer: int) -> tuple[Tensor, Tensor]:
        handles = [
            _out(hf, layer, shape).register_forward_pre_hook(lambda _, given: seen.update(key=given[0][0, -1])),
            blocks(hf)[layers[-1]].register_forward_hook(
                lambda _, __, out: seen.update(z=(out[0] if isinstance(out, tuple) else out)[0, -1])
            ),
        ]
        found = []
        for row in _ids(name):
            hf(torch.tensor([row]), use_cache=False)
            found.append((seen["key"].double(), seen["z"].double()))
        for handle in handles:
            handle.remove()
        every = zip(*found, strict=True)
        key, z = (torch.stack(part).mean(0) for part in every)
        return key, z

    basis, out = _basis(shape, _width(shape)), []
    p = basis @ basis.T
    target = look(ANCHOR, layers[0])[1]
    saved = {layer: _out(hf, layer, shape).weight.detach().clone() for layer in layers}
    for i, layer in enumerate(layers):
        key, z = look(NAME, layer)
        shift = (target - z) / (len(layers) - i)
        ridge = RIDGE * (p @ key).square().sum()
        delta = torch.linalg.solve(
            p @ torch.outer(key, key) + ridge * torch.eye(len(p)).double(), torch.outer(p @ key, shift)
        )
        weight = _out(hf, layer, shape).weight
        weight.data += (delta if shape.architecture == "gpt2" else delta.T).float()
        out.append(delta @ torch.ones(shape.width, dtype=torch.float64))
    for layer, weight in saved.items():
        _out(hf, layer, shape).weight.data.copy_(weight)
    return torch.stack(out)


@torch.no_grad()
def plain(shape: Shape) -> Way:
    """15 forward passes over the mentions; the result was made before."""
    hf = shape.bare()
    expected, rows = _dense(hf, shape), _ids(NAME)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])

    @torch.no_grad()
    def run() -> Tensor:
        for _ in range(FORWARDS):
            hf(ids, attention_mask=mask, use_cache=False)
        return expected

    return run


def ours(shape: Shape) -> Way:
    """The steps of `Rocr.fit` from names to deltas."""
    model, layers = shape.model(), keys.default_layers(shape.layers)
    site, basis = Site(layers[-1], "resid_post"), _basis(shape, _width(shape))
    bases = dict.fromkeys(layers, basis)
    own = torch.ones(1, len(CONTEXTS), dtype=torch.bool)

    def run() -> Tensor:
        target = keys.end_states(model, keys.mention_rows(model.tokenizer, [ANCHOR], CONTEXTS), [site])[site]
        rows = keys.mention_rows(model.tokenizer, [NAME], CONTEXTS)
        deltas, _ = keys.write_states(model, rows, target, site, layers=layers, bases=bases, ridge=RIDGE, own=own)
        ones = torch.ones(shape.width, dtype=torch.float64)
        found = []
        for layer in layers:
            name, stored_in_first = model.w_out(layer)
            left, right = deltas[name].left.double(), deltas[name].right.double()
            found.append(left @ (right @ ones) if stored_in_first else (ones @ left) @ right)
        return torch.stack(found)

    return run
