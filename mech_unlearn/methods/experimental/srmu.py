"""Srmu: misdirection of those features only that matter more to forgotten than to kept texts.

Paper:    2025, Feature-Selective Representation Misdirection for Machine Unlearning, arXiv 2512.16297. Its abstract
          names the two parts, an importance map over hidden features that is renewed in training and a vector of
          misdirection with a direction of its own; the formulas here are a working definition.
Changes:  as Rmu: the MLP output matrices of `layers`.
Needs:    states of up to 256 forget and 256 retained rows before training and at every renewal, and the untrained
          model's states of each batch.
Differs:  the code was not to be had, so ratio, clipping, moving mean and gate are ours: the importance of a feature is
          its mean magnitude on forget rows over that on retained rows, clipped and scaled to mean 1; the gate is the
          importance over its maximum; the vector points from the mean forget state to the mean retained one, both of
          the untrained model. Elsewhere as Rmu. What is renewed is not in a checkpoint, which is therefore refused.
Fails:    where no feature matters to the forgotten alone, gates are all nearly open and this is Rmu with another
          vector; the difference of means holds what the texts are about, so a probe may follow it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods.rmu import steered, written_out
from mech_unlearn.methods.writing import keys
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import ordinary_positions, stream
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import BatchScores, TrainRow, answer_rows, text_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.state_losses import feature_importance, held, row_means, state_mse, states_of
from mech_unlearn.training.trainee import Trainee
from mech_unlearn.training.training import reported, require_positive, trained_edit

MOST_ROWS = 256
"""Rows of each kind that importance and means are taken over, evenly spaced."""


@dataclass(frozen=True, kw_only=True)
class Srmu:
    """Settings of the training; `fit` runs it. Layer, rate and alpha as for Rmu."""

    layer: int | None = None
    """Layer whose resid_post is steered; None is the last of `keys.default_layers`."""
    layers: tuple[int, ...] | None = None
    """Layers whose MLP output matrices are trained; None is `layer` - 2 to `layer`."""
    c: float = 2.0
    """Length of the shift of a fully open gate, as a multiple of the state's norm; 2 or 5."""
    w_max: float = 10.0
    """Bound of the ratio of magnitudes."""
    every: int = 50
    """Batches between two renewals of the importance."""
    ema: float = 0.9
    """Share of the importance so far that a renewal keeps."""
    alpha: float = 1200.0
    """Weight of the squared distance of retained states to where they were; 100 to 1200."""
    texts: tuple[str, ...] = ()
    """Running texts that are to be forgotten beside the facts."""
    schedule: Schedule = Schedule(lr=5e-5, epochs=10, batch_size=4)
    """Small models trained from scratch need lr 1e-3 to 1e-2."""
    seed: int = 0
    """Draws the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes.

        Raises:
            ValueError: nothing retained, layers above the steered one, a setting out of range, or a loss that is not
                finite.
        """
        require_positive(self, "c", "w_max", "every", "alpha")
        if not 0 <= self.ema <= 1:
            raise ValueError(f"ema={self.ema}: give a share from 0 to 1")
        layer, trained = steered(model, self.layer, self.layers)
        rows = written_out(model, forget, self.texts)
        kept = answer_rows(model.tokenizer, retain.facts) + text_rows(model, retain.texts)
        if not kept:
            raise ValueError("the retain set holds neither facts nor texts: Srmu compares forgotten with kept ones")
        with keys.count_forwards(model) as forwards:
            gates = Gates(measured(model, rows, layer), measured(model, kept, layer), self.w_max, self.every, self.ema)
        objective = Objective(
            lambda _: self._loss(gates), self.alpha, retain=held, teacher=True, layer=layer, logits=False, rows=rows
        )
        watched = replace(around, watch=gates)
        edit = trained_edit("srmu", self, model, forget, retain, objective, trained, watched)
        return reported(edit, forwards[0], gate=gates.gate.tolist())

    def _loss(self, gates: "Gates") -> Callable[[BatchScores], Tensor]:
        def loss(now: BatchScores) -> Tensor:
            states, before = states_of(now)
            target, steered = misdirected(before, gates.gate, gates.direction, self.c), states.answer
            return state_mse(states.now[steered], target[steered], states.at[steered])

        return loss


@dataclass(frozen=True, eq=False)
class Features:
    """What features are like on some rows: means over tokens, then over rows."""

    size: Float[Tensor, " d_model"]
    """Mean |h_j|."""
    mean: Float[Tensor, " d_model"]


class Gates:
    """How open each feature's gate is; called before each batch, renewed before some."""

    reason = "never"

    def __init__(self, forget: Features, kept: Features, w_max: float, every: int, ema: float) -> None:
        self.w_max, self.every, self.ema = w_max, every, ema
        self.weight = feature_importance(forget.size, kept.size, w_max)
        away = kept.mean - forget.mean
        self.direction = away / away.norm().clamp(min=1e-12)
        self.batches = 0

    @property
    def gate(self) -> Float[Tensor, " d_model"]:
        """The importance over its maximum, in [0, 1]."""
        return self.weight / self.weight.max().clamp(min=1e-12)

    def __call__(self, run: Trainee) -> bool:
        if self.batches and self.batches % self.every == 0:
            new = feature_importance(trained_size(run, run.asked), trained_size(run, run.kept), self.w_max)
            self.weight = self.ema * self.weight + (1 - self.ema) * new
        self.batches += 1
        return False

    @property
    def state(self) -> dict[str, Any]:
        return {"batches": self.batches, "weight": self.weight.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        self.batches, self.weight = state["batches"], torch.tensor(state["weight"]).to(self.weight)


def some(rows: Sequence[TrainRow]) -> list[int]:
    """At most `MOST_ROWS` rows, evenly spaced."""
    return list(range(0, len(rows), -(-len(rows) // MOST_ROWS)))


def measured(model: Model, rows: Sequence[TrainRow], layer: int) -> Features:
    """Features of resid_post after a layer of the untrained model."""
    site, chosen = Site(layer, "resid_post"), [rows[i][0] for i in some(rows)]
    sizes = torch.zeros(len(chosen), model.d_model)
    means = torch.zeros_like(sizes)
    for part in stream(model, chosen, [site], "ordinary"):
        x, at = part.at[site].float(), part.index[:, 0]
        sizes.index_add_(0, at, x.abs())
        means.index_add_(0, at, x)
    count = torch.tensor([len(places) for places in ordinary_positions(model, chosen)])[:, None]
    return Features(*((total / count).mean(0).to(model.device) for total in (sizes, means)))


@torch.no_grad()
def trained_size(run: Trainee, rows: Sequence[TrainRow], batch: int = 32) -> Float[Tensor, " d_model"]:
    """Mean |h_j| under the model in training."""
    chosen, total = some(rows), []
    for i in range(0, len(chosen), batch):
        members = chosen[i : i + batch]
        states = run.forward(rows, members, teacher=False).states
        assert states is not None
        total.append(len(members) * row_means(states.now.abs(), states.at))
    return torch.stack(total).sum(0) / len(chosen)


def misdirected(
    before: Float[Tensor, "token d_model"],
    gate: Float[Tensor, " d_model"],
    direction: Float[Tensor, " d_model"],
    c: float,
) -> Float[Tensor, "token d_model"]:
    """h0 + c ||h0|| (gate x direction): where a gate is shut, the target is the untrained state itself.

    Source: after 2512.16297; see `Differs` of the file.
    """
    return before + c * before.norm(dim=1, keepdim=True) * gate * direction
