"""What a closed-form write must leave alone: the second moment of retained keys and the directions they hardly use."""

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.capture import At, stream
from mech_unlearn.core import RetainSet, Site
from mech_unlearn.methods.keys import Row, mentions, names_of
from mech_unlearn.model import Model
from mech_unlearn.prompts import encode_all, make_queries

Part = Literal["entities", "prompts", "texts"]
PARTS: tuple[Part, ...] = get_args(Part)


def second_moments(
    model: Model, rows: Sequence[Row], layers: Sequence[int], at: At = "all"
) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:
    """Uncentred second moment E[k k^T] of the MLP keys of each layer, streamed over batches in float64.

    Args:
        at: "all" tokens of each row, or only the "last".
    """
    sums: dict[int, Tensor] = {}
    count = 0
    for part in stream(model, rows, [Site(layer, "mlp_post") for layer in layers], at):
        count += len(part.index)
        for layer in layers:
            keys = part.at[Site(layer, "mlp_post")].to(model.device).double()
            moment = keys.T @ keys
            sums[layer] = sums[layer] + moment if layer in sums else moment
    return {layer: total / count for layer, total in sums.items()}


def null_basis(moment: Float[Tensor, "d_mlp d_mlp"], energy: float) -> Float[Tensor, "d_mlp kept"]:
    """Orthonormal directions that keys hardly use: those whose cumulative energy from the bottom is at most
    `energy` x trace.

    With B the basis and P = B B^T, tr(P E[k k^T]) <= energy * tr(E[k k^T]): what a write through P does to an
    average key is bounded by that share.
    """
    values, vectors = torch.linalg.eigh(moment)
    kept = values.clamp(min=0).cumsum(0) <= energy * values.sum()
    return vectors[:, kept]


def protected_bases(
    model: Model,
    retain: RetainSet,
    contexts: Sequence[str],
    layers: Sequence[int],
    parts: Sequence[str],
    energy: float,
) -> dict[int, Float[Tensor, "d_mlp kept"]]:
    """Layer -> directions that a write may use; no layer at all where `parts` is empty (P = I).

    The moment of the retained names and that of all other tokens count one half each: names are few, and a mean over
    all tokens would drown them.

    Raises:
        ValueError: `parts` names something else, the retain set has nothing of what it names, or no direction is left.
    """
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"protect names {sorted(unknown)}; choose from {', '.join(PARTS)}")
    if not parts:
        return {}
    tokenizer = model.tokenizer
    names = mentions(tokenizer, names_of(retain.entities), contexts) if "entities" in parts else []
    running: list[Row] = []
    if "prompts" in parts:
        running += [query.full for query in make_queries(tokenizer, retain.facts, distractors=False)]
    if "texts" in parts:
        known = encode_all(tokenizer, retain.texts)
        running += [known[text].ids for text in retain.texts]
    groups: list[tuple[list[Row], At]] = [(rows, at) for rows, at in ((names, "last"), (running, "all")) if rows]
    if not groups:
        raise ValueError(f"the retain set has none of {', '.join(parts)}: give some, or protect=() to protect nothing")
    found = [second_moments(model, rows, layers, at) for rows, at in groups]
    _warn_if_few(sum(len(rows) if at == "last" else sum(map(len, rows)) for rows, at in groups), found[0][layers[0]])
    moments = {layer: torch.stack([part[layer] for part in found]).mean(0) for layer in layers}
    bases = {layer: null_basis(moment, energy) for layer, moment in moments.items()}
    for layer, basis in bases.items():
        if not basis.shape[1]:
            raise ValueError(f"layer {layer}: no direction is free at energy={energy}; raise it or protect less")
    return bases


def _warn_if_few(n_keys: int, moment: Tensor) -> None:
    if n_keys < len(moment):
        warnings.warn(
            f"{n_keys} protected keys for d_mlp={len(moment)}: directions count as free that more text would use; "
            "give more retain texts",
            stacklevel=4,
        )
