"""Models that answer together: the aggregation of sharded training (SISA, arXiv 1912.03817) for language models.

SISA's constituents vote, or their prediction vectors are averaged. Here it is the mean of next-token log-probabilities
or of probabilities, so that every score that is read from logits is defined. The mean of
log-probabilities lets each constituent veto what it does not know; the mean of probabilities keeps what one of them
knows well.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch

from mech_unlearn.model.bridge import Model
from mech_unlearn.model.load import load

Mean = Literal["logprob", "probability"]


def join(models: Sequence[Model], mean: Mean = "logprob") -> Model:
    """Models of one tokenizer as one that answers for them all, for functions that read logits only: hooks and weights
    are those of a copy of the first, whose forward pass gives the mean of log-probabilities, or the log of the mean of
    probabilities, nats.

    Raises:
        ValueError: no model, or an unknown mean.
    """
    if not models:
        raise ValueError("an ensemble needs at least one constituent")
    if mean not in get_args(Mean):
        raise ValueError(f"unknown mean {mean!r}; choose from {', '.join(get_args(Mean))}")
    first = load(models[0].plain_copy(), tokenizer=models[0].tokenizer)
    own = first.hf.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        found = [out.logits, *(model.hf(*args, **kwargs).logits for model in models[1:])]
        stacked = torch.stack([logits.float().log_softmax(-1) for logits in found])
        out.logits = stacked.mean(0) if mean == "logprob" else stacked.logsumexp(0) - math.log(len(found))
        return out

    object.__setattr__(first.hf, "forward", forward)
    return replace(first, name=" + ".join(model.name for model in models))
