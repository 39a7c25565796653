"""Changes of single value vectors, and what an edit does to the facts it was made for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact
from mech_unlearn.edit.edit import Edit, LowRank
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.scores import score
from mech_unlearn.model.tokens import make_queries

Neuron = tuple[int, int]
"""Layer and index: a column of that layer's MLP output matrix [d_model, d_mlp]."""


def stored_vector(model: Model, neuron: Neuron) -> Float[Tensor, " d_model"]:
    """The value vector of a neuron as it lies in the weights, float32.

    Raises:
        ValueError: a layer or neuron that the model lacks.
    """
    layer, j = neuron
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"neuron {neuron}: {model.name!r} has layers 0..{model.n_layers - 1}")
    name, stored_in_first = model.w_out(layer)
    matrix = model.held[name].detach() if stored_in_first else model.held[name].detach().T
    if not 0 <= j < len(matrix):
        raise ValueError(f"neuron {neuron}: layer {layer} of {model.name!r} has neurons 0..{len(matrix) - 1}")
    return matrix[j].float()


def column_deltas(model: Model, changes: Mapping[Neuron, Float[Tensor, " d_model"]]) -> dict[str, LowRank]:
    """Deltas of the MLP output matrices that add each change to one value vector, and exactly zero elsewhere."""
    out = {}
    for layer in sorted({layer for layer, _ in changes}):
        own = {j: change.detach().float().cpu() for (at, j), change in changes.items() if at == layer}
        name, stored_in_first = model.w_out(layer)
        vectors = torch.stack(list(own.values()))
        places = torch.zeros(len(own), model.held[name].numel() // model.d_model)
        places[torch.arange(len(own)), torch.tensor(list(own))] = 1
        out[name] = (
            LowRank(places.T.contiguous(), vectors) if stored_in_first else LowRank(vectors.T.contiguous(), places)
        )
    return out


def best_neurons(found: Attribution, n: int) -> tuple[Neuron, ...]:
    """The n best (layer, index) of an attribution.

    Raises:
        ValueError: an attribution with other axes than layer and neuron.
    """
    if set(found.axes) != {"layer", "neuron"}:
        raise ValueError(f"attribution {found.name!r} has axes {found.axes}; one over (layer, neuron) is needed")
    return tuple((at["layer"], at["neuron"]) for at, _ in found.top(n))


def checked(model: Model, neurons: Sequence[Neuron]) -> tuple[Neuron, ...]:
    """The neurons, each once, in their order.

    Raises:
        ValueError: none, or one that the model lacks.
    """
    if not neurons:
        raise ValueError("no neuron to change: give at least one (layer, neuron)")
    for neuron in neurons:
        stored_vector(model, neuron)
    return tuple(dict.fromkeys((int(layer), int(j)) for layer, j in neurons))


def outcome(model: Model, edit: Edit, facts: Sequence[Fact]) -> dict[str, Any]:
    """Share of the facts' main prompts answered (greedy) before the edit and under it."""
    queries = make_queries(model.tokenizer, facts, "prompt", distractors=False)
    before = score(model, queries).exact.float().mean().item()
    with edit.on(model):
        after = score(model, queries).exact.float().mean().item()
    return {"forget_recall_before": before, "forget_recall_after": after}
