"""Published benchmarks: what each asks a model, and its table. Add one with a folder and a line in `BENCHMARKS`."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mech_unlearn.benchmarks.answers import Answers, BenchmarkFacts, Numbers
from mech_unlearn.benchmarks.conceptvectors import bench as conceptvectors
from mech_unlearn.benchmarks.conceptvectors.data import load_concepts
from mech_unlearn.benchmarks.dusk import bench as dusk
from mech_unlearn.benchmarks.dusk.data import load_dusk
from mech_unlearn.benchmarks.faithun import bench as faithun
from mech_unlearn.benchmarks.faithun.data import load_faithun
from mech_unlearn.benchmarks.muse import bench as muse
from mech_unlearn.benchmarks.muse.data import load_muse
from mech_unlearn.benchmarks.ort import bench as ort
from mech_unlearn.benchmarks.ort.data import load_ort
from mech_unlearn.benchmarks.restor import bench as restor
from mech_unlearn.benchmarks.restor.data import load_restor
from mech_unlearn.benchmarks.rwku import bench as rwku
from mech_unlearn.benchmarks.rwku.data import load_rwku
from mech_unlearn.benchmarks.tofu import bench as tofu
from mech_unlearn.benchmarks.tofu.data import load_tofu
from mech_unlearn.benchmarks.wmdp import bench as wmdp
from mech_unlearn.benchmarks.wmdp.data import load_wmdp
from mech_unlearn.model.bridge import Model

__all__ = ["BENCHMARKS", "Benchmark"]


def _fits_any(model: Model, data: Any) -> None:
    """Most benchmarks can be asked of any model."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark. Every function is plain; data are the benchmark's own frozen dataclass."""

    dataset: Callable[..., Any]
    """The loader of its data, as the benchmark publishes them."""
    load: Callable[..., Any]
    """(source, limit, settings) -> data."""
    ask: Callable[[Model, Any, Model], dict[str, Any]]
    """(model, data, full model) -> answers, as JSON."""
    numbers: Callable[[Answers, Answers, Answers | None, int], Numbers]
    """(the model's answers, the full model's, a retrained one's, seed) -> the benchmark's table, in its order."""
    facts: Callable[[Any], BenchmarkFacts]
    """data -> what restoration tests can ask for."""
    paper: str
    fits: Callable[[Model, Any], None]
    """(model, data): raises ValueError where the benchmark is of another model than this."""


def _made_of(bench: ModuleType, dataset: Callable[..., Any], paper: str) -> Benchmark:
    return Benchmark(
        dataset=dataset,
        paper=paper,
        load=bench.load,
        ask=bench.ask,
        numbers=bench.numbers,
        facts=bench.facts,
        fits=getattr(bench, "fits", _fits_any),
    )


BENCHMARKS: dict[str, Benchmark] = {
    "tofu": _made_of(tofu, load_tofu, "arXiv 2401.06121"),
    "muse": _made_of(muse, load_muse, "arXiv 2407.06460"),
    "wmdp": _made_of(wmdp, load_wmdp, "arXiv 2403.03218"),
    "rwku": _made_of(rwku, load_rwku, "arXiv 2406.10890"),
    "ort": _made_of(ort, load_ort, "arXiv 2506.07795"),
    "conceptvectors": _made_of(conceptvectors, load_concepts, "arXiv 2406.11614"),
    "faithun": _made_of(faithun, load_faithun, "arXiv 2502.19207"),
    "dusk": _made_of(dusk, load_dusk, "arXiv 2505.15209"),
    "restor": _made_of(restor, load_restor, "arXiv 2411.00204"),
}
