"""`mech-unlearn ...`: a thin command line over the package.

Progress goes to stderr, one short table (or one JSON object with --json) to stdout. Exit status: 0 on success, 2 on a
user's mistake with one line that names it, 1 on anything else. Slow imports stay inside the commands. Over 300 lines,
because a command's options are its arguments.
"""

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Locate, remove and prove: mechanistic unlearning of facts in language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
testbed_app = typer.Typer(help="Small worlds where the truth is known.", no_args_is_help=True)
app.add_typer(testbed_app, name="testbed")

World = Annotated[str, typer.Option(help="biographies (fictitious people) or wikidata (real facts)")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")]
Device = Annotated[str, typer.Option(help="torch device of the models")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
Seed = Annotated[int, typer.Option(help="seed of everything random")]


BENCHMARKS = "tofu, muse, wmdp, rwku, ort, conceptvectors, faithun, dusk, restor"


class Kind(str, Enum):
    methods = "methods"
    locators = "locators"
    tests = "tests"
    datasets = "datasets"
    worlds = "worlds"


@app.command()
def demo(
    world: World = "biographies",
    out: Annotated[Path, typer.Option(help="run directory")] = Path("runs/demo"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The main job on an embedded testbed: locate, remove, prove."""
    from mech_unlearn.commands.demo import run_demo

    _show(run_demo(world, out, seed=seed), out, as_json)


@app.command()
def locate(
    model: Annotated[str, typer.Option(help="hub id or folder")],
    facts: Annotated[Path, typer.Option(help="facts file, one JSON object per line")],
    how: Annotated[str, typer.Option(help="one of `mech-unlearn list locators`")],
    out: Annotated[Path, typer.Option(help="run directory")] = Path("runs/locate"),
    setting: Annotated[list[str] | None, typer.Option("--set", help="setting of the locator, key=value")] = None,
    unknown: Annotated[Path | None, typer.Option(help="names of unknown entities, one per line")] = None,
    retain: Annotated[
        Path | None, typer.Option(help="other facts: what to compare with, partners for patching")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="running text, one passage per line")] = None,
    sae: Annotated[str | None, typer.Option(help="SAE folder or release/id; one is trained when not given")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Find where facts live; writes locate.json and a figure, and goes on where it stopped."""
    from mech_unlearn.commands.locate import run_locate

    result = run_locate(
        model,
        facts,
        how,
        out,
        settings=setting or [],
        unknown=unknown,
        retain=retain,
        texts=texts,
        sae=sae,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    if as_json:
        print(json.dumps(result.to_json()))
        return
    print(f"{result.name}: {result.unit}, n = {result.n}; largest:")
    for labels, value in result.top(8):
        print(f"  {'  '.join(f'{axis} {label}' for axis, label in labels.items()):40} {value:.4f}")
    print(f"written to {out}")


@app.command()
def unlearn(
    model: Annotated[str, typer.Option(help="hub id or folder")],
    forget: Annotated[Path, typer.Option(help="facts to forget, one JSON object per line")],
    retain: Annotated[Path, typer.Option(help="facts to keep, one JSON object per line")],
    method: Annotated[str, typer.Option(help="one of `mech-unlearn list methods`")],
    out: Annotated[Path, typer.Option(help="folder for edit.safetensors and the exported model")],
    setting: Annotated[list[str] | None, typer.Option("--set", help="setting of the method, key=value")] = None,
    unknown: Annotated[Path | None, typer.Option(help="names of unknown entities, one per line")] = None,
    texts: Annotated[Path | None, typer.Option(help="retain text, one passage per line")] = None,
    sae: Annotated[str | None, typer.Option(help="SAE folder or release/id; one is trained when needed")] = None,
    sequential: Annotated[
        int | None, typer.Option(min=1, help="forget so many entities at a time, one request after another")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Remove facts: writes the edit, and the edited model as a Hugging Face folder with a parity proof."""
    from mech_unlearn.commands.unlearn import run_unlearn
    from mech_unlearn.report.tables import form_lines

    result = run_unlearn(
        model,
        forget,
        retain,
        method,
        out,
        sequential=sequential,
        settings=setting or [],
        unknown=unknown,
        texts=texts,
        sae=sae,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    if as_json:
        print(json.dumps(result))
        return
    for key in ("forget_recall", "heldout_recall", "neighbor_recall", "general_kl"):
        before, after = result["before"][key], result["after"][key]
        if after is not None:
            print(f"{key:16} {before['value']:.3f} -> {after['value']:.3f}  (n = {after['n']}, {after['unit']})")
    for line in form_lines(result["before"], result["after"]):
        print(line)
    print(f"written to {out}: {', '.join(result['files'])}")


@app.command()
def audit(
    full: Annotated[str, typer.Option(help="model before unlearning: hub id or folder")],
    unlearned: Annotated[str, typer.Option(help="model after unlearning: hub id or folder")],
    facts: Annotated[Path, typer.Option(help="the facts that were to be forgotten")],
    out: Annotated[Path, typer.Option(help="run directory")] = Path("runs/audit"),
    retrained: Annotated[
        list[str] | None, typer.Option(help="model trained without the facts; repeat for more")
    ] = None,
    retain: Annotated[Path | None, typer.Option(help="facts that were to stay: health of the model")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="running text, one passage per line, to see drift on; else the kept facts")
    ] = None,
    unknown: Annotated[Path | None, typer.Option(help="names of unknown entities, one per line")] = None,
    sae: Annotated[str | None, typer.Option(help="SAE of the full model: folder or release/id")] = None,
    tests: Annotated[
        str, typer.Option(help="core, all, or names from `mech-unlearn list tests`, comma-separated")
    ] = "core",
    calibration: Annotated[
        str,
        typer.Option(help="auto (the package's, if it has one for this full model), none, or a file of `calibrate`"),
    ] = "auto",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Deleted or only suppressed? Restoration tests on any before/after pair of checkpoints."""
    from mech_unlearn.commands.audit import run_audit

    summary = run_audit(
        full,
        unlearned,
        facts,
        out,
        retrained=retrained or [],
        retain=retain,
        texts=texts,
        unknown=unknown,
        sae=sae,
        tests=tests,
        calibration=calibration,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    _show(summary, out, as_json)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="folder for the scores of the pools and calibration.json")],
    full: Annotated[str, typer.Option(help="the model that knows the facts: hub id or folder")],
    facts: Annotated[Path, typer.Option(help="facts it knows, about 40 subjects or more")],
    retain: Annotated[Path, typer.Option(help="facts about other subjects, 270 at least")],
    texts: Annotated[Path, typer.Option(help="running text, one passage per line, 200 at least")],
    reference: Annotated[list[str], typer.Option(help="model trained without the facts, to compare with; 2 at least")],
    retrained: Annotated[
        list[str], typer.Option(help="model trained without the facts, to make deleted ones of; 2 at least")
    ],
    unknown: Annotated[Path | None, typer.Option(help="names of unknown entities, one per line")] = None,
    sae: Annotated[str | None, typer.Option(help="SAE of the full model: folder or release/id")] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes, each with its own copy of the models")] = 2,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make a calibration for your own models: pools of known truth, scored; goes on where it stopped."""
    from mech_unlearn.commands.calibrate import run_calibrate

    path, note = run_calibrate(
        full, facts, retain, texts, out, references=reference, retrained=retrained, unknown=unknown, sae=sae,
        workers=workers, device=device, dtype=dtype, seed=seed,
    )  # fmt: skip
    told = f"{note}\nwritten to {path}; use it with `mech-unlearn audit --calibration {path}`"
    _tell(told, {"calibration": str(path), "note": note}, as_json)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="a run directory")], as_json: Json = False) -> None:
    """(Re)draw figures and report.html of a finished run."""
    from mech_unlearn.report.figures import draw_figures
    from mech_unlearn.report.page import write_report

    if (folder / "bench.json").is_file():
        from mech_unlearn.report.bench_figure import draw_bench

        draw_bench(json.loads((folder / "bench.json").read_text(encoding="utf-8")), folder / "figures/0_benchmark.png")
    if (folder / "summary.json").is_file() and json.loads((folder / "summary.json").read_text("utf-8"))["rows"]:
        draw_figures(folder)
    page = write_report(folder)
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
    for row in rows:
        more = "  (see `bench`)" if kind is Kind.datasets and row["name"] in BENCHMARKS.split(", ") else ""
        more += "  (experimental)" if row.get("experimental") else ""
        print(f"{row['name']:25} {row['summary']}" + (f"  [{row['paper']}]" if row["paper"] else "") + more)


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
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 2,
    as_json: Json = False,
) -> None:
    """Score models whose truth is known, for calibrating and testing verdicts: about 860 models."""
    from mech_unlearn.testbed.materials import world_materials
    from mech_unlearn.testbed.pools import make_pools

    make_pools(world_materials(world, out), out, workers=workers, log=lambda line: print(line, file=sys.stderr))
    models = len(list((out / "cells").glob("*.json")))
    _tell(f"{models} models, written to {out}", {"world": world, "folder": str(out), "models": models}, as_json)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help=BENCHMARKS)],
    data: Annotated[str | None, typer.Option(help="the benchmark's data: folder, file or hub id")] = None,
    full: Annotated[str | None, typer.Option("--full", "--model", help="model before unlearning: id or folder")] = None,
    unlearned: Annotated[str | None, typer.Option(help="model after unlearning, or an edit file of ours")] = None,
    retrained: Annotated[
        list[str] | None, typer.Option(help="model trained without the forget set; repeat for more")
    ] = None,
    out: Annotated[Path, typer.Option(help="run directory; it goes on where it stopped")] = Path("runs/bench"),
    setting: Annotated[list[str] | None, typer.Option("--set", help="setting of the benchmark, key=value")] = None,
    tests: Annotated[
        str, typer.Option(help="restoration tests on the benchmark's facts: core, all, none, or names with commas")
    ] = "core",
    sae: Annotated[str | None, typer.Option(help="SAE of the full model: folder or release/id")] = None,
    calibration: Annotated[str, typer.Option(help="auto, none, or a file of `calibrate`")] = "auto",
    limit: Annotated[int | None, typer.Option(help="so many rows of each set of the benchmark")] = None,
    logs: Annotated[Path | None, typer.Option(help="tofu without models: an evaluation log, .json or .json.gz")] = None,
    retain_logs: Annotated[
        Path | None, typer.Option(help="evaluation log of the model retrained without the forget set")
    ] = None,
    intervals: Annotated[bool, typer.Option(help="logs with --json: value, interval, n, unit of each number")] = False,
    rows_per_author: Annotated[int, typer.Option(help="logs: questions the bootstrap draws together")] = 1,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """A published benchmark's own table for your checkpoints, with our restoration tests on the same facts."""
    if logs is not None or retain_logs is not None:
        if name != "tofu" or logs is None or retain_logs is None or data or full or unlearned or retrained:
            raise ValueError("logs are read by `bench tofu --logs A --retain-logs B`, without models and data")
        return _bench_logs(logs, retain_logs, intervals, rows_per_author, seed, as_json)
    from mech_unlearn.commands.bench import run_bench
    from mech_unlearn.report.bench import print_bench

    if not data or not full or not unlearned:
        raise ValueError(f"bench {name} needs --data, --full and --unlearned")
    found = run_bench(
        name, data, full, unlearned, out, retrained=retrained or [], settings=setting or [], tests=tests, sae=sae,
        calibration=calibration, limit=limit, device=device, dtype=dtype, seed=seed,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found))
        return
    print_bench(found)
    print(f"{found['seconds']} s; bench.json, verdicts, figures and report.html in {out}")


def _bench_logs(logs: Path, retain_logs: Path, intervals: bool, rows_per_author: int, seed: int, as_json: bool) -> None:
    """TOFU's table from evaluation logs: utility, forget quality and their parts."""
    from mech_unlearn.benchmarks.tofu.aggregate import bench_tofu, question_note

    if note := question_note(logs, retain_logs):
        print(f"note: {note}", file=sys.stderr)
    found = bench_tofu(
        logs, retain_logs, intervals=intervals or not as_json, rows_per_author=rows_per_author, seed=seed
    )
    if as_json:
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
