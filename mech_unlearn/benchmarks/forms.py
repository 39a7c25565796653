"""Forget scores form by form, for every benchmark that has facts: kept in a cell and read from it.

Paper: as metrics/forms.py says (ORT, arXiv 2506.07795).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mech_unlearn.benchmarks.answers import Number, Numbers
from mech_unlearn.core import Fact, Measurement
from mech_unlearn.metrics.forms import by_form
from mech_unlearn.model.bridge import Model

FORMS_KEY = "forms"
"""The key of a cell that holds them."""


def ask_forms(model: Model, facts: Sequence[Fact], kept: Sequence[Fact], seed: int) -> dict[str, Any]:
    """Recall and probability of the facts in each form; `kept` gives wrong subjects for the reversed one."""
    subjects = {fact.subject for fact in facts}
    found = by_form(model, facts, [fact for fact in kept if fact.subject not in subjects])
    likely = {form: scores.probability.mean(seed).to_json() for form, scores in found.forms.items()}
    return found.to_json(seed) | {"probability": likely}


def form_numbers(cell: Mapping[str, Any]) -> Numbers:
    """Recall and probability of each form, and recall above chance in the form where most is still said."""
    out: Numbers = {}
    for form, recall in cell["forms"].items():
        if recall["value"] is None:
            out[f"Form {form}"] = Number("teacher-forced", recall["reason"])
            continue
        more = f"; chance {recall['chance']:.3g}" if recall["chance"] else ""
        more += f"; {recall['left_out']} facts left out" if recall["left_out"] else ""
        out[f"Form {form}: recall"] = _number(recall, more)
        out[f"Form {form}: probability"] = _number(cell["probability"][form], "")
    return out | {"Worst form": _number(cell["worst_form"], "")}


def _number(kept: Mapping[str, Any], more: str) -> Number:
    low, high = kept["ci"]
    unit = kept["unit"] + more
    return Number("teacher-forced", Measurement(value=kept["value"], ci=(low, high), n=kept["n"], unit=unit))
