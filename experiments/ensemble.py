"""Models that answer together: the aggregation of sharded training (SISA, arXiv 1912.03817) for language models.

SISA's constituents vote, or their prediction vectors are averaged. Here it is the mean of next-token log-probabilities
or of probabilities, so that every score that is read from logits is defined. The mean of
log-probabilities lets each constituent veto what it does not know; the mean of probabilities keeps what one of them
knows well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.model.bridge import Model

Mean = Literal["logprob", "probability"]


@dataclass(frozen=True)
class Ensemble(Model):
    """Constituents that answer together, for functions that read logits only (hooks and weights are the first's). Made
    by `join`."""

    others: tuple[Model, ...] = ()
    mean: Mean = "logprob"

    def logits(self, ids: Int[Tensor, "batch pos"], mask: Tensor | None = None) -> Float[Tensor, "batch pos d_vocab"]:
        """Mean over constituents of log-probabilities, or log of the mean of their probabilities, nats."""
        found = [Model.logits(self, ids, mask), *(model.logits(ids, mask) for model in self.others)]
        stacked = torch.stack([logits.float().log_softmax(-1) for logits in found])
        return stacked.mean(0) if self.mean == "logprob" else stacked.logsumexp(0) - math.log(len(found))


def join(models: Sequence[Model], mean: Mean = "logprob") -> Ensemble:
    """Models of one tokenizer as one that answers for them all.

    Raises:
        ValueError: no model, or an unknown mean.
    """
    if not models:
        raise ValueError("an ensemble needs at least one constituent")
    if mean not in get_args(Mean):
        raise ValueError(f"unknown mean {mean!r}; choose from {', '.join(get_args(Mean))}")
    parts: dict[str, Any] = {part.name: getattr(models[0], part.name) for part in fields(Model)}
    parts["name"] = " + ".join(model.name for model in models)
    return Ensemble(**parts, others=tuple(models[1:]), mean=mean)
