"""TaskVector: memorise the facts to be forgotten still better, and subtract what that changed.

Paper:    Ilharco et al. 2022, Editing Models with Task Arithmetic (forgetting by negation), arXiv 2212.04089.
Changes:  every weight (or those whose name matches `trainable`), full rank: minus `scale` x the change of fine-tuning.
Needs:    nothing beforehand; the retain set is not read.
Differs:  dropout is off, the learning rate constant without a warm-up epoch, the trained copy float32;
          answers are trained, not whole texts; no weight decay by default, which negated would make weights grow;
          the scale is given (the paper chooses it on validation data).
Fails:    where the facts are known perfectly, fine-tuning on them has next to no gradient and its direction says little
          about them; what their answers share with other facts is subtracted too.
"""

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import answer_rows, eval_chunks, nll, score_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import reported, require_positive, trained_edit


@dataclass(frozen=True, kw_only=True)
class TaskVector:
    """Settings of the training; `fit` runs it. Rates: as for the other methods."""

    scale: float = 1.0
    """How much of the change is subtracted; usually chosen between 0.05 and 1."""
    schedule: Schedule = Schedule(lr=1e-5, epochs=10, weight_decay=0.0)
    """Of the memorising."""
    trainable: str = ""
    """Regular expression for the names of the weights to train; empty matches all."""
    seed: int = 0
    """Draws the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """Minus the change that memorising makes.

        Raises:
            ValueError: nothing to train, a setting out of range, or a loss that is not finite.
        """
        require_positive(self, "scale")
        objective = Objective(lambda _: nll, retain_weight=0.0)
        learned = trained_edit("task_vector", self, model, forget, retain, objective, self.trainable, around)
        deltas = {name: negated(delta, self.scale) for name, delta in learned.deltas.items()}
        edit = replace(learned, deltas=deltas)
        rows = answer_rows(model.tokenizer, forget.facts)
        with edit.on(model):
            left = score_rows(model.hf, rows, model.tokenizer.pad_token_id or 0, model.device)
        return reported(
            edit,
            len(eval_chunks(rows, model.hf)),
            memorised_recall=learned.recipe["report"]["forget_recall"],
            forget_recall=left.exact.float().mean().item(),
        )


def negated(delta: Any, scale: float) -> Float[Tensor, "..."]:
    """Minus `scale` x a delta."""
    return -scale * (delta if isinstance(delta, Tensor) else delta.dense())
