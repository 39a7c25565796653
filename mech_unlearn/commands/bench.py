"""What the command `bench` does: a benchmark's own table for checkpoints, and the restoration tests beside it.

Three stages. A benchmark asks each model once (a cell per model and benchmark, never computed again); the table is made
of the cells; the facts that have a subject go through `auditing.Audit`, as in the command `audit`.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mech_unlearn.benchmarks import BENCHMARKS, Benchmark
from mech_unlearn.benchmarks.answers import Questions, counted
from mech_unlearn.benchmarks.forms import FORMS, ask_forms
from mech_unlearn.benchmarks.table import tabulate
from mech_unlearn.commands.audit import Audit, named_tests, open_unlearned, prepare_audit
from mech_unlearn.commands.inputs import choose, hashes, key_values, open_model
from mech_unlearn.core import LABELS, Fact
from mech_unlearn.files import write_json
from mech_unlearn.metrics.intervals import mean_ci
from mech_unlearn.report.tables import COLUMNS, NO_VERDICT
from mech_unlearn.run import Run, open_run, provenance


def run_bench(
    name: str,
    source: str,
    full: str,
    unlearned: str,
    out: Path,
    *,
    retrained: Sequence[str] = (),
    settings: Sequence[str] = (),
    tests: str = "core",
    sae: str | None = None,
    calibration: str = "auto",
    limit: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
) -> dict[str, Any]:
    """Score models on a benchmark, run the restoration tests on its facts, and write both to a run directory.

    Args:
        source: what the benchmark's loader takes: a folder, a file or a hub id.
        unlearned: a model, or an edit file of ours to be put on the full model.
        settings: `key=value`, arguments of the benchmark's `load`.
        tests: restoration tests: core, all, none, or names with commas.
        limit: so many rows of each set of the benchmark; all when None.

    Raises:
        ValueError: bad input; nothing is written before all of it was read.
    """
    from mech_unlearn.commands.inputs import progress
    from mech_unlearn.edit.edit import clone

    bench = choose(name, BENCHMARKS, "benchmark")
    wanted = () if tests == "none" else named_tests(tests)
    given = _settings(name, bench, settings)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more rows, got {limit}")
    data = bench.load(source, limit, **given)
    questions = bench.facts(data)
    models: dict[str, Any] = {"full": open_model(full, device, dtype)}
    with ExitStack() as stack:
        models["unlearned"] = open_unlearned(stack, unlearned, models["full"], device, dtype)
        numbered = len(retrained) > 1
        for i, where in enumerate(retrained, 1):
            models[f"retrained_{i}" if numbered else "retrained"] = open_model(where, device, dtype)
        for model in models.values():
            bench.fits(model, data)
        others = [model for called, model in models.items() if called.startswith("retrained")]
        facts, kept, notes = askable(models["full"], questions)
        tested, more = restorable(models["full"], facts, bool(others)) if wanted else ((), [])
        notes += more
        log = stack.enter_context(progress(total=len(models) + 8 * (len(wanted) + 1) * bool(wanted and tested)))
        audit = None
        if tested and wanted:
            asked = {"sae": sae, "tests": tests, "calibration": calibration, "seed": seed, "log": log}
            audit = prepare_audit(models["full"], tested, kept, retrained=others, **asked)
        elif calibration not in ("auto", "none"):
            raise ValueError(f"calibration {calibration!r} was given, but no fact can be restored: {'; '.join(notes)}")
        if not facts:
            notes.append("no restoration tests and no scores by form: there are no facts to ask for")
        spec = {"command": "bench", "benchmark": name, "data": str(source), "settings": given, "limit": limit}
        spec |= {"full": full, "unlearned": unlearned, "retrained": list(retrained), "sae": sae, "seed": seed}
        spec |= {"tests": list(audit.tests) if audit else [], "calibration": calibration}
        known = hashes(facts, sae=sae, calibration=calibration, **models)
        known |= {"data": hashlib.sha256(repr(data).encode()).hexdigest()}
        run = open_run(out, spec | {"device": device, "dtype": dtype, "hashes": known})
        write_json(run.folder / "provenance.json", provenance(known, seed, device))

        def ask(called: str) -> dict[str, Any]:
            log(f"{name}: {called}")
            model = models[called]
            found = bench.ask(model, data, models["full"])
            return found | ({FORMS: ask_forms(model, facts, kept, seed)} if facts else {})

        cells = {called: run.cell(f"bench_{called}", lambda called=called: ask(called)) for called in models}
        rows = []
        if audit is not None:
            audited = {"full": stack.enter_context(clone(models["full"])), "unlearned": models["unlearned"]}
            audited |= {called: models[called] for called in models if called.startswith("retrained") and numbered}
            rows = audit.cells(run, audited)
    table, more = tabulate(bench, cells, seed)
    notes += untestable(rows)
    result = {
        "benchmark": name,
        "paper": bench.paper,
        "models": list(models),
        "rows": table,
        "restoration": restoration(rows, facts, seed),
        "notes": [*notes, *more],
    }
    return _finish(run, result, rows, audit)


def _settings(name: str, bench: Benchmark, settings: Sequence[str]) -> dict[str, Any]:
    """Arguments of the benchmark's `load`, checked by name and type."""
    from pydantic import TypeAdapter, ValidationError

    parameters = inspect.signature(bench.load).parameters
    known = {key: found.annotation for key, found in parameters.items() if key not in ("source", "limit")}
    given = key_values(settings)
    for key, value in given.items():
        try:
            TypeAdapter(choose(key, known, f"setting of {name}")).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"setting {key}={value} of {name}: {error.errors()[0]['msg']}") from error
    return given


def askable(model: Any, questions: Questions) -> tuple[tuple[Fact, ...], tuple[Fact, ...], list[str]]:
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
    run: Run, result: dict[str, Any], cells: Sequence[Mapping[str, Any]], audit: Audit | None
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
