"""Latent activations of chosen states, block by block, and how often latents fire on generic text."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import stream
from mech_unlearn.model.latents import Sae
from mech_unlearn.model.pieces import pieces

MIN_BACKGROUND = 1000
"""Generic tokens below which a firing frequency of 2 % (20 firings) cannot be told from chance."""
ACTIVE = 1e-6
"""A latent counts as active above this. Source: the code of 2411.14257."""
CODES = 2**24
"""Numbers in one block of latent activations at the most (64 MiB of float32)."""


@dataclass(frozen=True, eq=False)
class Background:
    """How often latents fire on generic text."""

    rate: Float[Tensor, " d_sae"] | None
    """Share of tokens on which each latent is active; None with fewer than 1,000 tokens."""
    tokens: int


def check_sae(model: Model, sae: Sae) -> None:
    """Check that an SAE fits the model it is used on.

    Raises:
        ValueError: the model lacks the SAE's site, has another width there, or a site of attention heads.
    """
    site, width = sae.site, model.d_model
    if site.kind in ("q", "k", "v", "z"):
        raise ValueError(f"the SAE sits at {site}, which has an axis of heads; use one at another kind of site")
    try:
        model.resolve(site)
        if site.kind == "mlp_post":
            width = model.held[model.w_out(site.layer)[0]].numel() // model.d_model
    except KeyError as error:
        raise ValueError(f"the SAE sits at {site}: {error.args[0]}") from error
    reads = getattr(sae.sae.cfg, "d_in", width)
    if reads != width:
        raise ValueError(f"the SAE reads {reads} dimensions, {site} of {model.name!r} has {width}; load one for it")


@torch.no_grad()
def latent_blocks(
    model: Model, sae: Sae, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], max_tokens: int = 8192
) -> Iterator[tuple[Int[Tensor, "state 2"], Float[Tensor, "state d_sae"]]]:
    """(row, position) and latent activations of chosen states of token rows, block by block, on the model's device."""
    for part in stream(model, rows, [sae.site], positions, max_tokens=max_tokens):
        size = max(1, CODES // sae.d_sae)
        for index, states in zip(part.index.split(size), part.at[sae.site].split(size), strict=True):
            yield index, sae.encode(states.to(model.device))


def _generic_tokens(
    model: Model, texts: Sequence[str], names: Sequence[str], context: int = 512
) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """Rows of token ids, and the positions in each that hold neither a special token nor a part of a name."""
    longest_first = sorted(set(names), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")  # without names it matches nowhere
    spans = [[match.span() for match in pattern.finditer(text)] for text in texts]
    cut = pieces(model, texts, context)
    positions = [
        [i for i, (a, b) in enumerate(p.offsets) if b > a and not any(a < e and b > s for s, e in spans[p.text])]
        for p in cut
    ]
    return [piece.ids for piece in cut], positions


def background(
    model: Model, sae: Sae, texts: Sequence[str], names: Sequence[str] = (), threshold: float = ACTIVE
) -> Background:
    """Share of generic tokens on which each latent fires; special tokens and tokens of the names do not count."""
    fired, count = torch.zeros(sae.d_sae), 0
    for index, acts in latent_blocks(model, sae, *_generic_tokens(model, texts, names)):
        fired += (acts > threshold).sum(0).cpu()
        count += len(index)
    return Background(fired / count if count >= MIN_BACKGROUND else None, count)
