"""The frame of an audit: what the full and the retrained models decide is computed once, the rest per model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mech_unlearn.model.bridge import Model
from mech_unlearn.restoration.engine.case import Case, require_same_shape
from mech_unlearn.restoration.engine.levels import Levels, make_levels
from mech_unlearn.verdict.result import Result


@dataclass(frozen=True)
class Entry:
    """A restoration test: what it computes once per case, and what it computes per audited model."""

    prepare: Callable[[Case, Levels | None], Any]
    """Gets the shared levels of the TEST split, or makes its own."""
    audit: Callable[[Case, Any, Model, str], Result]
    paper: str
    summary: str


@dataclass(frozen=True, eq=False)
class Reference:
    """A case with everything that its full and retrained models decide."""

    case: Case
    tests: Mapping[str, Entry]
    ready: Mapping[str, Any]
    """By test."""
    seen: tuple[tuple[str, tuple[int, ...]], ...] = field(init=False)
    """What the full and the retrained models were: hash of the weights, ids of the interventions in force."""

    def __post_init__(self) -> None:
        models = (self.case.full, *self.case.retrained)
        object.__setattr__(self, "seen", tuple((m.hash(), tuple(map(id, m.in_force.interventions))) for m in models))

    def require_unchanged(self, model: Model) -> None:
        """Check that a model of the case is still what this reference was made from; other models may be anything.

        Raises:
            ValueError: its weights changed, or other interventions are in force.
        """
        models = (self.case.full, *self.case.retrained)
        then = next((seen for own, seen in zip(models, self.seen, strict=True) if own is model), None)
        if then is not None and then != (model.hash(), tuple(map(id, model.in_force.interventions))):
            raise ValueError(
                f"{model.name!r} is a model of the case and no longer what the reference was made from: an edit on it "
                "would be measured by what it was before; audit a copy (`with clone(model) as copy, edit.on(copy)`)"
            )


def prepared(case: Case, tests: Mapping[str, Entry], refused: Callable[[str, str], None] | None = None) -> Reference:
    """Prepare tests on the full and the retrained models; see `restoration.reference`.

    Raises:
        ValueError: a test that the case does not allow.
    """
    ready, shared = {}, make_levels(case, "test")
    for name, test in tests.items():
        case.log(f"{name}: full and retrained models")
        try:
            ready[name] = test.prepare(case, shared)
        except ValueError as error:
            if refused is None or name == "output":
                raise
            refused(name, str(error))
    return Reference(case, tests, ready)


def audit(ref: Reference, model: Model, name: str | None = None) -> dict[str, Result]:
    """The result of each prepared test on one model.

    A retrained model of the case is compared with the other ones, itself left out. A model of the case costs one hash.

    Raises:
        ValueError: the model is of another shape than the full one, or a model of the case that changed since.
    """
    require_same_shape(ref.case.full, model)
    ref.require_unchanged(model)
    label = model.name if name is None else name
    results = {}
    for test, ready in ref.ready.items():
        ref.case.log(f"{label}: {test}")
        results[test] = ref.tests[test].audit(ref.case, ready, model, label)
    return results
