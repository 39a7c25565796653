"""The state of a training run in one file, so that an interrupted run goes on bit by bit as if it had not been."""

import hashlib
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from mech_unlearn.files import first_error, read_tensors, replacing
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
        with replacing(self.path) as part:
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, part, metadata=header)
        self.last = time.perf_counter()

    def restore(self, run: Trainee, optimizer: torch.optim.Optimizer, feeds: Sequence[Feed]) -> Progress | None:
        """Put a saved state in place; None where there is none.

        Raises:
            ValueError: the file is of another training run, damaged, or no checkpoint.
        """
        if self.path is None or not self.path.exists():
            return None
        header, tensors = read_tensors(self.path, "checkpoint")
        if header.get("format") != FORMAT:
            raise ValueError(f"{str(self.path)!r} is a safetensors file but not a checkpoint; name another")
        try:
            marks = TypeAdapter(dict[str, str]).validate_json(header.get("marks", ""))
            state = _State.model_validate_json(header.get("state", ""))
        except ValidationError as error:
            raise self._damaged(first_error(error)) from None
        self._require_mine(marks)
        try:
            state.require_fit(run, tensors, feeds)
        except ValueError as error:
            raise self._damaged(str(error)) from None
        with torch.no_grad():
            for name, weight in run.weights.items():
                weight.copy_(tensors[f"weight/{name}"])
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if (kept := tensors.get(f"{key}/{name}")) is None:
                        continue  # a weight that has had no gradient
                    optimizer.state[weight][key] = kept if key == "step" else kept.to(weight.device)
        for feed, kept in zip(feeds, state.feeds, strict=True):
            feed.restore(kept.model_dump())
        run.last = state.last
        run.n_forward, run.n_backward = state.passes
        run.noise_state = state.noise
        if self.watch:
            self.watch.restore(state.watch)
        return state.progress

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"checkpoint {str(self.path)!r} is damaged: {why}; delete it to begin anew")

    def _require_mine(self, theirs: Mapping[str, str]) -> None:
        if differ := [part for part, digest in self.marks.items() if theirs.get(part) != digest]:
            raise ValueError(
                f"checkpoint {str(self.path)!r} is of another training: {' and '.join(differ)} differ; "
                "delete it or name another"
            )

    def done(self) -> None:
        """Remove the file: the run is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class _FeedState(BaseModel):
    left: list[int]
    order: tuple[int, list[int], float | None]


class _State(BaseModel):
    """What a checkpoint's header tells of the run."""

    model_config = ConfigDict(extra="forbid")
    progress: Progress
    feeds: list[_FeedState]
    last: dict[str, float]
    passes: tuple[int, int]
    noise: list[int] | None
    watch: Any

    def require_fit(self, run: Trainee, tensors: Mapping[str, Tensor], feeds: Sequence[Feed]) -> None:
        """Check that a state belongs to the weights and rows of a run.

        Raises:
            ValueError: weights or moments of other names or shapes, or rows that the run does not have.
        """
        for name, weight in run.weights.items():
            kept = [tensors.get(f"{key}/{name}") for key in ("weight", "exp_avg", "exp_avg_sq")]
            if kept[0] is None or any(x is not None and x.shape != weight.shape for x in kept):
                raise ValueError(f"no weight {name!r} of this shape")
        counts = (run.n_forget, len(run.kept))
        if len(self.feeds) != len(feeds) or any(
            not 0 <= i < n for feed, n in zip(self.feeds, counts, strict=True) for i in feed.left
        ):
            raise ValueError("rows that the training does not have")
        for feed in self.feeds:
            try:
                Feed(random.Random(), 1).restore(feed.model_dump())
            except (ValueError, TypeError, OverflowError):
                raise ValueError("a random state that is none") from None
