"""Edit: a change to a model that is computed once, applied for a while, saved, composed and exported.

Computing an edit and applying it are different acts: a `Method` returns an `Edit` and leaves the model
bit-identical; `with edit.on(model)` is the only apply in the package. Leaving it copies the saved tensors back,
because adding a delta and subtracting it again is not the identity in floating point.
"""

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mech_unlearn.attribution import as_table
from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.attach import attached
from mech_unlearn.edit.delta import Delta, LowRank, dense, parts, require_finite
from mech_unlearn.edit.edit_file import FORMAT, deltas_of, intervention_of, read_edit
from mech_unlearn.edit.export import export
from mech_unlearn.edit.interventions import Intervention, kind_of
from mech_unlearn.edit.interventions import Shift as Shift
from mech_unlearn.files import replacing
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.load import load


class Method(Protocol):
    """A way to remove facts. Implementations are frozen dataclasses; nobody subclasses this."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> "Edit": ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit:
    """A change to a model, in force only inside `with edit.on(model)`.

    A weight becomes `(W.float() + delta).to(W.dtype)`; deltas are float32 and in HF orientation.

    Raises:
        ValueError: a delta or an intervention with NaN or infinite values.
    """

    name: str
    base: str
    """`Model.hash()` of the model the edit was computed on."""
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    """HF parameter name -> what is added."""
    interventions: tuple[Intervention, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Method settings, seed and report; plain JSON values."""

    def __post_init__(self) -> None:
        for name, delta in self.deltas.items():
            for part in parts(delta):
                require_finite(part, f"edit {self.name!r}: the delta of {name}")
        for intervention in self.interventions:
            for name, tensor in intervention.tensors.items():
                require_finite(tensor, f"edit {self.name!r}: {name} of its {kind_of(intervention)}")

    def __repr__(self) -> str:
        acts = ", ".join(kind_of(intervention) for intervention in self.interventions)
        told = [f"{len(self.deltas)} weights", *([f"interventions: {acts}"] if acts else []), f"base {self.base[:12]}"]
        return f"Edit({self.name!r}, {', '.join(told)})"

    def _repr_html_(self) -> str:
        """What changes: rank and norm of each weight's delta, the kind and place of each intervention; for Jupyter."""
        rows = [
            (
                name,
                *delta.shape,
                delta.left.shape[1] if isinstance(delta, LowRank) else "dense",
                f"{dense(delta).norm():.3g}",
            )
            for name, delta in self.deltas.items()
        ]
        rows += [(f"{kind_of(i)} at {i.site or 'the prompt or logits'}", "", "", "", "") for i in self.interventions]
        return as_table(("what", "rows", "columns", "rank", "norm"), rows, f"{self!r}, recipe {dict(self.recipe)}")

    def _check(self, model: Model) -> None:
        model.require_unprocessed()
        for name, delta in self.deltas.items():
            if name not in model.held:
                near = difflib.get_close_matches(name, model.held, n=3)
                raise KeyError(f"edit {self.name!r}: {model.name!r} has no weight {name!r}; nearest: {near}")
            if delta.shape != model.held[name].shape:
                raise ValueError(
                    f"edit {self.name!r}: {name} is {tuple(model.held[name].shape)} in {model.name!r}, "
                    f"the delta {tuple(delta.shape)}"
                )
        for intervention in self.interventions:
            if intervention.site is not None:
                model.resolve(intervention.site)

    @contextmanager
    def on(self, model: Model) -> Iterator[Model]:
        """Put the edit in force; leaving, also by an exception, restores every weight bit-exactly.

        Raises:
            KeyError: a weight or hook the model lacks.
            ValueError: a weight of another shape, or one that the delta takes beyond what its dtype can hold.
            RuntimeError: folded weights, a write that did not land, a hook that never fired, or an edit that is left
                before one put on later; the weights are restored as soon as that one is left, too.
        """
        self._check(model)
        saved = {name: model.held[name].detach().clone() for name in self.deltas}
        model.in_force.saved.append(saved)
        try:
            with torch.no_grad():
                for name, delta in self.deltas.items():
                    wanted = (saved[name].float() + dense(delta).to(saved[name].device)).to(saved[name].dtype)
                    require_finite(wanted, f"edit {self.name!r}: {name} with its delta, in {wanted.dtype},")
                    model.held[name].copy_(wanted)
            model.require_live(self.deltas)
            with attached(self.interventions, model):
                yield model
        finally:
            self._leave(model, saved)

    def _leave(self, model: Model, saved: dict[str, Tensor]) -> None:
        """Put saved weights back; one that a later edit wrote, too, is handed on to that edit to put back."""
        at = next(i for i, own in enumerate(model.in_force.saved) if own is saved)
        later = model.in_force.saved[at + 1 :]
        del model.in_force.saved[at]
        with torch.no_grad():
            for name, weight in saved.items():
                above = next((own for own in later if name in own), None)
                if above is None:
                    model.held[name].copy_(weight)
                else:
                    above[name] = weight
        model.require_live(self.deltas)
        if later:
            raise RuntimeError(f"edit {self.name!r} was left before an edit put on later; leave the last one first")

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, atomically; settings and names travel in its JSON header."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, delta in self.deltas.items():
            if isinstance(delta, LowRank):
                tensors |= {f"left/{name}": delta.left, f"right/{name}": delta.right}
            else:
                tensors[f"dense/{name}"] = delta
        kept = []
        for i, intervention in enumerate(self.interventions):
            tensors |= {f"intervention/{i}/{key}": tensor.clone() for key, tensor in intervention.tensors.items()}
            kept.append({"type": kind_of(intervention), **intervention.settings})
        header = {"format": FORMAT, "name": self.name, "base": self.base}
        header |= {"interventions": json.dumps(kept), "recipe": json.dumps(dict(self.recipe))}
        with replacing(path) as part:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, metadata=header)

    @classmethod
    def load(cls, path: str | os.PathLike, model: Model | None = None) -> "Edit":
        """Read an edit; with a model, refuse one whose weights are not those the edit was computed on.

        Raises:
            ValueError: not an edit file, or an edit for another base model.
        """
        header, tensors = read_edit(path)
        if model is not None and model.hash() != header.base:
            raise ValueError(
                f"edit {os.fspath(path)!r} was computed on another base model than {model.name!r} "
                f"(hash {header.base[:12]}, not {model.hash()[:12]})"
            )
        try:
            interventions = tuple(
                intervention_of(header.format, i, kept, tensors) for i, kept in enumerate(header.interventions)
            )
            return cls(
                name=header.name,
                base=header.base,
                deltas=deltas_of(tensors),
                interventions=interventions,
                recipe=header.recipe,
            )
        except ValueError as error:
            raise ValueError(f"edit {os.fspath(path)!r} cannot be read: {error}") from error

    def export(
        self, model: Model, path: str | os.PathLike, card: Mapping[str, Any] | None = None
    ) -> tuple[float, float]:
        """Write the edited model as a Hugging Face folder and prove that plain transformers reads the same model.

        The reloaded weights are compared bit by bit, since in bfloat16 rounding alone moves logits by as much as a
        small edit; the logits show that the architecture does with them what the edited model does.

        Args:
            card: what the model card is to record beside the recipe: measurements, verdict, data hash.

        Returns:
            The largest absolute difference of logits between the edited model and the reloaded folder, and its bound.

        Raises:
            ValueError: activation interventions (no weights can hold them), or a folder that exists and is not empty.
            RuntimeError: a reloaded weight differs, or logits by more than rounding; nothing is left behind.
        """
        if self.interventions:
            raise ValueError(f"edit {self.name!r} changes activations, which no checkpoint can hold; use a weight edit")
        with self.on(model):
            return export(model, path, {"edit": self.name, "base": self.base, "recipe": self.recipe, **(card or {})})


