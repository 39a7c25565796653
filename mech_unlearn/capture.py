"""Activations of prompts at chosen sites and positions, in memory or streamed to disk.

What is in memory at any time: the weights, one batch of at most `max_tokens` tokens on its way through the layers
up to the last site that was asked for (the layers above it, the final norm and the unembedding never run), the
chosen positions of that batch, and, with a folder, the chosen positions of the shard being filled. Without a folder
the store holds all chosen positions and nothing else.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.model import Model
from mech_unlearn.prompts import buckets

Place = Site | str
At = Literal["all", "last"] | Sequence[int] | Sequence[Sequence[int]]
"""All positions, the last one, one position per prompt, or several positions per prompt."""


class _Stop(Exception):
    """Ends a forward pass whose remaining layers nobody asked for."""


@dataclass(frozen=True, eq=False)
class States:
    """Activations of some (prompt, position) pairs at every site, one row per pair."""

    index: Int[Tensor, "state 2"]
    """Prompt and position (in the unpadded prompt) of each row."""
    at: Mapping[Place, Tensor]
    """Site -> [state, d] on the CPU."""


def _positions(prompts: Sequence[Sequence[int]], at: At) -> list[tuple[int, ...]]:
    if at == "all":
        return [tuple(range(len(row))) for row in prompts]
    if at == "last":
        return [(len(row) - 1,) for row in prompts]
    if isinstance(at, str):
        raise ValueError(f"at={at!r}: choose 'all', 'last' or give the positions of each prompt")
    if len(at) != len(prompts):
        raise ValueError(f"at names the positions of {len(at)} prompts, but there are {len(prompts)}")
    chosen = [(p,) if isinstance(p, int) else tuple(p) for p in at]
    for i, (row, places) in enumerate(zip(prompts, chosen, strict=True)):
        if not all(0 <= p < len(row) for p in places):
            raise ValueError(f"prompt {i} has positions 0..{len(row) - 1}, asked for {places}")
    return chosen


def _check(model: Model, prompts: Sequence[Sequence[int]], sites: Sequence[Place]) -> None:
    if not sites:
        raise ValueError("no site to capture: name at least one")
    for site in sites:
        model.resolve(site)
    for i, row in enumerate(prompts):
        if len(row) == 0:
            raise ValueError(f"prompt {i} is empty: it has no tokens")


@torch.no_grad()
def _run(model: Model, ids: Tensor, index: Tensor, sites: Sequence[Place]) -> dict[Place, Tensor]:
    """One forward pass that ends at the last site; `index` [state, 2] are row and position of what is kept."""
    kept: dict[Place, Tensor] = {}
    # Interventions of an edit in force may sit above the last site and must see every forward pass.
    early = not model.active

    def keep(site: Place):
        def read(x: Tensor) -> None:
            if x.shape[:2] != ids.shape:
                raise ValueError(f"{site!s} has shape {tuple(x.shape)}, not one state per position; it cannot be captured")
            kept[site] = x[index[:, 0], index[:, 1]].cpu()
            if early and len(kept) == len(sites):
                raise _Stop

        return read

    with model.hooks(*((site, keep(site)) for site in sites)):
        try:
            model.logits(ids)
        except _Stop:
            pass
    return kept


def stream(
    model: Model, prompts: Sequence[Sequence[int]], sites: Sequence[Place], at: At = "all", *, max_tokens: int = 8192
) -> Iterator[States]:
    """States of one batch after the other, shortest prompts first; nothing but the batch is held.

    Args:
        prompts: rows of token ids, special tokens included (`prompts.encode(...).ids`).
        max_tokens: tokens of one batch at the most (a longer prompt is a batch of its own).

    Raises:
        KeyError: a site the model lacks. ValueError: an empty prompt or a position outside of its prompt.
    """
    sites = tuple(dict.fromkeys(sites))
    _check(model, prompts, sites)
    positions = _positions(prompts, at)
    for members in buckets(prompts, max_tokens):
        ids = torch.tensor([list(prompts[i]) for i in members], device=model.device)
        local = [(row, p) for row, i in enumerate(members) for p in positions[i]]
        if not local:
            continue
        index = torch.tensor(local, device=model.device)
        kept = _run(model, ids, index, sites)
        yield States(torch.stack([torch.tensor(members)[index[:, 0].cpu()], index[:, 1].cpu()], 1), kept)
