"""AdaptiveRmu: Rmu whose random vector is as long as the states it replaces, times a factor.

Paper:    Dang, Pham, Thanh-Tung and Inoue 2024, On Effects of Steering Latent Representation for Large Language Model
          Unlearning, arXiv 2408.06223.
Changes:  as Rmu: the MLP output matrices of `layers`.
Needs:    the untrained model's states of each forget and retained batch: two forward passes that end at the layer.
Differs:  as Rmu. The norm of a sample is the mean norm over its tokens but the first. `norm="first_batch"` is what the
          code does, with the first rows in the order of the facts (the code: the first batch drawn) and before the
          first step.
Fails:    as Rmu.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods.rmu import mean_norm, steer_to, steered, written_out
from mech_unlearn.methods.writing import keys
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import BatchScores
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.state_losses import held, random_direction, row_norms, state_mse, states_of
from mech_unlearn.training.training import reported, require_positive, trained_edit

Norm = Literal["per_sample", "first_batch"]


@dataclass(frozen=True, kw_only=True)
class AdaptiveRmu:
    """Settings of the training; `fit` runs it."""

    layer: int | None = None
    """Layer whose resid_post is steered; None is the last of `keys.default_layers`."""
    layers: tuple[int, ...] | None = None
    """Layers whose MLP output matrices are trained; None is `layer` - 2 to `layer`."""
    beta: float = 5.0
    """Length of the vector as a multiple of the norm of the untrained model's states; 3 to 10."""
    norm: Norm = "per_sample"
    """Whose norm: that of each row ("per_sample", the paper) or of the first `batch_size` rows ("first_batch")."""
    alpha: float = 400.0
    """Weight of the squared distance of retained states to where they were; the papers take 100 to 1200."""
    texts: tuple[str, ...] = ()
    """Running texts that are to be forgotten beside the facts."""
    schedule: Schedule = Schedule(lr=1e-3, epochs=30, batch_size=4, stop_recall=0.1)
    """Chosen on SmolLM2-135M; the paper takes 500 batches of 4 at lr 5e-5 on 7B models, which leaves that one as it
    was."""
    seed: int = 0
    """Draws the vector and the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes.

        Raises:
            ValueError: nothing retained, layers above the steered one, a setting out of range, or a loss that is not
                finite.
        """
        require_positive(self, "beta", "alpha")
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be 'per_sample' or 'first_batch', got {self.norm!r}")
        layer, trained = steered(model, self.layer, self.layers)
        rows = written_out(model, forget, self.texts)
        u = random_direction(model.d_model, self.seed).to(model.device)
        per_sample = self.norm == "per_sample"
        with keys.count_forwards(model) as forwards:
            length = 0.0 if per_sample else self.beta * mean_norm(model, rows[: self.schedule.batch_size], layer)
        loss = steer_by_norm(u, self.beta) if per_sample else steer_to(length * u)
        objective = Objective(
            loss, self.alpha, retain=held, teacher=per_sample, layer=layer, logits=False, rows=rows
        )  # fmt: skip
        edit = trained_edit("adaptive_rmu", self, model, forget, retain, objective, trained, around)
        return reported(edit, forwards[0])


def steer_by_norm(
    u: Float[Tensor, " d_model"], beta: float
) -> Callable[[BatchScores], Callable[[BatchScores], Tensor]]:
    """The forget loss: `state_mse` to beta x (mean norm of the row's states before training) x u.

    Source: 2408.06223, the adaptive coefficient.
    """

    def loss(now: BatchScores) -> Tensor:
        states, before = states_of(now)
        target, steered = beta * row_norms(before, states.at)[:, None] * u, states.answer
        return state_mse(states.now[steered], target[steered], states.at[steered])

    return lambda _: loss
