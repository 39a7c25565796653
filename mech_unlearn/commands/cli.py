"""`mech-unlearn ...`: a thin command line over the package.

Progress goes to stderr, one short table (or one JSON object with --json) to stdout. Exit status: 0 on success, 2 on a
user's mistake with one line that names it, 1 on anything else. Slow imports stay inside the commands; options stand in
`options.py`. Over 300 lines, because every command has its few lines here and nowhere else.
"""

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from mech_unlearn.commands.options import (
    AuditOptions,
    BenchOptions,
    CalibrateOptions,
    CheckOptions,
    ConvertOptions,
    DemoOptions,
    Json,
    LocateOptions,
    Seed,
    UnlearnOptions,
    Workers,
    World,
    takes,
)

app = typer.Typer(
    help="Locate, remove and prove: mechanistic unlearning of facts in language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
testbed_app = typer.Typer(help="Small worlds where the truth is known.", no_args_is_help=True)
app.add_typer(testbed_app, name="testbed")
facts_app = typer.Typer(help="Facts files.", no_args_is_help=True)
app.add_typer(facts_app, name="facts")


class Kind(str, Enum):
    methods = "methods"
    locators = "locators"
    tests = "tests"
    datasets = "datasets"
    worlds = "worlds"


def _version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        print(f"mech-unlearn {version('mech_unlearn')}")
        raise typer.Exit
    return asked


@app.callback()
def _every(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    pass


@app.command()
@takes(DemoOptions)
def demo(options: DemoOptions) -> None:
    """The main job on an embedded testbed: locate, remove, prove."""
    from mech_unlearn.commands.demo import run_demo

    _show(run_demo(options), options.out, options.as_json)


@app.command()
@takes(LocateOptions)
def locate(options: LocateOptions) -> None:
    """Find where facts live; writes locate.json and a figure, and goes on where it stopped."""
    from mech_unlearn.commands.locate import run_locate

    result = run_locate(options)
    if options.as_json:
        print(json.dumps(result.to_json()))
        return
    print(f"{result.name}: {result.unit}, n = {result.n}; largest:")
    for labels, value in result.top(8):
        print(f"  {'  '.join(f'{axis} {label}' for axis, label in labels.items()):40} {value:.4f}")
    print(f"written to {options.out}")


@app.command()
@takes(UnlearnOptions)
def unlearn(options: UnlearnOptions) -> None:
    """Remove facts: writes the edit, and the edited model as a Hugging Face folder with a parity proof."""
    from mech_unlearn.commands.unlearn import run_unlearn
    from mech_unlearn.report.tables import form_lines, health_lines

    result = run_unlearn(options)
    if options.as_json:
        print(json.dumps(result))
        return
    for line in health_lines(result["before"], result["after"]):
        print(line)
    for line in form_lines(result["before"], result["after"]):
        print(line)
    for line in result["notes"]:
        print(f"note: {line}")
    print(f"written to {options.out}: {', '.join(result['files'])}")


@app.command()
@takes(AuditOptions)
def audit(options: AuditOptions) -> None:
    """Deleted or only suppressed? Restoration tests on any before/after pair of checkpoints."""
    from mech_unlearn.commands.audit import run_audit

    _show(run_audit(options), options.out, options.as_json)


@app.command()
@takes(CalibrateOptions)
def calibrate(options: CalibrateOptions) -> None:
    """Make a calibration for your own models: pools of known truth, scored; goes on where it stopped."""
    from mech_unlearn.commands.calibrate import run_calibrate

    path, note = run_calibrate(options)
    told = f"{note}\nwritten to {path}; use it with `mech-unlearn audit --calibration {path}`"
    _tell(told, {"calibration": str(path), "note": note}, options.as_json)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="a run directory")], as_json: Json = False) -> None:
    """(Re)draw figures and report.html of a finished run."""
    from mech_unlearn.commands.report import report as redraw

    page = redraw(folder)
    figures = [str(path) for path in sorted((folder / "figures").glob("*.png"))]
    _tell(str(page), {"report": str(page), "figures": figures}, as_json)


@app.command("list")
def list_kind(kind: Annotated[Kind, typer.Argument()], as_json: Json = False) -> None:
    """What there is, each with its paper."""
    from mech_unlearn.commands.list import listing

    rows = listing(kind.value)
    if as_json:
        print(json.dumps(rows))
        return
    benched = _benchmarks() if kind is Kind.datasets else ()
    for row in rows:
        more = "  (see `bench`)" if row["name"] in benched else ""
        print(f"{row['name']:25} {row['summary']}" + (f"  [{row['paper']}]" if row["paper"] else "") + more)


def _benchmarks() -> tuple[str, ...]:
    from mech_unlearn.benchmarks import BENCHMARKS

    return tuple(BENCHMARKS)


