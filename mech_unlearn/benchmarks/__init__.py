"""Benchmarks: what each asks a model and what it makes of the answers. Add one with a file and a line in `BENCHES`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mech_unlearn.benchmarks.answers import Answers, Numbers, Questions
from mech_unlearn.benchmarks.conceptvectors import bench as conceptvectors
from mech_unlearn.benchmarks.dusk import bench as dusk
from mech_unlearn.benchmarks.faithun import bench as faithun
from mech_unlearn.benchmarks.muse import bench as muse
from mech_unlearn.benchmarks.ort import bench as ort
from mech_unlearn.benchmarks.restor import bench as restor
from mech_unlearn.benchmarks.rwku import bench as rwku
from mech_unlearn.benchmarks.tofu import bench as tofu
from mech_unlearn.benchmarks.wmdp import bench as wmdp
from mech_unlearn.model.bridge import Model

__all__ = ["BENCHES", "Bench"]


def _fits_any(model: Model, data: Any) -> None:
    """Most benchmarks can be asked of any model."""


@dataclass(frozen=True)
class Bench:
    """One benchmark. Every function is plain; data are the benchmark's own frozen dataclass."""

    load: Callable[..., Any]
    """(source, limit, settings) -> data."""
    ask: Callable[[Model, Any, Model], dict[str, Any]]
    """(model, data, full model) -> answers, as JSON."""
    numbers: Callable[[Answers, Answers, Answers | None, int], Numbers]
    """(the model's answers, the full model's, a retrained one's, seed) -> the benchmark's table, in its order."""
    facts: Callable[[Any], Questions]
    """data -> what restoration tests can ask for."""
    paper: str
    fits: Callable[[Model, Any], None] = _fits_any
    """(model, data): raises ValueError where the benchmark is of another model than this."""


BENCHES: dict[str, Bench] = {
    "tofu": Bench(tofu.load, tofu.ask, tofu.numbers, tofu.facts, "arXiv 2401.06121"),
    "muse": Bench(muse.load, muse.ask, muse.numbers, muse.facts, "arXiv 2407.06460"),
    "wmdp": Bench(wmdp.load, wmdp.ask, wmdp.numbers, wmdp.facts, "arXiv 2403.03218"),
    "rwku": Bench(rwku.load, rwku.ask, rwku.numbers, rwku.facts, "arXiv 2406.10890"),
    "ort": Bench(ort.load, ort.ask, ort.numbers, ort.facts, "arXiv 2506.07795"),
    "conceptvectors": Bench(
        conceptvectors.load,
        conceptvectors.ask,
        conceptvectors.numbers,
        conceptvectors.facts,
        "arXiv 2406.11614",
        conceptvectors.fits,
    ),
    "faithun": Bench(faithun.load, faithun.ask, faithun.numbers, faithun.facts, "arXiv 2502.19207"),
    "dusk": Bench(dusk.load, dusk.ask, dusk.numbers, dusk.facts, "arXiv 2505.15209"),
    "restor": Bench(restor.load, restor.ask, restor.numbers, restor.facts, "arXiv 2411.00204"),
}
