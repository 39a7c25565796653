"""Runs one case: the reference and ours in turn in one process, and ours alone in a fresh one for its memory."""

import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from torch import Tensor

from speed.shapes import SHAPES, Shape, Way


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two ways to one result."""

    reference: str
    """What ours is measured against."""
    plain: Callable[[Shape], Way]
    ours: Callable[[Shape], Way]
    bar: float | None = None
    """Least ratio of reference over ours on the GPT-2 shape; a limit has a bar below 1. None: nothing promised."""
    finish: Callable[[Tensor], Tensor] = lambda found: found
    """What is left to do with the reference's result before the two are compared; not timed."""
    frugal: Callable[[Shape], Way] | None = None
    """Ours with its models made one at a time inside, where several are needed: what memory is measured on."""
    data: Path | None = None
    """File that the case reads; it is skipped where there is none."""

    @property
    def lacks(self) -> str:
        """Why the case cannot run; empty where it can."""
        return "" if self.data is None or self.data.is_file() else f"skipped, its data is not there: {self.data}"


@dataclass(frozen=True)
class Peak:
    """Resident memory of a process that runs ours once, MiB."""

    peak_mib: float
    """Largest while it ran, with interpreter, libraries and weights."""
    growth_mib: float
    """The largest less what was resident just before."""


@dataclass(frozen=True)
class Row:
    """What was measured of one case on one shape."""

    name: str
    reference: str
    reference_s: float
    ours_s: float
    max_rel_error: float
    """Largest |ours - reference| over the largest |reference|."""
    memory: Peak
    bar: float | None

    @property
    def ratio(self) -> float:
        return self.reference_s / self.ours_s

    def as_json(self) -> str:
        keys = ("name", "ratio", "reference", "reference_s", "ours_s", "max_rel_error")
        return json.dumps({key: getattr(self, key) for key in keys} | {"peak_mib": self.memory.peak_mib})


def error(ours: Tensor, reference: Tensor) -> float:
    """Largest |ours - reference| over the largest |reference|.

    Raises:
        ValueError: other shapes, or values that are not finite.
    """
    if ours.shape != reference.shape or not (ours.isfinite().all() and reference.isfinite().all()):
        raise ValueError(f"results {tuple(ours.shape)} and {tuple(reference.shape)} differ in shape or are not finite")
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def _timed(way: Way) -> tuple[float, Tensor]:
    start = time.perf_counter()
    found = way()
    return time.perf_counter() - start, found


def measure(name: str, case: Case, repeats: int) -> Row:
    """Time both ways, reference, ours, reference, ours, after a warm-up of ours; medians."""
    shape = SHAPES[name.split("/")[1]]
    memory = peak_in_child(name)
    plain, ours = case.plain(shape), case.ours(shape)
    ours()
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    worst = 0.0
    for _ in range(repeats):
        seconds, expected = _timed(plain)
        times["plain"].append(seconds)
        seconds, found = _timed(ours)
        times["ours"].append(seconds)
        worst = max(worst, error(found, case.finish(expected)))
        del expected, found
    return Row(name, case.reference, median(times["plain"]), median(times["ours"]), worst, memory, case.bar)


def peak_in_child(name: str) -> Peak:
    """Run ours once in a fresh process and take its memory from there."""
    command = [sys.executable, "-m", "speed", "--peak", name]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: the process that measures memory failed: {done.stderr.strip()[-2000:]}")
    return Peak(*json.loads(done.stdout.splitlines()[-1]))


def peak_here(name: str, case: Case) -> Peak:
    """Memory of one run of ours in this process, which should be a fresh one.

    On Linux from /proc, where the high-water mark can be set back after the models are made. ru_maxrss cannot, and
    a child begins with its parent's; elsewhere it is all there is, so models in the making count too.
    """
    way = (case.frugal or case.ours)(SHAPES[name.split("/")[1]])
    gc.collect()
    if not sys.platform.startswith("linux"):
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
        way()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
        return Peak(after, after - before)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    way()
    peak = _status("VmHWM")
    return Peak(peak, peak - before)


def _status(key: str) -> float:
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
