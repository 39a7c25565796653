"""Needle: overwrite the few MLP value vectors that hold a concept, and nothing else.

Paper:    Hong, Yu, Yang, Ravfogel, Geva 2024, Intrinsic evaluation of unlearning using parametric knowledge traces,
          arXiv 2406.11614: "Needle" adds noise to one concept vector and may then train it.
Changes:  the chosen columns of the MLP output matrices [d_model, d_mlp]; every other entry stays bit-identical.
Needs:    nothing if the vectors are given; else a search of the weights (`locate.neurons`); training: one
          backward pass per batch.
Differs:  the noise's length is given relative to the vector's by default: the paper's absolute std of 0.1 is 6.4 long
          in 4,096 dimensions, several times a Llama 2 value vector, and means something else in others. Trained on the
          forget facts' answers, not on chunks of an article. The official gradient mask lets AdamW's decoupled
          weight decay shrink the whole matrix and the embeddings at every step; here all other entries are put back and
          decay is off by default. "zero" and "mean" are added.
Fails:    a concept that is spread over many vectors, or that the unembedding does not read off them (early layers);
          the vectors found for facts with different objects promote all of these a little. Gated MLPs may need a vector
          with a negative coefficient, which the search does not see.
"""

import re
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods.writing.columns import Neuron, best_neurons, checked, column_deltas, outcome, stored_vector
from mech_unlearn.methods.writing.keys import count_forwards
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import Around
from mech_unlearn.training.losses import ascent
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import train


@dataclass(frozen=True, kw_only=True)
class Needle:
    """Settings of the ablation; `fit` computes it."""

    vectors: tuple[Neuron, ...] | None = None
    """(layer, index) of each vector, for example `columns.best_neurons` of an attribution; None searches, for each
    entity to be forgotten, for those that promote the objects of its facts most."""
    n: int = 1
    """Vectors taken from the search for each entity; the paper's concepts have one each."""
    mode: Literal["noise", "zero", "mean"] = "noise"
    """Add Gaussian noise, set to zero, or set to the mean value vector of the layer."""
    ratio: float = 5.0
    """Expected length of the noise over the vector's length."""
    std: float | None = None
    """Standard deviation of the noise in each dimension, in place of `ratio`; 0.1 in the paper."""
    schedule: Schedule = Schedule(lr=0.2, epochs=0, weight_decay=0.0)
    """Of gradient ascent after the ablation; epochs=0 trains nothing, the paper takes 1. Source of lr: the official
    default script, whose batches are 4 x 8 and whose weight decay of 0.01 leaks to all other vectors."""
    seed: int = 0
    """Draws the noise and the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Edit:
        """The change of the chosen vectors.

        Raises:
            ValueError: a vector the model lacks, a setting out of range, or an intervention in force.
        """
        start = time.perf_counter()
        if not self.ratio > 0 or (self.std is not None and not self.std > 0) or self.n < 1:
            raise ValueError(f"ratio={self.ratio}, std={self.std}, n={self.n}: out of range")
        if model.in_force.interventions:
            raise ValueError(f"{model.name!r} has an edit of activations in force; leave it before changing weights")
        with count_forwards(model) as forwards:
            found = self._found(model, forget)
            chosen = checked(
                model,
                self.vectors if self.vectors is not None else [neuron for own in found.values() for neuron in own],
            )
            changes = self._ablated(model, chosen)
            edit = Edit(name="needle", base=model.hash(), deltas=column_deltas(model, changes))
            report: dict[str, Any] = {"n_backward": 0, "n_forward": 0}
            if self.schedule.epochs:
                changes, report = self._trained(model, forget, edit, chosen)
                edit = Edit(name="needle", base=edit.base, deltas=column_deltas(model, changes))
            report |= outcome(model, edit, forget.facts)
        report |= {
            "vectors": [list(neuron) for neuron in chosen],
            "found": {name: [list(neuron) for neuron in own] for name, own in found.items()},
            "change_over_norm": [_ratio(changes[neuron], stored_vector(model, neuron)) for neuron in chosen],
            "cosine": [_cosine(stored_vector(model, neuron).cpu(), changes[neuron]) for neuron in chosen],
            "n_forward": report["n_forward"] + forwards[0],
            "seconds": time.perf_counter() - start,
        }
        recipe = {"method": "needle", "settings": asdict(self), "seed": self.seed, "report": report}
        return Edit(name="needle", base=edit.base, deltas=edit.deltas, recipe=recipe)

    def _found(self, model: Model, forget: ForgetSet) -> dict[str, tuple[Neuron, ...]]:
        """Each entity to be forgotten -> its vectors; empty where they are given."""
        from mech_unlearn.locate.neurons.concept_vectors import concept_vectors

        if self.vectors is not None:
            return {}
        own = {entity.name: [f for f in forget.facts if f.subject == entity.name] for entity in forget.entities}
        return {name: best_neurons(concept_vectors(model, facts), self.n) for name, facts in own.items()}

    def _ablated(self, model: Model, chosen: tuple[Neuron, ...]) -> dict[Neuron, Tensor]:
        """What is added to each vector, as it is after rounding to the model's dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        out = {}
        for neuron in chosen:
            v = stored_vector(model, neuron).cpu()
            if self.mode == "noise":
                change = noise_like(v, self.ratio, self.std, generator)
            else:
                goal = torch.zeros_like(v) if self.mode == "zero" else _mean_vector(model, neuron[0])
                change = goal - v
            out[neuron] = (v + change).to(model.dtype).float() - v
        return out

    def _trained(
        self, model: Model, forget: ForgetSet, edit: Edit, chosen: tuple[Neuron, ...]
    ) -> tuple[dict[Neuron, Tensor], dict[str, Any]]:
        """(Changes of the vectors from noise and training, report)."""
        masks = column_masks(model, chosen)
        pattern = "|".join(f"^{re.escape(name)}$" for name in masks)
        around = Around(trainable=pattern, masks=(lambda run: {n: m.to(model.device) for n, m in masks.items()},))
        before = {neuron: stored_vector(model, neuron).clone() for neuron in chosen}
        with edit.on(model):
            deltas, report = train(
                model, forget, RetainSet(), Objective(lambda _: ascent, retain_weight=0.0), self.schedule,
                trainable="", seed=self.seed, around=around,
            )  # fmt: skip
            changes = {}
            for neuron in chosen:
                name, stored_in_first = model.w_out(neuron[0])
                delta = deltas.get(name)
                moved = 0 if delta is None else (delta if stored_in_first else delta.T)[neuron[1]]
                changes[neuron] = (stored_vector(model, neuron) - before[neuron]).cpu() + moved
        return changes, report


