"""What a closed-form write must leave alone: the second moment of retained keys and the directions they hardly use."""

import hashlib
import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import RetainSet
from mech_unlearn.edit.interventions import Tokens
from mech_unlearn.methods.writing.key_statistics import cached, damped, rows_hash, second_moments
from mech_unlearn.methods.writing.keys import mention_rows, names_of
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import At
from mech_unlearn.model.pieces import token_rows
from mech_unlearn.model.tokens import make_queries

KeySource = Literal["entities", "prompts", "texts"]
Projection = Literal["none", "null_space"]
KEY_SOURCES: tuple[KeySource, ...] = get_args(KeySource)


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
    cache_dir: str | os.PathLike | None = None,
) -> dict[int, Float[Tensor, "d_mlp kept"]]:
    """Layer -> directions that a write may use; no layer at all where `parts` is empty (P = I).

    The moment of the retained names and that of all other tokens count one half each: names are few, and a mean over
    all tokens would drown them.

    Args:
        cache_dir: folder in which moments and bases are kept for the next time; None: no disk.

    Raises:
        ValueError: `parts` names something else, the retain set has nothing of what it names, or no direction is left.
    """
    if not parts:
        return {}
    groups = protected_rows(model, retain, contexts, parts)

    def compute(missing: Sequence[int]) -> dict[int, Tensor]:
        moments = _mean_moments(model, groups, missing, cache_dir)
        return {layer: null_basis(moment, energy) for layer, moment in moments.items()}

    if cache_dir is None:
        bases = compute(layers)
    else:
        data = hashlib.sha256("".join(rows_hash(rows, at) for rows, at in groups).encode()).hexdigest()
        identity = {"model": model.state_hash(), "data": data, "energy": repr(float(energy))}
        bases = cached(cache_dir, "basis", identity, layers, compute, model)
    for layer, basis in bases.items():
        if not basis.shape[1]:
            raise ValueError(f"layer {layer}: no direction is free at energy={energy}; raise it or protect less")
    return bases


def protected_moments(
    model: Model,
    retain: RetainSet,
    contexts: Sequence[str],
    layers: Sequence[int],
    parts: Sequence[str],
    cache_dir: str | os.PathLike | None = None,
) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:
    """Layer -> second moment E[k k^T] of what must stay: retained names and all other tokens count one half each.

    Raises:
        ValueError: `parts` is empty or names something else, or the retain set has nothing of what it names.
    """
    if not parts:
        raise ValueError(
            f"protect=() leaves no keys to take the statistics C from; name some of {', '.join(KEY_SOURCES)}"
        )
    return _mean_moments(model, protected_rows(model, retain, contexts, parts), layers, cache_dir)


def protected_rows(
    model: Model, retain: RetainSet, contexts: Sequence[str], parts: Sequence[str]
) -> list[tuple[list[Tokens], At]]:
    """(Rows, which of their tokens) of what must stay: the retained names' mentions, and running text.

    Raises:
        ValueError: `parts` names something else, or the retain set has nothing of what it names.
    """
    if unknown := set(parts) - set(KEY_SOURCES):
        raise ValueError(f"protect names {sorted(unknown)}; choose from {', '.join(KEY_SOURCES)}")
    tokenizer = model.tokenizer
    names = mention_rows(tokenizer, names_of(retain.entities), contexts) if "entities" in parts else []
    running: list[Tokens] = []
    if "prompts" in parts:
        running += [query.full for query in make_queries(tokenizer, retain.facts, distractors=False)]
    if "texts" in parts:
        running += token_rows(model, retain.texts)
    both: tuple[tuple[list[Tokens], At], ...] = ((names, "last"), (running, "ordinary"))
    groups: list[tuple[list[Tokens], At]] = [(rows, at) for rows, at in both if rows]
    if not groups:
        raise ValueError(f"the retain set has none of {', '.join(parts)}: give some, or protect=() to protect nothing")
    return groups


def check_projection(settings: Any, model: Model) -> None:
    """Refuse settings that cannot be meant, before any work.

    Raises:
        ValueError: another projection, a negative damping, or an edit of activations in force.
    """
    if settings.project not in get_args(Projection):
        raise ValueError(f"project={settings.project!r}: choose from {', '.join(get_args(Projection))}")
    if settings.damping < 0:
        raise ValueError(f"damping={settings.damping}: a share of the mean of C's diagonal, 0 or more")
    if settings.project == "null_space" and not settings.protect:
        raise ValueError('project="null_space" with protect=() protects nothing: name what is to be protected')
    if model.in_force.interventions:
        raise ValueError(
            f"{model.name!r} has an edit of activations in force, which optimisation does not see; leave it"
        )


def spaces(
    settings: Any, model: Model, retain: RetainSet, contexts: tuple[str, ...], layers: tuple[int, ...]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """(Layer -> basis of the null space, layer -> damped C): one of the two is empty, by `settings.project`."""
    cache: str | os.PathLike | None = settings.cache_dir
    if settings.project == "null_space":
        return protected_bases(model, retain, contexts, layers, settings.protect, settings.energy, cache), {}
    moments = protected_moments(model, retain, contexts, layers, settings.protect, cache)
    return {}, {layer: damped(moment, settings.damping) for layer, moment in moments.items()}


def _mean_moments(
    model: Model, groups: Sequence[tuple[list[Tokens], At]], layers: Sequence[int], cache_dir: str | os.PathLike | None
) -> dict[int, Tensor]:
    found = [second_moments(model, rows, layers, at, cache_dir) for rows, at in groups]
    _warn_if_few(sum(len(rows) if at == "last" else sum(map(len, rows)) for rows, at in groups), found[0][layers[0]])
    return {layer: torch.stack([part[layer] for part in found]).mean(0) for layer in layers}


def _warn_if_few(n_keys: int, moment: Tensor) -> None:
    if n_keys < len(moment):
        warnings.warn(
            f"{n_keys} protected keys for d_mlp={len(moment)}: directions count as free that more text would use; "
            "give more retain texts",
            stacklevel=6,
        )
