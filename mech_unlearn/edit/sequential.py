"""Requests to forget that come one after another: each is fitted with the earlier ones in force."""

import time
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit, compose
from mech_unlearn.model.bridge import Model

After = Callable[[int, Edit, Edit], None]
"""Told after each request: its number, its own edit, and all edits so far as one."""


def requests(forget: ForgetSet, size: int) -> tuple[ForgetSet, ...]:
    """The facts in requests of `size` entities each, in order of first appearance; the last may be smaller.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"a request needs at least 1 entity, got {size}")
    names = [entity.name for entity in forget.entities]
    groups = [set(names[i : i + size]) for i in range(0, len(names), size)]
    return tuple(ForgetSet(facts=tuple(f for f in forget.facts if f.subject in group)) for group in groups)


def fit_sequence(
    method: Any, model: Model, forgets: Sequence[ForgetSet], retain: RetainSet, after: After | None = None
) -> Edit:
    """Fit a `Method` to each request in turn, with the edits of the earlier ones in force; all of them as one edit.

    A fact of any request is never retained. A method with a setting `earlier` is told the names of the requests before,
    whose keys then keep their output. Weight changes add up, so that the edit does what applying its parts one
    after another does, up to rounding. The model ends bit-identical.

    Args:
        after: called after each request, while nothing is in force.

    Raises:
        ValueError: no request, or what the method refuses.
    """
    from tqdm import tqdm

    if not forgets:
        raise ValueError("no request to forget: give at least one")
    start, base = time.perf_counter(), model.hash()
    kept = without(retain, [fact for forget in forgets for fact in forget.facts])
    so_far, parts = Edit(name="nothing", base=base), []
    for i, forget in enumerate(tqdm(forgets, desc="requests", unit="request", delay=2, leave=False)):
        with so_far.on(model):
            own = _after(method, forgets[:i]).fit(model, forget, kept)
        parts.append(dict(own.recipe))
        so_far = compose(so_far, replace(own, base=base)) if i else replace(own, base=base)
        if after:
            after(i, own, so_far)
    return replace(so_far, name=f"{parts[0]['method']} in sequence", recipe=_recipe(parts, start))


def _after(method: Any, forgets: Sequence[ForgetSet]) -> Any:
    """The method, told of the names that were forgotten before where it has a setting for them."""
    if not forgets or not is_dataclass(method) or "earlier" not in {field.name for field in fields(method)}:
        return method
    names = [name for forget in forgets for entity in forget.entities for name in (entity.name, *entity.aliases)]
    return replace(method, earlier=tuple(dict.fromkeys((*method.earlier, *names))))  # pyright: ignore


def without(retain: RetainSet, facts: Sequence[Fact]) -> RetainSet:
    """The retain set less the facts that are to be forgotten: same id, or same subject, relation and object."""
    ids = {fact.id for fact in facts}
    said = {(fact.subject, fact.relation, fact.object) for fact in facts}

    def rest(some: tuple[Fact, ...]) -> tuple[Fact, ...]:
        return tuple(f for f in some if f.id not in ids and (f.subject, f.relation, f.object) not in said)

    return replace(
        retain,
        neighbors=rest(retain.neighbors),
        same_subject=rest(retain.same_subject),
        general=rest(retain.general),
    )


def _recipe(parts: Sequence[dict[str, Any]], start: float) -> dict[str, Any]:
    """One recipe: the method's, with passes added up, and those of the requests."""
    report = {key: sum(part["report"].get(key, 0) for part in parts) for key in ("n_forward", "n_backward")}
    report |= {"requests": len(parts), "seconds": time.perf_counter() - start}
    return {**parts[0], "report": report, "composed_of": list(parts)}
