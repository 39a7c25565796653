"""A sparse autoencoder of 32 x d_model latents (24,576 of 768) on 2,048 residual states.

Encoding. Reference: the limit, one dense matmul with its bias (for TopK without choosing the k largest).
Ablating 16 latents. Reference: sae-lens's splice with its error term: encode, decode, and encode and decode again for
what the SAE leaves unexplained.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.locate.latents.ablate_latents import ablate
from mech_unlearn.model.latents import Sae
from mech_unlearn.model.scores import Batch
from speed.shapes import Shape, Way

Kind = Literal["standard", "topk"]
STATES, EXPANSION, K = 2048, 32, 32


def random_sae(shape: Shape, kind: Kind) -> Sae:
    """Random unit decoder rows, the encoder their transpose."""
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    size: dict[str, Any] = dict(d_in=shape.width, d_sae=EXPANSION * shape.width, dtype="float32", device="cpu")
    made = StandardSAE(StandardSAEConfig(**size)) if kind == "standard" else TopKSAE(TopKSAEConfig(k=K, **size))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        rows = torch.randn(size["d_sae"], shape.width, generator=generator)
        made.W_dec.copy_(rows / rows.norm(dim=-1, keepdim=True))
        made.W_enc.copy_(made.W_dec.T)
        made.b_enc.fill_(-0.1)
        made.b_dec.copy_(torch.randn(shape.width, generator=generator))
    return Sae(Site(shape.layers // 2, "resid_post"), made.eval().requires_grad_(False))


def states(shape: Shape) -> Tensor:
    return torch.randn(STATES, shape.width, generator=torch.Generator().manual_seed(3))


def matmul(shape: Shape, kind: Kind) -> Way:
    """Pre-activations; `chosen` makes activations of them outside of the time."""
    sae, x = random_sae(shape, kind).sae, states(shape)
    bias = sae.b_enc - sae.b_dec @ sae.W_enc

    @torch.no_grad()
    def run() -> Tensor:
        return torch.addmm(bias, x, sae.W_enc)

    return run


def chosen(pre: Tensor, kind: Kind) -> Tensor:
    """Activations from pre-activations."""
    if kind == "topk":
        top, index = pre.topk(K, -1)
        pre = torch.zeros_like(pre).scatter_(-1, index, top)
    return pre.relu()


def encode(shape: Shape, kind: Kind) -> Way:
    """`Sae.encode`."""
    sae, x = random_sae(shape, kind), states(shape)
    return torch.no_grad()(lambda: sae.encode(x))


def latents(shape: Shape) -> list[int]:
    """16 latents, spread over the dictionary; the first is the one most often active in the states."""
    return list(range(0, EXPANSION * shape.width, 2 * shape.width))[:16]


def splice(shape: Shape, kind: Kind) -> Way:
    """sae-lens's forward pass with `use_error_term` and a hook that zeroes the latents. States [state, d_model]."""
    sae, x, off = random_sae(shape, kind).sae, states(shape), latents(shape)
    sae.use_error_term = True

    def zero(codes: Tensor, hook: Any) -> Tensor:
        codes[..., off] = 0
        return codes

    @torch.no_grad()
    def run() -> Tensor:
        return sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", zero)])

    return run


def ablated(shape: Shape, kind: Kind) -> Way:
    """`locate.ablate_latents.ablate` on the same states, error kept."""
    model, sae, x, off = shape.model(), random_sae(shape, kind), states(shape), latents(shape)
    rows = torch.zeros(16, STATES // 16, dtype=torch.long)
    ends = torch.full((16,), STATES // 16 - 1)
    batch = Batch(rows, torch.arange(16), torch.tensor([[0, 1]]).expand(16, -1), ends)

    @torch.no_grad()
    def run() -> Tensor:
        out = ablate(model, sae, off, "all")(x.unflatten(0, (16, -1)), batch)
        assert out is not None
        return out.flatten(0, 1)

    return run
