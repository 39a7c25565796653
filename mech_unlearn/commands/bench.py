"""What the command `bench` does: a benchmark's own table for checkpoints, and the restoration tests beside it.

Three stages. A benchmark asks each model once (a cell per model and benchmark, never computed again); the table is made
of the cells; the facts that have a subject go through `prepared.Prepared`, as in the command `audit`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from mech_unlearn.benchmarks import BENCHMARKS, Benchmark
from mech_unlearn.benchmarks.answers import BenchmarkFacts, counted
from mech_unlearn.benchmarks.forms import FORMS_KEY, ask_forms
from mech_unlearn.benchmarks.table import tabulate
from mech_unlearn.commands.inputs import arguments, choose, hashes, open_model, progress
from mech_unlearn.commands.options import BenchOptions, spec_of
from mech_unlearn.commands.prepared import Prepared, named_tests, open_unlearned, prepare_audit
from mech_unlearn.core import LABELS, Fact
from mech_unlearn.files import write_json
from mech_unlearn.metrics.intervals import mean_ci
from mech_unlearn.report.tables import COLUMNS, NO_VERDICT
from mech_unlearn.run import Run, open_run, provenance

UNSPECIFIED = ("name", "logs", "retain_logs", "intervals", "rows_per_author")
"""Options of logs, and the name, which stands in the spec as `benchmark`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Questioned:
    """What a benchmark asks, and of which models."""

    name: str
    bench: Benchmark
    data: Any
    settings: Mapping[str, Any]
    models: Mapping[str, Any]
    """Row name -> model: full, unlearned, retrained or retrained_1, ..."""
    facts: tuple[Fact, ...]
    """The benchmark's facts to forget that the full model's tokenizer can ask for."""
    kept: tuple[Fact, ...]
    notes: list[str]

    @property
    def retrained(self) -> dict[str, Any]:
        return {name: model for name, model in self.models.items() if name.startswith("retrained")}

    def cell(self, called: str, seed: int) -> dict[str, Any]:
        """What one model answers to the benchmark, and to its facts in other forms."""
        found = self.bench.ask(self.models[called], self.data, self.models["full"])
        more = {FORMS_KEY: ask_forms(self.models[called], self.facts, self.kept, seed)} if self.facts else {}
        return found | more


def run_bench(options: BenchOptions) -> dict[str, Any]:
    """Score models on a benchmark, run the restoration tests on its facts, and write both to a run directory.

    Raises:
        ValueError: bad input; nothing is written before all of it was read.
    """
    if not options.data or not options.full or not options.unlearned:
        raise ValueError(f"bench {options.name} needs --data, --full and --unlearned")
    wanted = () if options.tests == "none" else named_tests(options.tests)
    with ExitStack() as stack:
        asked = _ask_what(options, stack)
        tested, more = restorable(asked.models["full"], asked.facts, bool(asked.retrained)) if wanted else ((), [])
        asked.notes.extend(more)
        steps = len(asked.models) + 8 * (len(wanted) + 1) * bool(wanted and tested)
        log = stack.enter_context(progress(total=steps))
        prepared = _prepare(options, asked, tested, log) if tested else None
        if prepared is None and options.calibration not in ("auto", "none"):
            told = "; ".join(asked.notes)
            raise ValueError(f"calibration {options.calibration!r} was given, but no fact can be restored: {told}")
        if not asked.facts:
            asked.notes.append("no restoration tests and no scores by form: there are no facts to ask for")
        run = _open(options, asked, prepared)
        cells = {}
        for called in asked.models:
            log(f"{asked.name}: {called}")
            cells[called] = run.cell(f"bench_{called}", lambda called=called: asked.cell(called, options.seed))
        rows = prepared.cells(run, _audited(asked, stack)) if prepared else []
    return _finish(run, _result(asked, cells, rows, options.seed), rows, prepared)


