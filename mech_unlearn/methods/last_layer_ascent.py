"""LastLayerAscent: gradient ascent on the forgotten answers that may only change the last decoder layer.

Paper:    Jang et al. 2022, Knowledge Unlearning (gradient ascent), arXiv 2210.01504.
          With the retain term of GradDiff (Liu, Liu and Stone 2022, arXiv 2203.12817); the confinement is ours.
Changes:  the attention, MLP and norms of the last layer, full rank. Everything below is bit-identical, so every
          state up to the last layer's input still holds the facts.
Needs:    nothing beforehand.
Differs:  confined to one layer on purpose: a suppressor whose truth is known, to test what claims to detect one; the
          retain term keeps the other facts; an answer whose NLL has passed `max_nll` is not pushed further, because
          plain ascent spends itself on answers already gone and takes the retained ones along; training stops early
          by recall on the forget rows.
Fails:    always, as a way to delete: it hides. That is what it is for.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import BatchScores
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import require_positive, trained_edit


@dataclass(frozen=True, kw_only=True)
class LastLayerAscent:
    """Settings of the training; `fit` runs it."""

    forget_weight: float = 1.0
    retain_weight: float = 1.0
    """Weight of the NLL per token on retained answers and texts; 0 is plain ascent."""
    schedule: Schedule = Schedule(lr=1e-4, epochs=20, weight_decay=0.0, stop_recall=0.1)
    max_nll: float = 6.0
    """An answer whose NLL per token (nats) exceeds this gets no more gradient; infinite is plain ascent."""
    seed: int = 0

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes to the last layer.

        Raises:
            ValueError: nothing retained, a setting out of range, or a loss that is not finite.
        """
        require_positive(self, "max_nll")
        objective = Objective(self._loss, self.retain_weight, self.forget_weight)
        layer = f"^{re.escape(last_layer(model))}"
        return trained_edit("last_layer_ascent", self, model, forget, retain, objective, layer, around)

    def _loss(self, _: BatchScores) -> Callable[[BatchScores], Tensor]:
        return lambda now: ascent_loss(now, self.max_nll)


def last_layer(model: Model) -> str:
    """What the HF names of the last decoder layer's weights begin with, dot included."""
    return f"{model.block(model.n_layers - 1)}."


def ascent_loss(scores: BatchScores, max_nll: float) -> Float[Tensor, ""]:
    """Minus the NLL per answer token (nats), mean over rows, each row counted up to `max_nll`."""
    return (scores.logprob / scores.tokens).clamp(min=-max_nll).mean()
