"""Gradients of a loss by the held weights of a model, joint matrices included.

TransformerBridge reads a joint matrix (QKV of GPT-2, GPT-NeoX, BLOOM, Phi-3; gate and up of Phi-3) in parts, so that
autograd leaves the gradient there and none at the matrix that a checkpoint holds. Jointting only moves entries, so each
entry's gradient is moved back.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.model.bridge import JointMatrix, Model


@dataclass(frozen=True, eq=False)
class Joint:
    """The parts of a joint matrix that are read, and where each of their entries stands in what is held."""

    names: tuple[str, ...]
    """Names in `held` of the weights of the module with the joint matrix."""
    parts: tuple[Tensor, ...]
    places: tuple[Int[Tensor, "_"], ...]
    """For each entry of a part its place among those weights laid end to end, from 1; 0 for a constant."""


def gradient_of(model: Model, names: Collection[str] | None = None) -> Callable[[Float[Tensor, ""]], dict[str, Tensor]]:
    """A function that gives the gradient of a loss by each of these held weights (all without `names`), shaped and
    typed as they are; weights that the loss does not depend on are missing.

    Raises:
        KeyError: a name that is not held.
        RuntimeError: parts that are not made of their joint matrix's entries.
    """
    wanted = {name: model.held[name] for name in (model.held if names is None else names)}
    joints = [joint for joint in _joints(model) if not wanted.keys().isdisjoint(joint.names)]

    def gradients(loss: Float[Tensor, ""]) -> dict[str, Tensor]:
        leaves = [*wanted.values(), *(leaf for joint in joints for leaf in joint.parts)]
        each = torch.autograd.grad(loss, leaves, allow_unused=True)
        own, rest = each[: len(wanted)], iter(each[len(wanted) :])
        found = {name: gradient for name, gradient in zip(wanted, own, strict=True) if gradient is not None}
        for joint in joints:
            moved = _moved(joint, {name: model.held[name] for name in joint.names}, [next(rest) for _ in joint.parts])
            for name in wanted.keys() & moved.keys():
                found[name] = found[name] + moved[name] if name in found else moved[name]
        return found

    return gradients


def _joints(model: Model) -> list[Joint]:
    names = {id(weight): name for name, weight in model.held.items()}
    return [_joint(matrix, names) for matrix in model.joints()]


def _joint(matrix: JointMatrix, names: Mapping[int, str]) -> Joint:
    """Where the entries of the parts come from: seen by splitting a copy that holds places instead of weights."""
    own = [(key, weight) for key, weight in matrix.module.named_parameters() if id(weight) in names]
    numbered = copy.deepcopy(matrix.module)
    start = 1
    for key, weight in own:
        count = torch.arange(start, start + weight.numel(), dtype=torch.float64, device=weight.device)
        numbered.get_parameter(key).data = count.view_as(weight)
        start += weight.numel()
    with torch.no_grad():
        fresh = matrix.make(numbered)
    held = torch.cat([torch.zeros(1).to(own[0][1]), *(weight.detach().flatten() for _, weight in own)])
    parts, places = [], []
    for part, source in zip(matrix.parts, fresh, strict=True):
        for key, leaf in part.named_parameters():
            place = getattr(source, key).detach().flatten().long()
            if not torch.equal(held[place], leaf.detach().flatten()):
                raise RuntimeError(f"{matrix.path}: {key} of a part is not made of the joint matrix's entries")
            parts.append(leaf)
            places.append(place)
    return Joint(tuple(names[id(weight)] for _, weight in own), tuple(parts), tuple(places))


def _moved(joint: Joint, held: Mapping[str, Tensor], gradients: list[Tensor | None]) -> dict[str, Tensor]:
    """The parts' gradients at the weights that they were taken from; missing where no entry was."""
    sizes = [held[name].numel() for name in joint.names]
    flat = torch.zeros(1 + sum(sizes)).to(next(iter(held.values())))
    touched = torch.zeros_like(flat, dtype=torch.bool)
    for place, gradient in zip(joint.places, gradients, strict=True):
        if gradient is not None:
            flat.index_add_(0, place, gradient.flatten())
            touched[place] = True
    pieces = zip(joint.names, flat[1:].split(sizes), touched[1:].split(sizes), strict=True)
    return {name: piece.view_as(held[name]) for name, piece, reached in pieces if reached.any()}