def _ask_what(options: BenchOptions, stack: ExitStack) -> Questioned:
    """The benchmark's data and the loaded models, checked against each other."""
    bench = choose(options.name, BENCHMARKS, "benchmark")
    settings = arguments(bench.load, options.settings, options.name, ("limit",))
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit must be 1 or more rows, got {options.limit}")
    data = bench.load(options.data, options.limit, **settings)
    questions = bench.facts(data)
    assert options.full is not None and options.unlearned is not None
    models: dict[str, Any] = {"full": open_model(options.full, options.device, options.dtype)}
    models["unlearned"] = open_unlearned(stack, options.unlearned, models["full"], options.device, options.dtype)
    for i, where in enumerate(options.retrained, 1):
        called = f"retrained_{i}" if len(options.retrained) > 1 else "retrained"
        models[called] = open_model(where, options.device, options.dtype)
    for model in models.values():
        bench.fits(model, data)
    facts, kept, notes = askable(models["full"], questions)
    return Questioned(
        name=options.name, bench=bench, data=data, settings=settings, models=models, facts=facts, kept=kept, notes=notes
    )


def _prepare(options: BenchOptions, asked: Questioned, tested: Sequence[Fact], log: Callable[[str], None]) -> Prepared:
    return prepare_audit(
        asked.models["full"],
        tested,
        asked.kept,
        retrained=list(asked.retrained.values()),
        sae=options.sae,
        tests=options.tests,
        calibration=options.calibration,
        seed=options.seed,
        log=log,
    )


def _open(options: BenchOptions, asked: Questioned, prepared: Prepared | None) -> Run:
    """The run directory, with its provenance."""
    known = hashes(asked.facts, sae=options.sae, calibration=options.calibration, **asked.models)
    known |= {"data": hashlib.sha256(repr(asked.data).encode()).hexdigest()}
    spec = spec_of(
        "bench",
        options,
        UNSPECIFIED,
        benchmark=options.name,
        settings=dict(asked.settings),
        tests=list(prepared.tests) if prepared else [],
        hashes=known,
    )
    run = open_run(options.out, spec)
    write_json(run.folder / "provenance.json", provenance(known, options.seed, options.device))
    return run


def _audited(asked: Questioned, stack: ExitStack) -> dict[str, Any]:
    """The models that are audited: a copy of full, since full itself is what the others are compared with, and each of
    several retrained ones against the others."""
    from mech_unlearn.edit.edit import clone

    several = asked.retrained if len(asked.retrained) > 1 else {}
    return {
        "full": stack.enter_context(clone(asked.models["full"])), "unlearned": asked.models["unlearned"], **several
    }  # fmt: skip


def _result(
    asked: Questioned, cells: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, Any]:
    """What stands in bench.json."""
    table, lacking = tabulate(asked.bench, cells, seed)
    return {
        "benchmark": asked.name,
        "paper": asked.bench.paper,
        "models": list(asked.models),
        "rows": table,
        "restoration": restoration(rows, asked.facts, seed),
        "notes": [*asked.notes, *untestable(rows), *lacking],
    }


def askable(model: Any, questions: BenchmarkFacts) -> tuple[tuple[Fact, ...], tuple[Fact, ...], list[str]]:
    """(Facts that the model's tokenizer can ask for in every phrasing, those to be kept likewise, notes)."""
    kept, notes = [], list(questions.notes)
    for what, some in (("facts to forget", questions.facts), ("facts to keep", questions.retain.facts)):
        good, reasons = [], []
        for fact in some:
            try:
                _require_asked(model, fact)
                good.append(fact)
            except ValueError as error:
                told = str(error).removeprefix(f"fact {fact.id!r}: ")
                reasons.append(re.sub(r"'[^']*'|\"[^\"]*\"", "...", told))
        kept.append(tuple(good))
        if reasons:
            notes.append(f"{len(reasons)} of {len(some)} {what} cannot be asked of this model: {counted(reasons)}")
    return kept[0], kept[1], notes


def _require_asked(model: Any, fact: Fact) -> None:
    from mech_unlearn.model.tokens import make_queries

    limit = model.n_ctx
    for which in ("templates", "heldout"):
        for query in make_queries(model.tokenizer, [fact], which):
            longest = len(query.prompt) + max(map(len, query.answers))
            if limit is not None and longest > limit:
                raise ValueError(f"longer than the model's {limit} positions")


