"""The state of a training run in one file, so that an interrupted run goes on bit by bit as if it had not been."""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mech_unlearn.training.around import Around
from mech_unlearn.training.feed import Feed
from mech_unlearn.training.rows import TrainRow
from mech_unlearn.training.trainee import Trainee

FORMAT = "mech_unlearn.training/2"


@dataclass(frozen=True)
class Progress:
    """How far a training run has come."""

    step: int = 0
    epoch: int = 0
    stopped: str = "epochs"
    """The rule that ended it."""


def fingerprint(model_hash: str, label: str, around: Around, rows: Sequence[Sequence[TrainRow]]) -> dict[str, str]:
    """What a checkpoint has to share with the run that goes on from it; part -> digest."""
    noise = asdict(around.noise) if around.noise else None
    said = {
        "model": model_hash,
        "data set": [list(some) for some in rows],
        "settings": [label, around.label, around.trainable, around.retain, noise],
    }
    return {part: hashlib.sha256(json.dumps(value).encode()).hexdigest() for part, value in said.items()}


class Saver:
    """Writes the state of a run to a file now and then, atomically; does nothing without a file."""

    def __init__(self, around: Around, marks: Mapping[str, str]) -> None:
        self.path, self.seconds, self.watch, self.marks = (
            around.checkpoint, around.checkpoint_seconds, around.watch, dict(marks)
        )  # fmt: skip
        self.last = time.perf_counter()

    def save(self, run: Trainee, optimizer: torch.optim.Optimizer, feeds: Sequence[Feed], progress: Progress) -> None:
        """Write the state, unless it was written less than `seconds` ago."""
        from safetensors.torch import save_file

        if self.path is None or time.perf_counter() - self.last < self.seconds:
            return
        tensors = {f"weight/{name}": weight.detach() for name, weight in run.weights.items()}
        for name, weight in run.weights.items():
            tensors |= {f"{key}/{name}": torch.as_tensor(x) for key, x in optimizer.state[weight].items()}
        state: dict[str, Any] = {
            "progress": asdict(progress),
            "feeds": [feed.state for feed in feeds],
            "last": run.last,
            "passes": [run.n_forward, run.n_backward],
            "noise": None if run.noise_state is None else run.noise_state.tolist(),
            "watch": self.watch.state if self.watch else None,
        }
        header = {"format": FORMAT, "marks": json.dumps(self.marks), "state": json.dumps(state)}
        partial = f"{self.path}.partial"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial, metadata=header)
        os.replace(partial, self.path)
        self.last = time.perf_counter()

    def restore(self, run: Trainee, optimizer: torch.optim.Optimizer, feeds: Sequence[Feed]) -> Progress | None:
        """Put a saved state in place; None where there is none.

        Raises:
            ValueError: the file is of another training run, or is no checkpoint.
        """
        from safetensors import SafetensorError, safe_open

        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"checkpoint {str(self.path)!r} cannot be read ({error}); delete it to begin anew"
            ) from error
        if header.get("format") != FORMAT:
            raise ValueError(f"{str(self.path)!r} is a safetensors file but not a checkpoint; name another")
        theirs = json.loads(header["marks"])
        if differ := [part for part, digest in self.marks.items() if theirs.get(part) != digest]:
            raise ValueError(
                f"checkpoint {str(self.path)!r} is of another training: {' and '.join(differ)} differ; "
                "delete it or name another"
            )
        with torch.no_grad():
            for name, weight in run.weights.items():
                weight.copy_(tensors[f"weight/{name}"])
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if (kept := tensors.get(f"{key}/{name}")) is None:
                        continue  # a weight that has had no gradient
                    optimizer.state[weight][key] = kept if key == "step" else kept.to(weight.device)
        state = json.loads(header["state"])
        for feed, kept in zip(feeds, state["feeds"], strict=True):
            feed.restore(kept)
        run.last = state["last"]
        run.n_forward, run.n_backward = state["passes"]
        run.noise_state = state["noise"]
        if self.watch:
            self.watch.restore(state["watch"])
        return Progress(**state["progress"])

    def done(self) -> None:
        """Remove the file: the run is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
