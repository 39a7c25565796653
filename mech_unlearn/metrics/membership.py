"""Scores of texts that tell members from others: Min-K% and Min-K%++, and PrivLeak from their AUC."""

import zlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.model.asking import split_templates
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import buckets, encode_all

K = 0.4
"""Share of the tokens that Min-K % reads. Source: MUSE, arXiv 2407.06460 (40 %)."""


VARIANCE_FLOOR = 1e-6


BATCH_TOKENS = 512
"""Tokens whose next-token distributions are held at once: for 256,000 tokens 0.5 GB of float32, a few times."""


def min_k(logprobs: Float[Tensor, " token"], share: float = K) -> Float[Tensor, ""]:
    """Minus the mean of the lowest floor(share x T) log-probabilities, at least one; nats."""
    count = max(1, int(share * len(logprobs)))
    return -logprobs.sort().values[:count].mean()


def min_k_pp(
    logprobs: Float[Tensor, " token"],
    mean: Float[Tensor, " token"],
    variance: Float[Tensor, " token"],
    share: float = K,
) -> Float[Tensor, ""]:
    """Min-K % of (log p - mu) / sigma, mu and sigma^2 of log p under the model's own next-token distribution."""
    return min_k((logprobs - mean) / variance.clamp(min=VARIANCE_FLOOR).sqrt(), share)


def privleak(auc_unlearned: float, auc_retrained: float) -> float:
    """100 (A_U - A_R) / A_R with A = 1 - AUC. Source: MUSE, arXiv 2407.06460."""
    return 100 * (auc_retrained - auc_unlearned) / max(1 - auc_retrained, 1e-6)


@torch.no_grad()
def text_scores(model: Model, texts: Sequence[str]) -> dict[str, Float[Tensor, " text"]]:
    """loss, zlib, min_k and min_k_pp of each text; higher = less like a member."""
    rows = [encoding.ids for encoding in (encode_all(model.tokenizer, texts)[text] for text in texts)]
    out = {name: torch.zeros(len(texts)) for name in ("loss", "zlib", "min_k", "min_k_pp")}
    for members in buckets(rows, BATCH_TOKENS):
        ids: Int[Tensor, "row pos"] = torch.tensor([list(rows[i]) for i in members], device=model.device)
        table = model.logits(ids)[:, :-1].float().log_softmax(-1)
        logprob = table.gather(2, ids[:, 1:, None])[..., 0].cpu()
        mean = (table.exp() * table).sum(-1)
        variance = (table.exp() * table.square()).sum(-1) - mean.square()
        for row, i in enumerate(members):
            loss = -logprob[row].mean()
            out["loss"][i] = loss
            out["zlib"][i] = loss / len(zlib.compress(texts[i].encode()))
            out["min_k"][i] = min_k(logprob[row])
            out["min_k_pp"][i] = min_k_pp(logprob[row], mean[row].cpu(), variance[row].cpu())
    return out


def statement(fact: Fact) -> str:
    """The fact said in its first TEST phrasing."""
    return fact.stated(split_templates(fact, "test")[0])
