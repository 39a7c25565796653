"""What 004 and 005 share: models from scratch with exact references, methods at several sizes, one audit for all.

An experiment gives a `Bench` (what is trained, what is forgotten, which methods); `run` goes through it stage by stage
in two processes of one thread each: models, then one cell per size and row, then the summary and the figures. What
is finished is never computed again. A little over 300 lines, so that an experiment's stages stand in one file.
"""

import argparse
import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

from experiments.ensemble import Mean, join
from experiments.scratch import Plan, build
from mech_unlearn.commands.row import audit_row
from mech_unlearn.core import LABELS, Fact, ForgetSet, RetainSet
from mech_unlearn.files import write_json
from mech_unlearn.metrics import general_kl, mean_ci, recall
from mech_unlearn.metrics.evaluate import TokenRow, score_tokens
from mech_unlearn.metrics.forms import by_form
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import make_queries
from mech_unlearn.restoration import Case, Reference, core_of, reference
from mech_unlearn.run import data_hash, open_run, provenance
from mech_unlearn.verdict.verdict import Thresholds

TRUTH = {"full": "intact", "retrained": "deleted", "last_layer_ascent": "suppressed"}
REFERENCES = ("full", "retrained", "sisa")


@dataclass(frozen=True, kw_only=True)
class Size:
    """One request: what methods are given, and what is audited."""

    forget: ForgetSet
    retain: RetainSet
    audited: tuple[Fact, ...]
    kept: tuple[Fact, ...]
    """Kept facts whose recall is measured, and which tests compare with."""
    texts: tuple[str, ...]
    """Running text on which drift is measured."""
    unseen: tuple[str, ...] = ()
    """Running text that no model was trained on: drift on it is told beside, and decides nothing."""
    asked: Mapping[str, tuple[Fact, ...]] = field(default_factory=dict)
    """Further facts whose answers are scored, by what they are called."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """An experiment, ready to run."""

    name: str
    plan: Plan
    sizes: Mapping[str, Size]
    methods: Callable[[Size], Mapping[str, Any]]
    """Row name -> method."""
    extra: Callable[[Model, str], Mapping[str, Any]] | None = None
    """Further numbers of a model (or of constituents that answer together) at a size."""
    locators: Callable[[Model, Size], Mapping[str, Any]] = lambda model, size: {}
    """(Full model, size) -> attributions as JSON."""
    facts: tuple[Fact, ...] = ()
    """All facts, for the hash in the provenance."""
    counts: Mapping[str, Any] = field(default_factory=dict)
    """What was read and what was left out, for the summary."""


Make = Callable[[Path, bool], Bench]


def epochs(at: Size, batch: int = 24, least: int = 5, most: int = 40, steps: int = 60) -> int:
    """Passes over a size's forget rows that make about so many steps: a small request is gone through more often."""
    rows = sum(len(fact.templates) for fact in at.forget.facts)
    return min(most, max(least, math.ceil(steps * batch / rows)))


def answered(model: Model, facts: Sequence[Fact]) -> dict[str, Any]:
    """Share of prompts answered in full, share of answer tokens predicted and their probability, teacher-forced."""
    queries = make_queries(model.tokenizer, facts, "templates", distractors=False)
    found = score_tokens(model, [TokenRow(query.full, len(query.answers[0])) for query in queries])
    clusters = [query.fact.group or query.fact.subject for query in queries]
    return {
        "recall": mean_ci(
            (found.exact_memorization == 1).float(), "share of prompts answered in full", clusters
        ).to_json(),
        "tokens": mean_ci(found.exact_memorization, "share of answer tokens predicted", clusters).to_json(),
        "probability": mean_ci(found.probability, "geometric mean probability per answer token", clusters).to_json(),
    }


