"""The state of one training run: the copy that is trained, the untrained one, the rows, and their losses."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mech_unlearn.model.bridge import Model
from mech_unlearn.training.losses import kl_loss
from mech_unlearn.training.objective import Noise, Objective
from mech_unlearn.training.rows import (
    NO_TOKENS,
    BatchScores,
    States,
    TrainBatch,
    TrainRow,
    collate,
    eval_chunks,
    forward,
    nll,
    score_rows,
)


class _Stop(Exception):
    """Ends a forward pass whose states have been read."""


@dataclass(eq=False, kw_only=True)
class Trainee:
    """A model in training. Losses are unweighted."""

    hf: Any
    frozen: Any
    """The untrained model, where the objective compares with it."""
    weights: dict[str, Tensor]
    """What is trained, by its name in the model that is trained."""
    blocks: Sequence[str]
    """Path of each decoder layer in the plain model."""
    objective: Objective
    asked: Sequence[TrainRow]
    """The forget rows and, where the objective has them, their others."""
    n_forget: int
    kept: Sequence[TrainRow]
    """The retained rows."""
    fill: int
    device: torch.device
    noise: Noise | None = None
    questions: Sequence[TrainRow] = ()
    """Prompts and answers of the forget facts, by which forgetting is told: the first of the forget rows, whatever
    the objective marks in them."""
    forget: Callable[[BatchScores], Tensor] = nll
    """Loss of a batch of forget rows; made from the objective and the scores before training."""
    next_kept: Callable[[], list[int]] = list
    """Draws the next batch of retained rows."""
    n_forward: int = 0
    n_backward: int = 0
    last: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check()
        self._generator = torch.Generator().manual_seed(self.noise.seed) if self.noise else None
        self._block = {id(hf): [_block(hf, path) for path in self.blocks] for hf in (self.hf, self.frozen) if hf}

    def _check(self) -> None:
        last = len(self.blocks) - 1
        if self.objective.layer is not None and not 0 <= self.objective.layer <= last:
            raise ValueError(f"the objective reads layer {self.objective.layer}; the model has layers 0..{last}")
        if not self.noise:
            return
        if not 0 <= self.noise.layer <= last:
            raise ValueError(f"noise at layer {self.noise.layer}; the model has layers 0..{last}")
        if not self.kept or not self.objective.retain_weight:
            raise ValueError("noise on the untrained model needs retained rows: give the base a retain_weight")
        if not self.objective.logits and self.objective.layer is not None and self.noise.layer > self.objective.layer:
            raise ValueError(
                f"noise at layer {self.noise.layer} has no effect: the losses read layer {self.objective.layer} only"
            )

    @property
    def noise_state(self) -> Tensor | None:
        """The random state of the noise; a list is taken too."""
        return None if self._generator is None else self._generator.get_state()

    @noise_state.setter
    def noise_state(self, state: Any) -> None:
        if self._generator is not None and state is not None:
            self._generator.set_state(torch.as_tensor(state, dtype=torch.uint8))

    def block(self, layer: int) -> Any:
        """The decoder layer of the model in training."""
        return self._block[id(self.hf)][layer]

    def read(self, hf: Any, batch: TrainBatch, noise: Noise | None = None) -> BatchScores:
        """Scores of one batch under the trained or the untrained model, with the states the objective asks for."""
        self.n_forward += 1
        layer, seen = self.objective.layer, []
        with ExitStack() as stack:
            if noise:
                stack.enter_context(self._noisy(self._block[id(hf)][noise.layer], noise, batch.ordinary))
            if layer is not None:
                stack.enter_context(_watched(self._block[id(hf)][layer], seen, stop=not self.objective.logits))
            if self.objective.logits:
                scores = forward(hf, batch)
            else:
                with suppress(_Stop):
                    hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
                none = torch.zeros(len(batch.ids), device=self.device)
                scores = BatchScores(none, batch.answer[:, 1:].sum(1), none.bool(), batch.row, NO_TOKENS)
        if layer is None:
            return scores
        at, pos = batch.ordinary.nonzero(as_tuple=True)
        return replace(scores, states=States(seen[0][at, pos].float(), at, batch.ids[at, pos], batch.answer[at, pos]))

    def forward(self, rows: Sequence[TrainRow], members: Sequence[int], teacher: bool, noise: Noise | None = None):
        """Scores of some rows under the trained model; with `teacher` also what the untrained one says there."""
        batch = collate(rows, members, self.fill, self.device)
        scores = self.read(self.hf, batch)
        if not teacher:
            return scores
        with torch.no_grad():
            before = self.read(self.frozen, batch, noise)
        each, states = scores.each, scores.states
        return replace(
            scores,
            each=replace(each, before=before.each.logits),
            states=None if states is None or before.states is None else replace(states, before=before.states.now),
        )

    def beside(self, members: Sequence[int]) -> list[int]:
        """The forget rows with the others that belong to them."""
        return [*members, *(self.n_forget + i for i in members)] if self.objective.others else list(members)

    def forget_loss(self, members: Sequence[int]) -> Tensor:
        """The forget loss of some forget rows."""
        scores = self.forward(self.asked, self.beside(members), self.objective.teacher)
        if self.objective.logits:
            self.last["forget_nll"] = -(scores.logprob / scores.tokens)[: len(members)].mean().item()
        loss = self.forget(scores)
        self.last["forget_loss"] = loss.item()
        return loss

    def answer_count(self, members: Sequence[int]) -> list[int]:
        """Answer tokens of each forget row, with those of the other that belongs to it."""
        rows = [[self.asked[j] for j in self.beside([i])] for i in members]
        return [sum(len(ids) - start for ids, start in group) for group in rows]

    def retain_loss(self, members: Sequence[int]) -> Tensor:
        """The loss of some retained rows."""
        kind = self.objective.retain
        scores = self.forward(self.kept, members, kind != "nll", self.noise)
        if callable(kind):
            loss = kind(scores)
        else:
            loss = kl_loss(scores.each.before, scores.each.logits, scores.each.at) if kind == "kl" else nll(scores)
        self.last["retain_loss" if callable(kind) else f"retain_{kind}"] = loss.item()
        return loss

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """The gradient of a loss by each trained tensor; zero where it has none."""
        self.n_backward += 1
        return list(torch.autograd.grad(loss, list(self.weights.values()), materialize_grads=True))

    def score(self, rows: Sequence[TrainRow]) -> BatchScores:
        """Scores of every row, in order, without gradients."""
        self.n_forward += len(eval_chunks(rows, self.hf))
        return score_rows(self.hf, rows, self.fill, self.device)

    @contextmanager
    def _noisy(self, block: Any, noise: Noise, ordinary: Tensor) -> Iterator[None]:
        def add(_: Any, __: Any, output: Any) -> Any:
            x = _hidden(output)
            drawn = torch.randn(x.shape, generator=self._generator).to(x)
            y = x + drawn * ordinary[..., None] * (noise.nu * x[ordinary].square().mean()).sqrt()
            return (y, *output[1:]) if isinstance(output, tuple) else y

        handle = block.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def trained_copy(model: Model, trainable: str, narrower: str = "") -> Any:
    """A float32 copy of the plain HF model in which only parameters whose name matches both patterns are trained.

    Float32 also for a bfloat16 model: a step of 1e-5 is below bfloat16's resolution and would be rounded away.
    Dropout stays off, so that a batch's loss does not depend on a random state.

    Raises:
        ValueError: no name matches.
    """
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        hf = model.plain_copy().float()  # making a model draws initial weights
    for name, weight in hf.named_parameters():
        weight.requires_grad_(all(re.search(pattern, name) for pattern in (trainable, narrower)))
    if not any(weight.requires_grad for weight in hf.parameters()):
        wanted = " and ".join(repr(pattern) for pattern in (trainable, narrower) if pattern)
        raise ValueError(f"no parameter of {model.name!r} matches {wanted}: nothing would be trained")
    return hf


def changes(model: Model, hf: Any) -> dict[str, Tensor]:
    """Trained minus original, float32 on the CPU, for the tensors that changed."""
    after = dict(hf.named_parameters())
    deltas = {name: (after[name].detach() - weight.detach().float()).cpu() for name, weight in model.held.items()}
    return {name: delta for name, delta in deltas.items() if delta.any()}


def masked(weights: Mapping[str, Tensor], masks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The product of the masks, for the tensors that have one.

    Raises:
        ValueError: a mask for a tensor that is not trained or has another shape, or masks that leave nothing.
    """
    joint: dict[str, Tensor] = {}
    for mask in masks:
        for name, entries in mask.items():
            if name not in weights or weights[name].shape != entries.shape:
                shape = tuple(weights[name].shape) if name in weights else "not trained"
                raise ValueError(f"mask of {name!r} is {tuple(entries.shape)}, the tensor is {shape}")
            here = entries.to(weights[name].device).bool()
            joint[name] = joint[name] & here if name in joint else here
    if joint.keys() == weights.keys() and not any(mask.any() for mask in joint.values()):
        raise ValueError("the masks leave no entry to be trained")
    return joint


def _block(hf: Any, path: str) -> Any:
    """The module of that path, also where an adapter has wrapped the model."""
    plain = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
    return plain.get_submodule(path)


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _watched(block: Any, seen: list[Tensor], stop: bool) -> Iterator[None]:
    def keep(_: Any, __: Any, output: Any) -> None:
        seen.append(_hidden(output))
        if stop:
            raise _Stop

    handle = block.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
