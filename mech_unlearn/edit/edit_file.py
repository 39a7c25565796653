"""What must stand in the file of an edit, checked before anything is made of it."""

import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, Literal

from jaxtyping import jaxtyped
from pydantic import BaseModel, Json, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError
from torch import Tensor

from mech_unlearn.edit.delta import Delta, LowRank
from mech_unlearn.edit.interventions import KINDS, Intervention
from mech_unlearn.files import first_error, read_tensors

FORMAT = "mech_unlearn.edit/3"
FORMAT_2 = "mech_unlearn.edit/2"
"""Held shifts only; still read."""
PARTS = ("dense", "left", "right", "intervention", "shift")
"""What the names of a file's tensors begin with."""


class Header(BaseModel):
    """The JSON header of an edit file."""

    format: Literal["mech_unlearn.edit/3", "mech_unlearn.edit/2"]
    name: str
    base: str
    interventions: Json[list[dict[str, Any]]]
    recipe: Json[dict[str, Any]]


def read_edit(path: str | os.PathLike) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors of an edit file.

    Raises:
        ValueError: no safetensors file, or one that is no edit.
    """
    header, tensors = read_tensors(path, "edit")
    if header.get("format") not in (FORMAT, FORMAT_2):
        raise ValueError(f"{os.fspath(path)!r} is a safetensors file but not an edit")
    try:
        return Header.model_validate(header), tensors
    except ValidationError as error:
        raise ValueError(f"edit {os.fspath(path)!r} cannot be read: header, {first_error(error)}") from error


def deltas_of(tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    """The deltas of a file's tensors.

    Raises:
        ValueError: a tensor that belongs to no part of an edit, half of a pair, or a weight with two deltas.
    """
    deltas: dict[str, Delta] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        other = {"left": f"right/{name}", "right": f"left/{name}"}.get(kind)
        if kind not in PARTS or not tensor.is_floating_point():
            raise ValueError(f"tensor {key!r} of {tensor.dtype} belongs to no part of an edit")
        if other is not None and other not in tensors:
            raise ValueError(f"tensor {key!r} lacks {other!r}")
        if kind == "left" and f"dense/{name}" in tensors:
            raise ValueError(f"weight {name!r} has two deltas")
        if kind in ("dense", "left"):
            deltas[name] = tensor if kind == "dense" else LowRank(tensor, tensors[f"right/{name}"])
    return deltas


def intervention_of(form: str, i: int, kept: dict[str, Any], tensors: Mapping[str, Tensor]) -> Intervention:
    """The i-th intervention of a file.

    Raises:
        ValueError: a key that is missing, or what `restored` refuses.
    """
    prefix = f"{'shift' if form == FORMAT_2 else 'intervention'}/{i}/"
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    if form == FORMAT_2:
        site = {key: kept.get(key) for key in ("layer", "kind")}
        return restored("shift", {"site": site, "subjects": kept.get("subjects")}, own)
    return restored(str(kept.get("type")), {name: x for name, x in kept.items() if name != "type"}, own)


def restored(kind: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Intervention:
    """The intervention whose `settings` and `tensors` these are.

    Raises:
        ValueError: a kind that this version does not know, a field that is unknown, missing or of another type, or
            tensors whose shapes do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"interventions of kind {kind!r} are not known here; there are {', '.join(KINDS)}")
    own = {f.name: f for f in fields(KINDS[kind])}
    given = {**settings, **tensors}
    needed = {name for name, f in own.items() if f.default is MISSING and f.default_factory is MISSING}
    if odd := (given.keys() - own) | (needed - given.keys()):
        raise ValueError(f"{kind}: {', '.join(sorted(odd))} unknown or missing; it has {', '.join(own)}")
    with jaxtyped("context"):  # sizes of the same name are the same
        return KINDS[kind](**{name: _valid(kind, own[name], value) for name, value in given.items()})


def _valid(kind: str, own: Field[Any], value: Any) -> Any:
    """The value of a field, as its type."""
    if isinstance(value, Tensor):
        if not isinstance(value, own.type):  # pyright: ignore[reportArgumentType]
            raise ValueError(f"{kind}: {own.name} is {tuple(value.shape)} of {value.dtype}, not {own.type}")
        return value
    try:
        return TypeAdapter(own.type).validate_python(_tuples(value))  # pyright: ignore[reportArgumentType]
    except (ValidationError, PydanticSchemaGenerationError) as error:
        raise ValueError(f"{kind}: {own.name} is no {own.type}: {str(value)[:60]!r}") from error


def _tuples(x: Any) -> Any:
    return tuple(_tuples(item) for item in x) if isinstance(x, list | tuple) else x
