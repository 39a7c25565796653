"""What every experiment shares: its command line, cells that are computed once and side by side, and its results."""

import gzip
import json
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mech_unlearn import run
from mech_unlearn.files import write_atomic, write_json

SHARED_DATA = Path(os.environ.get("MECH_UNLEARN_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""Where published files lie, beside the checkout by default."""


@dataclass(frozen=True)
class Cells:
    """Finished units of work, one JSON file each in a folder; what is there is never computed again."""

    folder: Path
    prefix: str = ""
    """What every file name begins with."""

    def path(self, name: str) -> Path:
        return self.folder / f"{self.prefix}{name}.json"

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def get(self, name: str) -> dict[str, Any] | None:
        """A cell, None where it is not finished."""
        return read(self.path(name)) if self.has(name) else None

    def __getitem__(self, name: str) -> dict[str, Any]:
        """
        Raises:
            ValueError: the cell is not finished.
        """
        if (found := self.get(name)) is None:
            raise ValueError(f"{name!r} is not finished in {str(self.folder)!r}: run without --report first")
        return found

    def names(self) -> list[str]:
        """Of all finished cells, by file name."""
        return [path.stem.removeprefix(self.prefix) for path in sorted(self.folder.glob(f"{self.prefix}*.json"))]

    def put(self, name: str, cell: Mapping[str, Any]) -> None:
        write_json(self.path(name), cell)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def pack(path: Path, items: Iterable[Any]) -> None:
    """JSON values as lines of a compressed file; the same bytes for the same values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(item) + "\n" for item in items).encode(), mtime=0))


def unpack(path: Path) -> list[Any]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def command_line(
    about: str | None,
    here: Path,
    *,
    work: str = "",
    report: str = "",
    quick: str = "",
    data: tuple[Path, str] | None = None,
) -> ArgumentParser:
    """The options of an experiment, each there where it is described, and the number of processes.

    Args:
        about: the module's docstring.
        here: the experiment's folder.
        work: what the folder WORK is for.
        report: what `--report` makes.
        quick: what `--quick` leaves.
        data: (where the data is by default, what it is).
    """
    parser = ArgumentParser(
        f"python -m experiments.{here.name}.run", description=about, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (2)")
    if work:
        parser.add_argument("work", type=Path, help=work)
    if data:
        parser.add_argument("--data", type=Path, default=data[0], help=data[1])
    for flag, text in (("--report", report), ("--quick", quick)):
        if text:
            parser.add_argument(flag, action="store_true", help=text)
    return parser


def write_results(folder: Path, summary: Mapping[str, Any], tables: str | None = None) -> None:
    """summary.json and tables.md, which the README quotes."""
    write_json(folder / "summary.json", summary)
    if tables is not None:
        write_atomic(folder / "tables.md", tables)


def provenance(seed: int = 0, **hashes: str) -> dict[str, Any]:
    """How a summary was made: versions, commit, hashes of data and models. Everything ran on the CPU."""
    return run.provenance(hashes, seed, "cpu")
