"""What each command may be asked: one frozen type a command, whose fields are its options on the command line.

`takes` makes the command's signature of the type, so that an option stands once: its name, type, default and help here,
its use where the command does its work, its value in the run's spec.yaml by `spec_of`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")]
Seed = Annotated[int, typer.Option(help="seed of everything random")]
Device = Annotated[str, typer.Option(help="torch device of the models")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
Out = Annotated[Path, typer.Option(help="run directory; the same command goes on where it stopped")]
Folder = Annotated[Path, typer.Option(help="folder for what is made; finished parts in it are kept")]
World = Annotated[str, typer.Option(help="biographies (fictitious people) or wikidata (real facts)")]
ModelSource = Annotated[str, typer.Option(help="hub id or folder")]
Settings = Annotated[list[str], typer.Option("--set", help="a setting, key=value; repeat for more")]
Facts = Annotated[Path, typer.Option(help="facts file, one JSON object per line")]
Unknown = Annotated[
    Path | None,
    typer.Option(help="names of unknown entities, one per line, with their kind behind a tab where facts have several"),
]
Texts = Annotated[Path | None, typer.Option(help="running text, one passage per line")]
Retain = Annotated[Path | None, typer.Option(help="facts that are to stay, or to compare with")]
SaeSource = Annotated[str | None, typer.Option(help="SAE of the model: folder or release/id")]
Full = Annotated[str, typer.Option(help="model before unlearning: hub id or folder")]
Unlearned = Annotated[str, typer.Option(help="model after unlearning: hub id, folder, or an edit file of ours")]
Retrained = Annotated[list[str], typer.Option(help="model trained without the facts; repeat for more")]
Tests = Annotated[str, typer.Option(help="core, all, or names from `mech-unlearn list tests`, comma-separated")]
CalibrationSource = Annotated[
    str, typer.Option(help="auto (the package's, if it has one for this full model), none, or a file of `calibrate`")
]
Workers = Annotated[int, typer.Option(min=1, help="processes, each with its own copy of the models")]


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """`mech-unlearn demo`"""

    world: World = "biographies"
    out: Out = Path("runs/demo")
    seed: Seed = 0
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every command asks that loads a user's models."""

    unknown: Unknown = None
    sae: SaeSource = None
    device: Device = "cpu"
    dtype: Dtype = "float32"
    seed: Seed = 0
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class LocateOptions(CommonOptions):
    """`mech-unlearn locate`"""

    model: ModelSource
    facts: Facts
    how: Annotated[str, typer.Option(help="one of `mech-unlearn list locators`")]
    out: Out = Path("runs/locate")
    settings: Settings = field(default_factory=list)
    retain: Retain = None
    texts: Texts = None


@dataclass(frozen=True, kw_only=True)
class UnlearnOptions(CommonOptions):
    """`mech-unlearn unlearn`"""

    model: ModelSource
    forget: Annotated[Path, typer.Option(help="facts to forget, one JSON object per line")]
    retain: Annotated[Path, typer.Option(help="facts to keep, one JSON object per line")]
    method: Annotated[str, typer.Option(help="one of `mech-unlearn list methods`")]
    out: Annotated[Path, typer.Option(help="folder for edit.safetensors and the exported model")]
    settings: Settings = field(default_factory=list)
    texts: Texts = None
    unseen: Annotated[
        float, typer.Option(help="share of kept subjects and texts that the method is not shown; health is theirs")
    ] = 0.25
    sequential: Annotated[
        int | None, typer.Option(min=1, help="forget so many entities at a time, one request after another")
    ] = None


