"""What acts on training beside the loss: what wrappers change, and what looks on, attacks or pulls back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit, LowRank
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.objective import Noise, RetainLoss
from mech_unlearn.training.trainee import Trainee

Attack = Callable[[], AbstractContextManager]
"""Puts a perturbation in force that was found before."""


@dataclass(frozen=True, eq=False)
class Adversary:
    """Training under attack."""

    attack: Callable[[Trainee, Sequence[int]], Attack]
    """From a batch of forget rows to a perturbation under which their loss is taken."""
    repeats: int = 1
    """Optimiser steps on each batch, under the same perturbation."""


@runtime_checkable
class Watcher(Protocol):
    """Looks at training before each batch; may renew what the losses read, and may end it."""

    reason: str
    """What is reported as the rule that ended training."""

    def __call__(self, run: Trainee) -> bool:
        """Whether training ends here."""
        ...

    @property
    def state(self) -> Any:
        """What it remembers, as JSON values; kept in checkpoints."""
        ...

    def restore(self, state: Any) -> None:
        """Go on where `state` was taken."""
        ...


@runtime_checkable
class Adapter(Protocol):
    """Trains something else in place of the weights, for example low-rank factors."""

    def attach(self, hf: Any) -> Any:
        """The model with what is to be trained in place of the weights that require a gradient; nothing else does."""
        ...

    def merge(self, hf: Any) -> Any:
        """The plain model with its own parameter names, the trained change added to its weights."""
        ...

    def factors(self) -> Mapping[str, LowRank]:
        """What was merged, by the weight's name, where it is known exactly; empty before."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Around:
    """What acts on training beside its loss, from the method itself or from wrappers; each part may be left out."""

    trainable: str = ""
    """Only parameters whose name matches this, too, are trained."""
    masks: tuple[Callable[[Trainee], Mapping[str, Tensor]], ...] = ()
    """From the state before the first step to 0/1 per entry of trained tensors (all of a tensor left out). An entry
    that is 0 in any mask keeps its value bit by bit."""
    direct: (
        Callable[[Trainee, Sequence[Tensor], torch.optim.Optimizer, Mapping[str, Tensor]], Sequence[Tensor]] | None
    ) = None
    """From the gradients of the forget term, already masked, to those used in their place; the retain term's are added
    afterwards. The last argument is the masks of the tensors that have one."""
    retained: bool = False
    """Whether retained rows are needed although the method gives them no weight."""
    penalty: Callable[[Trainee], Tensor] | None = None
    """A further term that reads the weights, for example a distance from where they began."""
    adversary: Adversary | None = None
    watch: Watcher | None = None
    adapter: Adapter | None = None
    retain: RetainLoss | None = None
    """The retain loss in place of the method's own, where that is "nll"."""
    noise: Noise | None = None
    checkpoint: Path | None = None
    """File in which the state of training is kept; training that was interrupted goes on from it, bit by bit."""
    checkpoint_seconds: float = 60.0
    """Least time between two writes."""
    label: str = ""
    """What the wrappers are, for the checkpoint to be recognised by."""


PLAIN = Around()


@runtime_checkable
class Trains(Protocol):
    """A method that trains and may therefore be wrapped."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit: ...


def masked_gradients(names: Iterable[str], gradients: Sequence[Tensor], masks: Mapping[str, Tensor]) -> list[Tensor]:
    """Gradients of the tensors of these names, zero where a mask is."""
    return [g * masks[name] if name in masks else g for name, g in zip(names, gradients, strict=True)]
