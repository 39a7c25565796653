"""How 004 and 005 are run: models, then one cell per size and row, then the summary and the figures.

What is finished is never computed again.
"""

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments.runner import Cells, command_line, provenance, read
from experiments.scratch import build
from experiments.study import Make, Study, compute
from mech_unlearn.core import LABELS, Fact
from mech_unlearn.files import write_json
from mech_unlearn.metrics import mean_ci
from mech_unlearn.run import data_hash, open_run, side_by_side


@dataclass(frozen=True, kw_only=True)
class Work:
    """A study in its folder: models, cells, and the seconds that each stage took."""

    make: Make
    data: Path
    quick: bool
    folder: Path

    @property
    def cells(self) -> Cells:
        return Cells(self.folder / "cells")

    def finish(self, study: Study, workers: int) -> None:
        """Train the models and compute the cells that are not there yet.

        Raises:
            ValueError: the folder holds another run.
        """
        spec = {
            "experiment": study.name, "quick": self.quick, "facts": data_hash(study.facts),
            "texts": len(study.plan.texts),
        }  # fmt: skip
        open_run(self.folder, spec)
        say, seconds = _teller(study.name), self.seconds()
        with _adding("models", seconds):
            build(study.plan, self.folder / "models", workers=workers, said=say)
        write_json(self.folder / "seconds.json", seconds)
        jobs = [(s, row) for s in study.sizes for row in rows_of(study, s) if not self.cells.has(f"{s}-{row}")]
        with _adding("cells", seconds):
            for done, (job, _) in enumerate(side_by_side(jobs, partial(_cell, self), workers=workers), 1):
                say(f"{done}/{len(jobs)} {' '.join(job)}")
        spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        seconds["cpu"] = seconds.get("cpu", 0.0) + sum(used.ru_utime + used.ru_stime for used in spent)
        write_json(self.folder / "seconds.json", seconds)

    def seconds(self) -> dict[str, float]:
        path = self.folder / "seconds.json"
        return read(path) if path.exists() else {}

    def found(self, study: Study) -> dict[str, dict[str, Any]]:
        """Size -> row -> cell.

        Raises:
            ValueError: a cell is not finished.
        """
        return {size: {row: self.cells[f"{size}-{row}"] for row in rows_of(study, size)} for size in study.sizes}


@contextmanager
def _adding(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - start


def _cell(work: Work, job: tuple[str, str]) -> None:
    size, row = job
    work.cells.put(f"{size}-{row}", compute(work.make, work.data, work.quick, work.folder / "models", size, row))


def rows_of(study: Study, size: str) -> list[str]:
    """The rows of a size: references, methods, and the locators on the first size."""
    names = list(study.methods(study.sizes[size]))
    known = ["full"] + (["retrained"] if study.plan.retrained.get(size, 1) > 1 else [])
    return [*names, *known, "sisa", *(["locate"] if size == next(iter(study.sizes)) else [])]


def summarise(study: Study, cells: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float]) -> dict[str, Any]:
    """What the README quotes: every measured number with value, ci, n and unit."""
    rows, sisa = [], {}
    for size, found in cells.items():
        for name, cell in found.items():
            if name == "sisa":
                sisa[size] = {key: cell[key] for key in ("outputs", "shards", "hit")}
            elif name != "locate":
                more = {key: cell[key] for key in ("forms", "asked", "curves", "fit_seconds") if key in cell}
                row = cell["row"] | {"verdicts": shares_ci(cell["verdicts"], study.sizes[size].audited)}
                rows.append({"size": size, **row, **more})
    return {
        "command": "experiment", "world": study.name, "counts": dict(study.counts),
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
        "provenance": provenance(study.plan.seed, facts=data_hash(study.facts)),
        "rows": rows, "sisa": sisa,
    }  # fmt: skip


def shares_ci(verdicts: Sequence[Mapping[str, Any]], facts: Sequence[Fact]) -> dict[str, Any]:
    """Share of each label over testable facts, with its interval over groups; empty where no fact is testable."""
    group = {fact.id: fact.group or fact.subject for fact in facts}
    counted = [v for v in verdicts if "not_testable" not in v["flags"]]
    if not counted:
        return {}
    return {
        label: mean_ci(
            [float(v["label"] == label) for v in counted], f"share of testable facts called {label}",
            [group[v["fact_id"]] for v in counted],
        ).to_json()
        for label in LABELS
    }  # fmt: skip


def _teller(name: str) -> Callable[[str], None]:
    start = time.monotonic()
    return lambda what: print(f"{name} {math.floor(time.monotonic() - start):5d} s  {what}", flush=True)


def command(about: str | None, make: Make, data: Path, holds: str, here: Path, write: Callable[..., None]) -> None:
    """The command line of an experiment: its stages, then its own summary, tables and figures.

    Args:
        make: (folder of the data, quick) -> the study.
        data: where its data is by default; `holds` says what is there.
        here: the experiment's folder, which gets the results unless the run is a quick one.
        write: (folder of the results, summary, cells) -> None.
    """
    parser = command_line(
        about, here, work="folder for models and cells, outside of the repository", data=(data, holds),
        report="only summary, tables and figures, from finished cells",
        quick="a tenth of everything; results go to WORK/results",
    )  # fmt: skip
    given = parser.parse_args()
    work, study = Work(make=make, data=given.data, quick=given.quick, folder=given.work), make(given.data, given.quick)
    if not given.report:
        work.finish(study, given.workers)
    cells = work.found(study)
    write(given.work / "results" if given.quick else here / "results", summarise(study, cells, work.seconds()), cells)
