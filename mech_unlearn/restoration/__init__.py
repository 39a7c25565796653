"""Is it gone? Tests that try to get the knowledge back, each against retrained models.

`reference(case)` does what depends on the full and the retrained models only, once; `audit(reference, model)` then
costs only the audited model's share. Add a test with one file and one line in `TESTS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mech_unlearn.model import Model
from mech_unlearn.restoration import output, quantize, relearn, sae, uds
from mech_unlearn.restoration.case import Case, Relearn, Result, require_same_shape
from mech_unlearn.restoration.levels import Levels, make_levels

__all__ = ["CORE", "TESTS", "Case", "Reference", "Relearn", "Result", "Entry", "audit", "reference"]


@dataclass(frozen=True)
class Entry:
    """A restoration test: what it computes once per case, and what it computes per audited model."""

    prepare: Callable[[Case, Levels | None], Any]
    """Gets the shared levels of the TEST split, or makes its own."""
    audit: Callable[[Case, Any, Model, str], Result]
    paper: str
    summary: str


TESTS: dict[str, Entry] = {
    "output": Entry(output.prepare, output.audit, "-", "margin, choice and recall of the answers"),
    "uds": Entry(uds.prepare, uds.audit, "arXiv 2605.24614", "its answer-row states patched into full"),
    "uds_subject": Entry(
        partial(uds.prepare, rows="subject"), uds.audit, "arXiv 2605.24614", "its last subject state patched into full"
    ),
    "sae": Entry(sae.prepare, sae.audit, "arXiv 2602.18505", "the entity's profile written back"),
    "relearn": Entry(relearn.prepare, relearn.audit, "arXiv 2410.08827", "teach some facts, score the others"),
    "int8": Entry(partial(quantize.prepare, bits=8), quantize.audit, "arXiv 2410.16454", "rounded to 8 bits"),
    "int4": Entry(partial(quantize.prepare, bits=4), quantize.audit, "arXiv 2410.16454", "rounded to 4 bits"),
}

CORE = ("output", "uds", "uds_subject", "sae", "relearn", "int8", "int4")
"""The tests an audit runs by default: cheap, and between them not blind anywhere."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A case with everything that its full and retrained models decide."""

    case: Case
    ready: Mapping[str, Any]


def reference(case: Case, tests: Sequence[str] = CORE) -> Reference:
    """Prepare the tests of an audit on the full and the retrained models.

    Raises:
        KeyError: an unknown test.
    """
    if unknown := [name for name in tests if name not in TESTS]:
        raise KeyError(f"unknown restoration test {unknown[0]!r}; choose from {', '.join(TESTS)}")
    ready, shared = {}, make_levels(case, "test")
    for name in tests:
        case.log(f"{name}: full and retrained models")
        ready[name] = TESTS[name].prepare(case, shared)
    return Reference(case, ready)


def audit(ref: Reference, model: Model, name: str | None = None) -> dict[str, Result]:
    """The result of each prepared test on one model.

    A retrained model of the case is compared with the other ones, itself left out.

    Raises:
        ValueError: the model is of another shape than the full one.
    """
    require_same_shape(ref.case.full, model)
    label = model.name if name is None else name
    results = {}
    for test, ready in ref.ready.items():
        ref.case.log(f"{label}: {test}")
        results[test] = TESTS[test].audit(ref.case, ready, model, label)
    return results
