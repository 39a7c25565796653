"""Drift: how far a model has moved from the full one on text that has nothing to do with the forget set."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Measurement
from mech_unlearn.metrics.intervals import mean_ci
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.forward import logit_tokens
from mech_unlearn.model.tokens import buckets


def token_kl(full: Float[Tensor, "*batch d_vocab"], other: Float[Tensor, "*batch d_other"]) -> Float[Tensor, "*batch"]:
    """KL(p_full || p_other) in nats, from logits; over the tokens that both have where one vocabulary was padded."""
    shared = min(full.shape[-1], other.shape[-1])
    p, q = (logits[..., :shared].float().log_softmax(-1) for logits in (full, other))
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def general_kl(full: Model, model: Model, texts: Sequence[str], seed: int = 0) -> Measurement:
    """Mean KL(p_full || p_model) of the next token over all positions of the texts, in nats per token.

    Every real token predicts once, padding never (rows of equal length share a batch); a text is a cluster.

    Raises:
        ValueError: no texts.
    """
    if not texts:
        raise ValueError("the drift of a model needs texts to be measured on")
    rows = [full.tokenizer(text)["input_ids"] for text in texts]
    values, clusters = [], []
    for members in buckets(rows, min(8192, logit_tokens(full.hf.config.vocab_size))):
        ids = torch.tensor([rows[i] for i in members], device=full.device)
        kl = token_kl(full.logits(ids), model.logits(ids.to(model.device)).to(full.device)).cpu()
        values.append(kl.flatten())
        clusters += [i for i in members for _ in range(kl.shape[1])]
    return mean_ci(torch.cat(values), "nats per token", clusters, seed)
