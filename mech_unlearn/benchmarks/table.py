"""The table of a bench: made of the cells of its models, and printed."""

from collections.abc import Mapping
from typing import Any

from mech_unlearn.benchmarks import Benchmark
from mech_unlearn.benchmarks.answers import Number, Numbers
from mech_unlearn.benchmarks.forms import FORMS_KEY, form_numbers


def tabulate(
    bench: Benchmark, cells: Mapping[str, Mapping[str, Any]], seed: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """(A row per number, with a measurement or None for each model; why those that are None are).

    A model is compared with the first retrained one that is not itself.
    """
    found: dict[str, Numbers] = {}
    for called, cell in cells.items():
        other = next((cells[key] for key in cells if key.startswith("retrained") and key != called), None)
        found[called] = bench.numbers(cell, cells["full"], other, seed)
        if FORMS_KEY in cell:
            found[called] |= form_numbers(cell[FORMS_KEY])
    rows, notes = [], []
    for name in dict.fromkeys(name for numbers in found.values() for name in numbers):
        by_model = {called: numbers.get(name) for called, numbers in found.items()}
        first = next(number for number in by_model.values() if number is not None)
        row: dict[str, Any] = {"name": name, "kind": first.kind}
        for called, number in by_model.items():
            row[called] = None if number is None or isinstance(number.value, str) else number.value.to_json()
        rows.append(row)
        notes += _missing(name, by_model)
    return rows, notes


def _missing(name: str, by_model: Mapping[str, Number | None]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for called, number in by_model.items():
        if number is None or isinstance(number.value, str):
            reasons.setdefault("not asked" if number is None else str(number.value), []).append(called)
    return [f"{name} left out ({', '.join(called)}): {reason}" for reason, called in reasons.items()]
