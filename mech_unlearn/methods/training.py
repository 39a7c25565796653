"""The training loop that gradient methods share: a plain float32 copy is trained, and its change is given back.

A method brings a loss on answers and says what may be trained; batches, masks, the retain term, clipping, stopping and
undoing are the same for all.
"""

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.methods.answers import (
    EVAL_BATCH,
    AnswerScores,
    Row,
    answer_rows,
    collate,
    forward,
    nll,
    score_rows,
    shuffled,
    text_rows,
)
from mech_unlearn.model import Model

Loss = Callable[[AnswerScores], Tensor]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train."""

    lr: float
    epochs: int
    """Passes over the forget rows (facts x phrasings)."""
    batch_size: int
    """Forget rows per step; as many retain rows go with them."""
    weight_decay: float
    clip: float
    """Bound of the gradient's norm over all trained tensors."""
    stop_recall: float | None = None
    """Stop after the epoch in which at most this share of the forget rows is still answered (greedy, all tokens)."""

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "batch_size", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Objective:
    """What is minimised: forget_weight x forget loss + retain_weight x NLL of retained answers and texts."""

    forget: Callable[[AnswerScores], Loss]
    """From the scores of all forget rows before training to the loss of a batch of them."""
    retain_weight: float
    forget_weight: float = 1.0


@dataclass
class _Run:
    """The state of one training run."""

    hf: Any
    weights: list[Tensor]
    fill: int
    device: torch.device
    n_forward: int = 0
    n_backward: int = 0
    last: dict[str, float] = field(default_factory=dict)

    def forward(self, rows: Sequence[Row], members: Sequence[int]) -> AnswerScores:
        self.n_forward += 1
        return forward(self.hf, collate(rows, members, self.fill, self.device))

    def score(self, rows: Sequence[Row]) -> AnswerScores:
        self.n_forward += -(-len(rows) // EVAL_BATCH)
        return score_rows(self.hf, rows, self.fill, self.device)


def trained_copy(model: Model, trainable: str) -> Any:
    """A float32 copy of the plain HF model in which only parameters whose name matches `trainable` are trained.

    Float32 also for a bfloat16 model: a step of 1e-5 is below bfloat16's resolution and would be rounded away.
    Dropout stays off, so that a batch's loss does not depend on a random state.

    Raises:
        ValueError: no name matches.
    """
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        hf = model.plain_copy().float()  # making a model draws initial weights
    for name, weight in hf.named_parameters():
        weight.requires_grad_(re.search(trainable, name) is not None)
    if not any(weight.requires_grad for weight in hf.parameters()):
        raise ValueError(f"no parameter of {model.name!r} matches {trainable!r}: nothing would be trained")
    return hf


def changes(model: Model, hf: Any) -> dict[str, Tensor]:
    """Trained minus original, float32 on the CPU, for the tensors that changed."""
    after = dict(hf.named_parameters())
    deltas = {name: (after[name].detach() - weight.detach().float()).cpu() for name, weight in model.held.items()}
    return {name: delta for name, delta in deltas.items() if delta.any()}


def train(
    model: Model,
    forget: ForgetSet,
    retain: RetainSet,
    objective: Objective,
    schedule: Schedule,
    *,
    trainable: str,
    seed: int,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(Deltas of the tensors that changed, report).

    Args:
        trainable: regular expression that the names of the trained parameters match.

    Raises:
        ValueError: no retained facts or texts although they have weight, nothing to train, or a loss that is not
            finite.
    """
    start = time.perf_counter()
    rows = answer_rows(model.tokenizer, forget.facts)
    kept = _retain_rows(model, retain, objective.retain_weight)
    hf = trained_copy(model, trainable)
    run = _Run(hf, [w for w in hf.parameters() if w.requires_grad], model.tokenizer.pad_token_id or 0, model.device)
    steps, stopped = _loop(run, rows, kept, objective, schedule, random.Random(seed))
    report = {
        "steps": steps,
        "stopped": stopped,
        "forget_recall": run.score(rows).exact.float().mean().item(),
        "final_losses": run.last,
        "n_forward": run.n_forward,
        "n_backward": run.n_backward,
        "seconds": time.perf_counter() - start,
    }
    return changes(model, hf), report


def _retain_rows(model: Model, retain: RetainSet, weight: float) -> list[Row]:
    rows = answer_rows(model.tokenizer, retain.facts) + text_rows(model.tokenizer, retain.texts) if weight else []
    if weight and not rows:
        raise ValueError("the retain set holds neither facts nor texts: give some or set retain_weight=0")
    return rows


def _loop(
    run: _Run, rows: Sequence[Row], kept: Sequence[Row], objective: Objective, schedule: Schedule, order: random.Random
) -> tuple[int, str]:
    """Train; the number of steps taken and the rule that ended them."""
    optimizer = torch.optim.AdamW(run.weights, lr=schedule.lr, weight_decay=schedule.weight_decay)
    forget_loss = objective.forget(run.score(rows))
    size = schedule.batch_size
    batches, retain_batches = shuffled(len(rows), size, order), shuffled(len(kept), size, order)
    per_epoch = -(-len(rows) // size)
    for step in _progress(schedule.epochs * per_epoch):
        scores = run.forward(rows, next(batches))
        run.last = {"forget_nll": nll(scores).item()}
        loss = objective.forget_weight * forget_loss(scores)
        run.last["forget_loss"] = loss.item()
        if kept:
            retained = nll(run.forward(kept, next(retain_batches)))
            run.last["retain_nll"] = retained.item()
            loss = loss + objective.retain_weight * retained
        _step(run, optimizer, loss, schedule.clip)
        ends_epoch = (step + 1) % per_epoch == 0
        if ends_epoch and schedule.stop_recall is not None:
            recall = run.score(rows).exact.float().mean().item()
            if recall <= schedule.stop_recall:
                return step + 1, "stop_recall"
    return schedule.epochs * per_epoch, "epochs"


def _step(run: _Run, optimizer: torch.optim.Optimizer, loss: Tensor, clip: float) -> None:
    if not torch.isfinite(loss):
        raise ValueError(f"the loss became {loss.item()} (last: {run.last}): lower lr or set a stopping bound")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.weights, clip)
    optimizer.step()
    run.n_backward += len(run.last) - 1


def _progress(steps: int) -> Iterator[int]:
    """Step numbers with a bar on stderr, shown once training has taken two seconds."""
    from tqdm import tqdm

    yield from tqdm(range(steps), desc="training", unit="step", delay=2, leave=False)
