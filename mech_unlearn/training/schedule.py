"""How long and how fast training goes: the one holder of these settings."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

RetainSampling = Literal["cyclic", "1:1", "entity"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train; a method's own numbers are the default of its field `schedule`.

    `Npo(schedule=Schedule(lr=1e-3, epochs=4))` gives all of them, `replace(Npo.schedule, lr=1e-3)` changes some; on the
    command line `--set lr=1e-3`, and `--set base.lr=1e-3` for the base of a wrapper.
    """

    lr: float
    """Step size of AdamW, constant after the warm-up; 1e-5 or so for pretrained models, 1e-4 to 1e-3 for small ones
    trained from scratch."""
    epochs: int
    """Passes over the forget rows (facts x phrasings), at the most; 0 is for methods that need not train."""
    batch_size: int = 32
    """Forget rows per step; as many retain rows go with them where a method has any."""
    micro_batch: int | None = None
    """Rows per forward and backward pass, whose gradients are added up: less memory for the same steps, up to rounding.
    None takes as many as `LOGIT_BYTES` of logits allow, all of a step's as a rule."""
    warmup: float = 0.0
    """Share of the planned steps over which the step size rises linearly from 0."""
    weight_decay: float = 0.01
    """Decoupled, as in AdamW."""
    clip: float = 1.0
    """Bound of the gradient's norm over all trained tensors."""
    stop_recall: float | None = None
    """Stop after the epoch in which at most this share of the forget rows is still answered (greedy, all tokens);
    None trains all epochs."""
    retain_sampling: RetainSampling = "cyclic"
    """"cyclic": all retain rows, one pass after the other; "1:1": as many as forget rows, drawn once; "entity": all
    of them, one row of each entity in turn, so that a batch holds as many entities as it can."""
    skip_forgotten: bool = False
    """Whether an epoch leaves out the rows that are no longer answered when it begins; none left ends training."""

    def __post_init__(self) -> None:
        if self.retain_sampling not in get_args(RetainSampling):
            raise ValueError(f"retain_sampling must be 'cyclic', '1:1' or 'entity', got {self.retain_sampling!r}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup={self.warmup}: a share of the steps, from 0 to 1")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch={self.micro_batch}: give 1 row or more, or leave it None")
        for name in ("lr", "batch_size", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.epochs < 0:
            raise ValueError(f"epochs must not be negative, got {self.epochs}")

    def ramp(self, step: int, steps: int) -> float:
        """The share of `lr` that a step (from 0) of so many takes."""
        warm = math.ceil(self.warmup * steps)
        return 1.0 if step >= warm else (step + 1) / (warm + 1)
