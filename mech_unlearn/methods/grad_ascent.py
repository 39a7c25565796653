"""GradAscent: gradient ascent on the forgotten answers, and nothing else.

Paper:    Jang et al. 2022, Knowledge Unlearning, arXiv 2210.01504. The loss is minus the NLL of the forgotten answers.
Changes:  every weight, full rank; with `only="embeddings"` the input embeddings alone, everything above bit-identical;
          `first_epoch` ends after one pass over the forget rows.
Needs:    nothing beforehand; the retain set is not read.
Differs:  dropout is off, the learning rate constant without a warm-up epoch, the trained copy float32;
          answers are pushed, not whole texts; the NLL is a mean over each answer's tokens, then over rows;
          training may stop by recall on the forget rows (off by default; the paper stops by extraction likelihood).
Fails:    unbounded: run for long it takes everything along, and retained facts go with the forgotten ones early.
          `only="embeddings"` hides from tests that look at states: a suppressor below everything, whose truth is known.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.losses import ascent
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import trained_edit


@dataclass(frozen=True, kw_only=True)
class GradAscent:
    """Settings of the training; `fit` runs it. Defaults: as in open-unlearning on TOFU."""

    only: Literal["embeddings"] | None = None
    """"embeddings": train the input embeddings alone; None trains every weight."""
    first_epoch: bool = False
    """End after one pass over the forget rows, whatever `epochs` says: a model that has hardly been pushed."""
    schedule: Schedule = Schedule(lr=1e-5, epochs=10)
    seed: int = 0
    """Draws the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes.

        Raises:
            ValueError: embeddings that cannot be trained alone, a setting out of range, or a loss that is not finite.
        """
        if self.only not in (None, "embeddings"):
            raise ValueError(f"only must be 'embeddings' or None, got {self.only!r}")
        trainable = f"^{re.escape(embedding_name(model))}$" if self.only else ""
        objective = Objective(lambda _: ascent, retain_weight=0.0)
        method = replace(self, schedule=replace(self.schedule, epochs=1)) if self.first_epoch else self
        return trained_edit("grad_ascent", method, model, forget, retain, objective, trainable, around)


def embedding_name(model: Model) -> str:
    """HF name of the input embeddings.

    Raises:
        ValueError: they are also the output head, or are not to be found by name.
    """
    if getattr(model.hf.config, "tie_word_embeddings", False):
        raise ValueError(f"the embeddings of {model.name!r} are its output head too and cannot be trained alone")
    names = [
        name for name in model.held if re.search(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$", name)
    ]
    if len(names) != 1:
        raise ValueError(f"model {model.name!r}: found {len(names)} input embedding matrices by name, need one")
    return names[0]