@contextmanager
def clone(model: Model) -> Iterator[Model]:
    """A second Model with the same weights and the same interventions in force, free to be changed.

    Weights written by an edit that is in force are copied with the rest. Change the clone through `clone.held`, with
    `clone.require_live` after it. Train with the gradients of `gradients.gradient_of`: autograd alone leaves those
    of joint matrices (QKV of GPT-2 and GPT-NeoX) at parts of them.
    """
    copy = load(model.plain_copy(), tokenizer=model.tokenizer)
    with attached(tuple(model.in_force.interventions), copy):
        yield copy


def compose(*edits: Edit) -> Edit:
    """One edit that does what all of them do together: deltas add up, interventions stand side by side.

    Raises:
        ValueError: edits of different base models.
    """
    if len({edit.base for edit in edits}) != 1:
        raise ValueError("only edits of one base model can be composed")
    deltas: dict[str, Delta] = {}
    for edit in edits:
        for name, delta in edit.deltas.items():
            deltas[name] = dense(deltas[name]) + dense(delta) if name in deltas else delta
    return Edit(
        name="+".join(edit.name for edit in edits),
        base=edits[0].base,
        deltas=deltas,
        interventions=tuple(i for edit in edits for i in edit.interventions),
        recipe={"composed_of": [dict(edit.recipe) for edit in edits]},
    )


@contextmanager
def twin(model: Any, edit: Any) -> Iterator[Any]:
    """A second model with the edit in force, beside the untouched one."""

    with clone(model) as copy, edit.on(copy):
        yield copy
