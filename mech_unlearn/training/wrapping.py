"""What methods that wrap another method share: who may be wrapped, what is handed on, and the recipe of both."""

import inspect
from dataclasses import fields, replace
from typing import Any

from mech_unlearn.edit.edit import Edit
from mech_unlearn.training.around import Around


def trains(method: Any) -> bool:
    """Whether a method, or its class, trains and may be wrapped: its `fit` takes `around`."""
    fit = getattr(method, "fit", None)
    return fit is not None and "around" in inspect.signature(fit).parameters


def require_trains(base: Any, name: str) -> None:
    """Check what a wrapper is to wrap.

    Raises:
        ValueError: it is no method that trains.
    """
    if not trains(base):
        kind = base.__name__ if isinstance(base, type) else type(base).__name__
        raise ValueError(
            f"{name} changes how another method trains, and {kind} does not train: give base=npo or the like"
        )


def extended(around: Around, name: str, wrapper: Any, **changes: Any) -> Around:
    """`around` with the wrapper's own changes; masks join those that are there, a pattern narrows the one there.

    Raises:
        ValueError: a change that can be made once only was made by an outer wrapper.
    """
    for key in ("direct", "adapter", "adversary", "retain", "noise"):
        if key in changes and getattr(around, key) is not None:
            raise ValueError(f"{name} stands inside a method that already sets {key!r}: wrap by one of them only")
    changes["masks"] = (*around.masks, *changes.get("masks", ()))
    changes["trainable"] = both(around.trainable, changes.get("trainable", ""))
    return replace(around, label=f"{around.label}{name}{own_settings(wrapper)}>", **changes)


def both(one: str, other: str) -> str:
    """A regular expression that finds something where both do; an empty one matches everything."""
    return f"(?=.*(?:{one}))(?=.*(?:{other}))" if one and other else one or other


def own_settings(wrapper: Any) -> dict[str, Any]:
    """The settings of a wrapper without those of what it wraps."""
    return {f.name: getattr(wrapper, f.name) for f in fields(wrapper) if f.name != "base"}


def wrapped(edit: Edit, name: str, wrapper: Any, **report: Any) -> Edit:
    """The edit of the wrapped method under the wrapper's name, with the settings of both."""
    inner = edit.recipe
    settings = own_settings(wrapper) | {"base": {"method": inner["method"], **inner["settings"]}}
    recipe = {
        "method": name,
        "settings": {"seed": inner["seed"], **settings},
        "seed": inner["seed"],
        "report": {**inner["report"], **report},
    }
    return replace(edit, name=f"{name}({edit.name})", recipe=recipe)