def noise_like(
    v: Float[Tensor, " d_model"], ratio: float, std: float | None, generator: torch.Generator
) -> Float[Tensor, " d_model"]:
    """Gaussian noise of standard deviation `std`, by default ratio * ||v|| / sqrt(d_model)."""
    size = ratio * v.norm().item() / len(v) ** 0.5 if std is None else std
    return size * torch.randn(len(v), generator=generator)


def column_masks(model: Model, chosen: tuple[Neuron, ...]) -> dict[str, Bool[Tensor, "rows columns"]]:
    """True at the chosen value vectors, in the orientation each matrix is stored in."""
    out: dict[str, Tensor] = {}
    for layer, j in chosen:
        name, stored_in_first = model.w_out(layer)
        mask = out.setdefault(name, torch.zeros(model.held[name].shape, dtype=torch.bool))
        mask[(j, slice(None)) if stored_in_first else (slice(None), j)] = True
    return out


def _mean_vector(model: Model, layer: int) -> Float[Tensor, " d_model"]:
    name, stored_in_first = model.w_out(layer)
    return model.held[name].detach().float().mean(0 if stored_in_first else 1).cpu()


def _ratio(change: Tensor, v: Tensor) -> float:
    return (change.norm() / v.norm().clamp(min=1e-30).cpu()).item()


def _cosine(v: Tensor, change: Tensor) -> float:
    """Between a vector before and after."""
    return torch.nn.functional.cosine_similarity(v, v + change, dim=0).item()