@dataclass(frozen=True, kw_only=True)
class AuditOptions(CommonOptions):
    """`mech-unlearn audit`"""

    full: Full
    unlearned: Unlearned
    facts: Facts
    out: Out = Path("runs/audit")
    retrained: Retrained = field(default_factory=list)
    retain: Retain = None
    texts: Texts = None
    tests: Tests = "core"
    calibration: CalibrationSource = "auto"


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(CommonOptions):
    """`mech-unlearn calibrate`"""

    out: Folder
    full: Full
    facts: Annotated[Path, typer.Option(help="facts it knows, about 40 subjects or more")]
    retain: Annotated[Path, typer.Option(help="facts about other subjects, 270 at least")]
    texts: Annotated[Path, typer.Option(help="running text, one passage per line, 200 at least")]
    reference: Annotated[list[str], typer.Option(help="model trained without the facts, to compare with; 2 at least")]
    retrained: Annotated[
        list[str], typer.Option(help="model trained without the facts, to make deleted ones of; 2 at least")
    ]
    workers: Workers = 2


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """`mech-unlearn bench`"""

    name: Annotated[str, typer.Argument(help="one of the benchmarks in `mech-unlearn list datasets`")]
    data: Annotated[str | None, typer.Option(help="the benchmark's data: folder, file or hub id")] = None
    full: Annotated[str | None, typer.Option("--full", "--model", help="model before unlearning: id or folder")] = None
    unlearned: Annotated[str | None, typer.Option(help="model after unlearning, or an edit file of ours")] = None
    retrained: Retrained = field(default_factory=list)
    out: Out = Path("runs/bench")
    settings: Settings = field(default_factory=list)
    tests: Annotated[
        str, typer.Option(help="restoration tests on the benchmark's facts: core, all, none, or names with commas")
    ] = "core"
    sae: SaeSource = None
    calibration: CalibrationSource = "auto"
    limit: Annotated[int | None, typer.Option(help="so many rows of each set of the benchmark")] = None
    logs: Annotated[Path | None, typer.Option(help="tofu without models: an evaluation log, .json or .json.gz")] = None
    retain_logs: Annotated[
        Path | None, typer.Option(help="evaluation log of the model retrained without the forget set")
    ] = None
    intervals: Annotated[bool, typer.Option(help="logs with --json: value, interval, n, unit of each number")] = False
    rows_per_author: Annotated[int, typer.Option(help="logs: questions the bootstrap draws together")] = 1
    device: Device = "cpu"
    dtype: Dtype = "float32"
    seed: Seed = 0
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """`mech-unlearn facts convert`"""

    name: Annotated[str, typer.Argument(help="a data set of `mech-unlearn list datasets`")]
    data: Annotated[str, typer.Option(help="its data: folder, file or hub id")]
    out: Annotated[Path, typer.Option(help="new file for the facts to forget, one JSON object per line")]
    retain: Annotated[Path | None, typer.Option(help="new file for the facts to keep")] = None
    settings: Settings = field(default_factory=list)
    limit: Annotated[int | None, typer.Option(help="at most so many facts in each file")] = None
    seed: Seed = 0
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """`mech-unlearn facts check`"""

    model: ModelSource
    facts: Facts
    retain: Annotated[Path | None, typer.Option(help="facts to keep, which the others are compared with")] = None
    known: Annotated[Path | None, typer.Option(help="new file for the facts that the model knows")] = None
    device: Device = "cpu"
    dtype: Dtype = "float32"
    seed: Seed = 0
    as_json: Json = False


def takes(options: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Gives a function of one options object the fields of its type as parameters, for typer to read."""
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=_default(f), annotation=hints[f.name])
        for f in fields(options)
    ]
    parameters.sort(key=lambda p: p.default is not inspect.Parameter.empty)

    def with_parameters(run: Callable[[Any], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            run(options(**given))

        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        return command

    return with_parameters


def _default(f: Any) -> Any:
    if f.default_factory is not MISSING:
        return f.default_factory()
    return inspect.Parameter.empty if f.default is MISSING else f.default


SOURCES = ("full", "model", "unlearned", "retrained", "sae", "calibration", "data")
"""Options that name a file or folder, or else something to be had by that name."""


def spec_of(command: str, options: Any, without: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """What stands in a run's spec.yaml: the command, its options but where to write and how to print, and `more`, which
    goes before an option of the same name. Files and folders stand by their absolute paths."""
    left_out = {"out", "as_json", *without}
    asked: Mapping[str, Any] = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in left_out}
    return {"command": command, **{key: _placed(x, key in SOURCES) for key, x in asked.items()}, **more}


def _placed(value: Any, source: bool) -> Any:
    """An option's value, with the absolute path of a file or folder that is there."""
    if isinstance(value, list):
        return [_placed(item, source) for item in value]
    if not isinstance(value, Path) and not (source and isinstance(value, str)):
        return value
    return str(Path(value).resolve()) if Path(value).exists() else str(value)