@dataclass(frozen=True, eq=False)
class Audit:
    """A size in one process: its models, and the restoration tests made ready once."""

    bench: Bench
    folder: Path
    size: str

    @property
    def at(self) -> Size:
        return self.bench.sizes[self.size]

    def open(self, name: str) -> Model:
        return load(str(self.folder / name))

    def retrained_names(self) -> list[str]:
        return [f"retrained-{self.size}-{k}" for k in range(self.bench.plan.retrained.get(self.size, 1))]

    def ensemble(self, request: str | None, mean: Mean = "logprob") -> Model:
        return join([self.open(name) for name in self.bench.plan.constituents(request)], mean)

    def reference(self) -> Reference:
        case = Case(
            full=self.open("full"), facts=self.at.audited, retrained=tuple(map(self.open, self.retrained_names())),
            others=self.at.kept, texts=self.at.texts, unknown=self.at.retain.unknown, seed=0, log=lambda _: None,
        )  # fmt: skip
        return reference(case, core_of(case))

    @contextmanager
    def subject(self, row: str, ref: Reference) -> Iterator[tuple[Model, str | None, dict[str, Any]]]:
        """(The audited model with its edit in force, the method's class, what fitting cost)."""
        if row in ("full", "retrained"):
            yield (ref.case.full if row == "full" else ref.case.retrained[-1]), None, {}
            return
        method = self.bench.methods(self.at)[row]
        model = self.open("full")
        start = time.perf_counter()
        edit = method.fit(model, self.at.forget, self.at.retain)
        fitted = {"fit_seconds": round(time.perf_counter() - start, 1)}
        with edit.on(model):
            yield model, type(method).__name__, fitted


@lru_cache(maxsize=1)
def _ready(make: Make, data: Path, quick: bool, folder: Path, size: str) -> tuple[Audit, Reference, Any]:
    audit = Audit(make(data, quick), folder, size)
    ref = audit.reference()
    return audit, ref, recall(ref.case.full, audit.at.kept, "prompt", 0)


def compute(make: Make, data: Path, quick: bool, folder: Path, size: str, row: str) -> dict[str, Any]:
    """One cell: a row at a size."""
    torch.set_num_threads(1)
    if row == "locate":
        audit = Audit(make(data, quick), folder, size)
        return {"located": dict(audit.bench.locators(audit.open("full"), audit.at))}
    if row == "sisa":
        return _sisa(Audit(make(data, quick), folder, size))
    audit, ref, kept = _ready(make, data, quick, folder, size)
    start, at = time.perf_counter(), audit.at
    with audit.subject(row, ref) as (model, method, fitted):
        cell = audit_row(
            ref, model, name=row, method=method, truth=TRUTH.get(row), neighbors=at.kept, texts=at.texts,
            full_neighbor_recall=kept, thresholds=Thresholds(), seed=0,
        )  # fmt: skip
        if at.unseen:
            cell["row"]["unseen_kl"] = general_kl(ref.case.full, model, at.unseen, 0).to_json()
        forms = by_form(model, at.audited, at.kept)
        cell |= {"asked": {name: answered(model, facts) for name, facts in at.asked.items()}}
        cell |= {"extra": dict(audit.bench.extra(model, size)) if audit.bench.extra else {}}
    cell["forms"] = {
        name: {
            "recall": scores.recall.mean().to_json(), "probability": scores.probability.mean().to_json(),
            "chance": scores.chance,
        }
        for name, scores in forms.forms.items()
    }  # fmt: skip
    return cell | fitted | {"seconds": round(time.perf_counter() - start, 1), "size": size}


def _sisa(audit: Audit) -> dict[str, Any]:
    """Outputs of the constituents together, before and after the request, and of the unsharded models beside them."""
    at, plan = audit.at, audit.bench.plan
    models = {
        "full": audit.open("full"), "retrained": audit.open(audit.retrained_names()[0]),
        "sisa before": audit.ensemble(None), "sisa": audit.ensemble(audit.size),
        "sisa before, mean of probabilities": audit.ensemble(None, "probability"),
        "sisa, mean of probabilities": audit.ensemble(audit.size, "probability"),
    }  # fmt: skip
    found = {
        name: {"forget": answered(model, at.audited), "kept": answered(model, at.kept)}
        | {kind: answered(model, facts) for kind, facts in at.asked.items()}
        for name, model in models.items()
    }
    more = audit.bench.extra
    extra, never = ({} if more is None else dict(more(models[name], audit.size)) for name in ("sisa", "retrained"))
    return {
        "outputs": found, "shards": max(plan.shards.values()) + 1, "hit": len(plan.hit(audit.size)),
        "extra": extra, "reference_extra": never, "size": audit.size,
    }  # fmt: skip