@app.command("init")
def init_folder(folder: Annotated[Path, typer.Argument(help="folder for the files")], as_json: Json = False) -> None:
    """Sample files with comments, to begin with: facts to forget and to keep, texts, unknown names."""
    from mech_unlearn.commands.init import init

    files = [str(path) for path in init(folder)]
    _tell(f"written: {', '.join(files)}; {files[-1]} says how to go on", {"files": files}, as_json)


@facts_app.command()
@takes(ConvertOptions)
def convert(options: ConvertOptions) -> None:
    """A published data set as facts files, which `locate`, `unlearn` and `audit` read."""
    from mech_unlearn.commands.facts import run_convert, told

    result = run_convert(options)
    print(json.dumps(result) if options.as_json else told(result))


@facts_app.command("check")
@takes(CheckOptions)
def check_facts(options: CheckOptions) -> None:
    """What does a model know? Each fact by phrasing, and what is odd about the file."""
    from mech_unlearn.commands.check import run_check

    found = run_check(options)
    if options.as_json:
        print(json.dumps(found.to_json()))
        return
    print("\n".join(found.lines()))
    if options.known is not None:
        print(f"written to {options.known}: the {len(found.known)} facts that it knows")


@testbed_app.command()
def build(
    out: Annotated[Path, typer.Option(help="folder for the world; finished models in it are kept")],
    world: World = "biographies",
    only: Annotated[str | None, typer.Option(help="base, full, retrained_0, retrained_1, ... or saes")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train the models of a world from scratch: full, retrained and the SAEs."""
    from mech_unlearn.testbed.build import build as build_world

    build_world(world, out, seed=seed, only=only)
    _tell(f"written to {out}", {"world": world, "folder": str(out)}, as_json)


@testbed_app.command()
def pools(
    out: Annotated[Path, typer.Option(help="folder for further retrained models and the scores; it goes on there")],
    world: World = "biographies",
    workers: Workers = 2,
    as_json: Json = False,
) -> None:
    """Score models whose truth is known, for calibrating and testing verdicts: about 860 models."""
    from mech_unlearn.testbed.materials import world_materials
    from mech_unlearn.testbed.pools import make_pools

    make_pools(world_materials(world, out), out, workers=workers, log=lambda line: print(line, file=sys.stderr))
    models = len(list((out / "cells").glob("*.json")))
    _tell(f"{models} models, written to {out}", {"world": world, "folder": str(out), "models": models}, as_json)


@app.command()
@takes(BenchOptions)
def bench(options: BenchOptions) -> None:
    """A published benchmark's own table for your checkpoints, with our restoration tests on the same facts."""
    if options.logs is not None or options.retain_logs is not None:
        _bench_logs(options)
        return
    from mech_unlearn.commands.bench import run_bench
    from mech_unlearn.report.bench import print_bench

    found = run_bench(options)
    if options.as_json:
        print(json.dumps(found))
        return
    print_bench(found)
    print(f"{found['seconds']} s; bench.json, verdicts, figures and report.html in {options.out}")


def _bench_logs(options: BenchOptions) -> None:
    """TOFU's table from evaluation logs: utility, forget quality and their parts."""
    from mech_unlearn.benchmarks.tofu.aggregate import bench_tofu, question_note

    logs, retain_logs = options.logs, options.retain_logs
    models = options.data or options.full or options.unlearned or options.retrained
    if options.name != "tofu" or logs is None or retain_logs is None or models:
        raise ValueError("logs are read by `bench tofu --logs A --retain-logs B`, without models and data")
    if note := question_note(logs, retain_logs):
        print(f"note: {note}", file=sys.stderr)
    found = bench_tofu(
        logs,
        retain_logs,
        intervals=options.intervals or not options.as_json,
        rows_per_author=options.rows_per_author,
        seed=options.seed,
    )
    if options.as_json:
        print(json.dumps(found))
        return
    for key, entry in found.items():
        low, high = entry["ci"]
        print(f"{key:26} {entry['value']:<10.4g} [{low:.4g}, {high:.4g}]  n = {entry['n']}, {entry['unit']}")


def _tell(told: str, found: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(found) if as_json else told)


def _show(summary: dict[str, Any], out: Path, as_json: bool) -> None:
    from mech_unlearn.report.tables import print_table

    if as_json:
        print(json.dumps(summary))
        return
    captions = Path(out) / "captions.json"
    note = json.loads(captions.read_text(encoding="utf-8"))["note"] if captions.is_file() else ""
    print_table(summary["rows"], f"{note}\n{summary['seconds']} s; figures, verdicts and report.html in {out}")


def main() -> None:
    """Run the command line; a user's mistake ends with status 2 and one line, without a traceback."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads make small models crawl
    try:
        sys.exit(app(standalone_mode=False))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own usage errors; their class moved between versions
            _fail(error.format_message())  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(error, ValueError | KeyError) or os.environ.get("MECH_UNLEARN_DEBUG"):
            raise
        _fail(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error))


def _fail(message: str) -> None:
    if message.strip():
        print("error:", *message.split(), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
