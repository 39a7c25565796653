"""A run directory: what was asked, what it ran on, and each result as soon as it exists; and work side by side.

spec.yaml        what was asked; the same command on the same folder goes on where it stopped
provenance.json  versions, git commit, model and data hashes, seed, device
cells/*.json     one finished audit each (row, records, verdicts); never computed twice
results.jsonl    one record per model x test x fact
summary.json     the table; verdicts.json: one entry per fact and model
figures/*.png    report.html
"""

import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from mech_unlearn.core import Fact
from mech_unlearn.files import _finite, read_json, read_text, write_atomic, write_json

Name = TypeVar("Name")
Found = TypeVar("Found")
PACKAGES = ("mech_unlearn", "torch", "transformers", "transformer-lens", "sae-lens", "numpy", "scikit-learn")


def data_hash(facts: Iterable[Fact]) -> str:
    """SHA-256 over the facts in order: the identity of the data."""
    from mech_unlearn.core import fact_to_json

    lines = (json.dumps(fact_to_json(fact), sort_keys=True, ensure_ascii=False) for fact in facts)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def provenance(hashes: Mapping[str, str], seed: int, device: str) -> dict[str, Any]:
    """Versions, git commit (None outside a checkout), machine, and the hashes that the caller names."""
    root = Path(__file__).parent
    commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "versions": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "git": commit.stdout.strip() or None,
        "hashes": dict(hashes),
        "seed": seed,
        "device": device,
    }


_PEAKS: dict[int, int] = {}
"""Process of `side_by_side` -> its peak of resident memory, KiB."""


def peak_rss_mib(workers: int = 2) -> float:
    """An upper bound of the memory held at any time: this process's peak and those of its `workers` largest workers.

    Pages that forked workers share with this process are counted more than once.
    """
    return (_peak_kib() + sum(sorted(_PEAKS.values())[-workers:])) / 1024


def _peak_kib() -> int:
    """Peak resident memory of this process. `ru_maxrss` would begin at that of the process that started this one, so
    that a `git` started by a large process counts as large."""
    status = Path("/proc/self/status")
    if not status.is_file():  # macOS counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))


@dataclass(frozen=True)
class Run:
    """An open run directory."""

    folder: Path
    spec: Mapping[str, Any]
    started: float = field(default_factory=time.monotonic)

    def has(self, name: str) -> bool:
        """Whether that unit of work is finished."""
        return (self.folder / "cells" / f"{name}.json").exists()

    def cell(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The result of one unit of work: read if it is there, else computed and written.

        Raises:
            ValueError, KeyError: what `compute` refuses; then a run that holds nothing else is taken back.
        """
        path = self.folder / "cells" / f"{name}.json"
        if not self.has(name):
            try:
                found = {**compute()}
            except (ValueError, KeyError):
                self.withdraw()
                raise
            write_json(path, found)
        return read_json(path)

    def withdraw(self) -> None:
        """Remove the folder if nothing but what was asked and what it ran on lies in it, so that refused input leaves
        nothing behind that would refuse the corrected."""
        if {path.name for path in self.folder.iterdir()} <= {"spec.yaml", "provenance.json"}:
            shutil.rmtree(self.folder)

    def finish(self, command: str, world: str | None, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Write results.jsonl, verdicts.json and summary.json from the finished cells; gives the summary back."""
        records = [record for cell in cells for record in cell["records"]]
        lines = (json.dumps(_finite(r), ensure_ascii=False) + "\n" for r in records)
        write_atomic(self.folder / "results.jsonl", "".join(lines))
        write_json(self.folder / "verdicts.json", {cell["row"]["name"]: cell["verdicts"] for cell in cells})
        summary = {
            "command": command,
            "world": world,
            "seconds": round(time.monotonic() - self.started, 1),
            "peak_rss_mib": round(peak_rss_mib(), 1),
            "rows": [cell["row"] for cell in cells],
        }
        write_json(self.folder / "summary.json", summary)
        return summary


def open_run(out: str | os.PathLike, spec: Mapping[str, Any]) -> Run:
    """Make a run directory, or open the one that the same spec began.

    Raises:
        ValueError: the folder holds something else, or cannot be written.
    """
    from mech_unlearn.files import require_empty

    folder = Path(out)
    asked = json.loads(json.dumps(dict(spec)))
    begun = folder / "spec.yaml"
    if begun.is_file():
        try:
            there = yaml.safe_load(read_text(begun))
        except (yaml.YAMLError, RecursionError):
            there = None
        if not isinstance(there, dict):
            raise ValueError(f"output folder {str(folder)!r} holds a spec.yaml that is no run's; name another folder")
        if differ := sorted(key for key in {*there, *asked} if there.get(key) != asked.get(key)):
            raise ValueError(
                f"output folder {str(folder)!r} holds a run of another spec ({', '.join(differ)} differ); "
                "name another folder"
            )
        return Run(folder, asked)
    require_empty(folder).mkdir(parents=True, exist_ok=True)
    write_atomic(begun, yaml.safe_dump(asked, sort_keys=False))
    return Run(folder, asked)


_SAY: list[Callable[[str], None]] = []


def say(message: str) -> None:
    """From within a process of `side_by_side`: a line for the `log` of the one that started it."""
    _SAY[0](message)


def side_by_side(
    names: Sequence[Name],
    work: Callable[[Name], Found],
    *,
    workers: int = 2,
    method: Literal["spawn", "fork"] = "spawn",
    setup: Callable[..., None] | None = None,
    given: tuple[Any, ...] = (),
    log: Callable[[str], None] | None = None,
) -> Iterator[tuple[Name, Found]]:
    """`work` of every name in so many processes of one thread each: (name, what it gave) as each ends.

    Names, work and what it gives are pickled. Work writes what it makes itself, so that what is finished outlives a
    failure.

    Args:
        names: begun in this order; the longest work first lets all processes end at about the same time.
        method: "fork" lets processes inherit what `given` holds, pickled or not; Linux only.
        setup: called with `given` once in each process, before any work.
        log: told what processes `say`.

    Raises:
        Exception: what `work` raised; what has not begun by then is not begun.
        RuntimeError: a process was killed.
    """
    context = get_context(method)
    said = context.SimpleQueue()
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(said, setup, given)) as pool:
        running = {pool.submit(_measured, work, name): name for name in names}
        waiting = set(running)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                while not said.empty():
                    message = said.get()
                    if log:
                        log(message)
                for future in done:
                    yield running[future], _result(future, [running[left] for left in (future, *waiting)])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _measured(work: Callable[[Name], Found], name: Name) -> tuple[Found, int, int]:
    """What work gives, and the process that did it with its peak memory."""
    return work(name), os.getpid(), _peak_kib()


def _result(future: Future[tuple[Found, int, int]], left: Sequence[Any]) -> Found:
    try:
        found, process, _PEAKS[process] = future.result()
        return found
    except BrokenProcessPool as error:
        raise RuntimeError(f"a process was killed; not finished: {', '.join(map(repr, left))}") from error


def _begin(said: Any, setup: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    _SAY[:] = [said.put]
    if setup:
        setup(*given)