def run(
    make: Make, data: Path, folder: Path, results: Path, *, quick: bool = False, workers: int = 2
) -> dict[str, Any]:
    """All stages; gives the summary back. `results` gets summary.json; figures are the experiment's own.

    Raises:
        ValueError: the work folder holds another run.
    """
    began = time.monotonic()
    bench = make(data, quick)
    spec = {"experiment": bench.name, "quick": quick, "facts": data_hash(bench.facts), "texts": len(bench.plan.texts)}
    opened = open_run(folder, spec)
    seconds: dict[str, float] = _read(folder / "seconds.json") or {}
    say = _teller(bench.name)
    build(bench.plan, folder / "models", workers=workers, said=say)
    seconds["models"] = seconds.get("models", 0.0) + time.monotonic() - began
    write_json(folder / "seconds.json", seconds)
    jobs = [(size, row) for size in bench.sizes for row in rows_of(bench, size) if not opened.has(f"{size}-{row}")]
    start = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_cell, make, data, quick, folder, *job): job for job in jobs}
        for done, future in enumerate(as_completed(running), 1):
            future.result()
            say(f"{done}/{len(jobs)} {' '.join(running[future])}")
    seconds["cells"] = seconds.get("cells", 0.0) + time.monotonic() - start
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds["cpu"] = seconds.get("cpu", 0.0) + sum(used.ru_utime + used.ru_stime for used in spent)
    write_json(folder / "seconds.json", seconds)
    cells = {size: {row: opened.cell(f"{size}-{row}", dict) for row in rows_of(bench, size)} for size in bench.sizes}
    summary = summarise(bench, cells, seconds)
    write_json(results / "summary.json", summary)
    return {"summary": summary, "cells": cells}


def rows_of(bench: Bench, size: str) -> list[str]:
    """The rows of a size: references, methods, and the locators on the first size."""
    names = list(bench.methods(bench.sizes[size]))
    known = ["full"] + (["retrained"] if bench.plan.retrained.get(size, 1) > 1 else [])
    return [*names, *known, "sisa", *(["locate"] if size == next(iter(bench.sizes)) else [])]


def _cell(make: Make, data: Path, quick: bool, folder: Path, size: str, row: str) -> None:
    write_json(folder / "cells" / f"{size}-{row}.json", compute(make, data, quick, folder / "models", size, row))


def summarise(bench: Bench, cells: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float]) -> dict[str, Any]:
    """What the README quotes: every measured number with value, ci, n and unit."""
    rows, sisa = [], {}
    for size, found in cells.items():
        for name, cell in found.items():
            if name == "sisa":
                sisa[size] = {key: cell[key] for key in ("outputs", "shards", "hit")}
            elif name != "locate":
                more = {key: cell[key] for key in ("forms", "asked", "curves", "fit_seconds") if key in cell}
                row = cell["row"] | {"verdicts": shares_ci(cell["verdicts"], bench.sizes[size].audited)}
                rows.append({"size": size, **row, **more})
    return {
        "command": "experiment", "world": bench.name, "counts": dict(bench.counts),
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
        "provenance": provenance({"facts": data_hash(bench.facts)}, bench.plan.seed, "cpu"),
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


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _teller(name: str) -> Callable[[str], None]:
    start = time.monotonic()
    return lambda what: print(f"{name} {math.floor(time.monotonic() - start):5d} s  {what}", flush=True)


def command(about: str, make: Make, data: Path, holds: str, here: Path, write: Callable[..., None]) -> None:
    """The command line of an experiment: `run`, then its own tables and figures.

    Args:
        data: where its data is by default; `holds` says what is there.
        here: the experiment's folder, which gets the results unless the run is a quick one.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("work", type=Path, help="folder for models and cells, outside of the repository")
    parser.add_argument("--data", type=Path, default=data, help=holds)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything; results go to WORK/results")
    given = parser.parse_args()
    results = given.work / "results" if given.quick else here / "results"
    done = run(make, given.data, given.work, results, quick=given.quick)
    write(results, done["summary"], done["cells"])