def restorable(full: Any, facts: Sequence[Fact], retrained: bool) -> tuple[tuple[Fact, ...], list[str]]:
    """(Facts that restoration tests can tell something of, why the others are left out).

    A fact with two wrong answers or more is tested against those. One without is tested only where there are retrained
    models and the full model says its answer by itself: nothing else shows that it was known.
    """
    from mech_unlearn.model.scores import score
    from mech_unlearn.model.tokens import make_queries

    bare = [fact for fact in facts if len(fact.distractors) < 2]
    if not bare:
        return tuple(facts), []
    about = f"of {len(facts)} facts have no two wrong answers to compare with"
    if not retrained:
        out, reason = {fact.id for fact in bare}, f"{about}: restoring them needs --retrained"
    else:
        said = score(full, make_queries(full.tokenizer, bare, "prompt", distractors=False)).exact.tolist()
        out = {fact.id for fact, known in zip(bare, said, strict=True) if not known}
        reason = f"{about}, and the full model does not say them: they are not restored"
    return tuple(fact for fact in facts if fact.id not in out), [f"{len(out)} {reason}"] if out else []


def _finish(
    run: Run, result: dict[str, Any], cells: Sequence[Mapping[str, Any]], audit: Prepared | None
) -> dict[str, Any]:
    """Write bench.json, summary.json, verdicts.json, figures and report.html; gives the summary back."""
    from mech_unlearn.report.bench_figure import draw_bench
    from mech_unlearn.report.figures import draw_figures
    from mech_unlearn.report.page import write_report

    note = " ".join([*([audit.note_of(cells)] if audit else []), *(f"{line}." for line in result["notes"])])
    write_json(run.folder / "bench.json", result)
    write_json(
        run.folder / "captions.json",
        {"note": note, "0_benchmark": f"{result['benchmark']}, {result['paper']}: shares with 95 % intervals."},
    )
    summary = run.finish("bench", result["benchmark"], cells)
    summary |= {key: result[key] for key in ("benchmark", "paper", "models", "notes")}
    summary |= {"benchmark_rows": result["rows"], "restoration": result["restoration"]}
    write_json(run.folder / "summary.json", summary)
    draw_bench(result, run.folder / "figures" / "0_benchmark.png")
    if cells:
        draw_figures(run.folder)
    write_report(run.folder)
    return json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))


def restoration(cells: Sequence[Mapping[str, Any]], facts: Sequence[Fact], seed: int) -> list[dict[str, Any]]:
    """Shares of verdicts over the testable facts and mean scores of the tests: a row each, models as keys."""
    clusters = {fact.id: fact.group or fact.subject for fact in facts}
    rows: list[dict[str, Any]] = []
    unsaid = any("no_retrained" in verdict["flags"] for cell in cells for verdict in cell["verdicts"])
    for label in (*LABELS, *((NO_VERDICT,) if unsaid else ())) if cells else ():
        rows.append({"name": label if label == NO_VERDICT else f"verdict {label}", "kind": "verdict"})
        for cell in cells:
            rows[-1][cell["row"]["name"]] = _share(label, cell["verdicts"], clusters, seed)
    for key, title in COLUMNS.items() if cells else ():
        if key == "worst_form":  # stands in the benchmark's table
            continue
        values = {cell["row"]["name"]: cell["row"][key] for cell in cells}
        if any(values.values()):
            rows.append({"name": title, "kind": "restoration", **values})
    return rows


def untestable(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many facts no verdict counts; the same for all models, as full and retrained ones decide it."""
    verdicts = cells[0]["verdicts"] if cells else []
    out = sum("not_testable" in verdict["flags"] for verdict in verdicts)
    if not out:
        return []
    return [
        f"{out} of {len(verdicts)} facts are not testable: the full model does not know them, or a retrained one does"
    ]


def _share(label: str, verdicts: Sequence[Mapping[str, Any]], clusters: Mapping[str, str], seed: int) -> Any:
    counted_in = [verdict for verdict in verdicts if "not_testable" not in verdict["flags"]]
    if not counted_in:
        return None
    said = [NO_VERDICT if "no_retrained" in verdict["flags"] else verdict["label"] for verdict in counted_in]
    if NO_VERDICT in said and label in ("deleted", "suppressed") and label not in said:
        return None  # not a share of nought: nothing could be said of either
    values = [float(each == label) for each in said]
    groups = [clusters[verdict["fact_id"]] for verdict in counted_in]
    return mean_ci(values, "share of testable facts", groups, seed).to_json()
