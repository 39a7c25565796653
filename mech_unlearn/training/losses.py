"""Losses on answers as plain functions: each is minimised, counts answer tokens only and is a mean over rows.

Inputs come from `rows.batch_scores`, which drops every position that does not predict an answer token; so no loss
here sees a prompt, a pad or an ignored label. `at` says which row of the batch a token belongs to. Log-probabilities
are in nats. Where a paper leaves it open, a row counts by the mean over its tokens and a batch by the mean over rows.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from mech_unlearn.training.rows import BatchScores

Divergence = Literal["tv", "kl", "js", "pearson"]


def mean_of_rows(values: Float[Tensor, " token"], at: Int[Tensor, " token"]) -> Float[Tensor, ""]:
    """Mean over each row's tokens, then over the rows that have any."""
    count = torch.bincount(at)
    return (values / count[at]).sum() / (count > 0).sum()


def token_logprobs(logits: Float[Tensor, "token d_vocab"], wanted: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Log-probability of each wanted token, nats."""
    return logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)


def gradient_ascent_loss(logprob: Float[Tensor, " batch"], tokens: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Minus the NLL per answer token; unbounded below.

    Source: 2210.01504.
    """
    return (logprob / tokens).mean()


def ascent(scores: BatchScores) -> Float[Tensor, ""]:
    """`gradient_ascent_loss` of a batch."""
    return gradient_ascent_loss(scores.logprob, scores.tokens)


def simnpo_loss(
    logprob: Float[Tensor, " batch"], tokens: Int[Tensor, " batch"], beta: float, delta: float
) -> Float[Tensor, ""]:
    """-(2 / beta) mean log sigmoid(beta (NLL per token - delta)); no reference model.

    The gradient's weight, 2 sigmoid(-beta (NLL - delta)), falls as the answer gets less likely.

    Source: 2410.07163; signs and factor as in open-unlearning.
    """
    return -(2 / beta) * logsigmoid(beta * (-logprob / tokens - delta)).mean()


def dpo_loss(
    wanted: Float[Tensor, " batch"],
    wanted_before: Float[Tensor, " batch"],
    unwanted: Float[Tensor, " batch"],
    unwanted_before: Float[Tensor, " batch"],
    beta: float,
) -> Float[Tensor, ""]:
    """-(2 / beta) mean log sigmoid(beta (gain of the wanted answer - gain of the unwanted one)).

    A gain is the answer's log-probability minus that of the untrained model: sums over tokens, not means.

    Source: 2305.18290, eq. 7, with the factor 2 / beta of 2404.05868.
    """
    return -(2 / beta) * logsigmoid(beta * ((wanted - wanted_before) - (unwanted - unwanted_before))).mean()


def kl_loss(
    before: Float[Tensor, "token d_vocab"], now: Float[Tensor, "token d_vocab"], at: Int[Tensor, " token"]
) -> Float[Tensor, ""]:
    """KL(untrained || trained) of the next-token distribution, nats.

    Source: 2401.06121 (KL minimisation); there over all positions, prompt and padding included.
    """
    old, new = before.log_softmax(1), now.log_softmax(1)
    return mean_of_rows((old.exp() * (old - new)).sum(1), at)


def undial_loss(
    before: Float[Tensor, "token d_vocab"],
    now: Float[Tensor, "token d_vocab"],
    wanted: Int[Tensor, " token"],
    at: Int[Tensor, " token"],
    strength: float,
) -> Float[Tensor, ""]:
    """Cross-entropy to the untrained model's distribution with `strength` taken off the answer token's logit.

    Source: 2402.10052.
    """
    target = before.scatter_add(1, wanted[:, None], before.new_full((len(wanted), 1), -strength)).softmax(1)
    return mean_of_rows(-(target * now.log_softmax(1)).sum(1), at)


def mean_probs(
    logits: Float[Tensor, "token d_vocab"], wanted: Int[Tensor, " token"], at: Int[Tensor, " token"]
) -> Float[Tensor, " batch"]:
    """Mean probability (not log) of each row's answer tokens; every row has at least one."""
    count = torch.bincount(at)
    return torch.zeros(len(count), device=logits.device).index_add(0, at, token_logprobs(logits, wanted).exp()) / count


def flat_loss(
    template: Float[Tensor, " batch"], forget: Float[Tensor, " batch"], divergence: Divergence
) -> Float[Tensor, ""]:
    """Minus a lower bound of an f-divergence between a template answer and the true one: -g(P_e) + f*(g(P_f)).

    P is the mean probability of an answer's tokens. With g and the conjugate f* of each divergence:
    tv 1/2 tanh; kl identity and exp(u - 1); js log 2 - softplus(-v) and -log(2 - e^u); pearson identity and u^2/4 + u.

    Raises:
        ValueError: no such divergence.

    Source: 2410.11143.
    """
    if divergence == "tv":
        loss = (forget.tanh() - template.tanh()) / 2
    elif divergence == "kl":
        loss = (forget - 1).exp() - template
    elif divergence == "js":
        loss = softplus(-template) + softplus(forget) - 2 * math.log(2)
    elif divergence == "pearson":
        loss = forget.square() / 4 + forget - template
    else:
        raise ValueError(f"no divergence {divergence!r}; choose from {', '.join(get_args(Divergence))}")
    return loss.mean()


def catnip_loss(
    logits: Float[Tensor, "token d_vocab"],
    wanted: Int[Tensor, " token"],
    at: Int[Tensor, " token"],
    beta: float,
    kappa: float,
) -> Float[Tensor, ""]:
    """(2 / beta) sum_t p(x_t)^kappa log(1 + (p(x_t) / r_t)^beta): sum over the answer tokens of a row, mean over rows.

    r_t is the probability of the strongest other token; it and the weight get no gradient. The gradient on log p(x_t)
    is 2 sigmoid(beta log(p / r)) p^kappa: it fades as the answer does, a brake that a weight normalised over the batch
    would not be. Towards beta = 0 weighted ascent.

    Source: after 2602.02824, whose abstract names the confidence weight and the tokens; the form is a working one.
    """
    logprob = token_logprobs(logits, wanted)
    frozen = logits.detach()
    rival = frozen.scatter(1, wanted[:, None], -math.inf).max(1).values - frozen.logsumexp(1)
    each = (kappa * logprob.detach()).exp() * softplus(beta * (logprob - rival))
    return (2 / beta) * torch.zeros(int(at.max()) + 1, device=at.device).index_add(0, at, each).mean()


def least_likely(logprob: Float[Tensor, " token"], at: Int[Tensor, " token"], share: float) -> Bool[Tensor, " token"]:
    """Marks the least likely tokens of each row: `share` of them, rounded up."""
    chosen = torch.zeros(len(at), dtype=torch.bool, device=at.device)
    for row in at.unique():
        members = (at == row).nonzero()[:, 0]
        k = math.ceil(share * len(members) - 1e-9)
        chosen[members[logprob[members].argsort(stable=True)[:k]]] = True
    return chosen


def shred_loss(
    before: Float[Tensor, "token d_vocab"],
    now: Float[Tensor, "token d_vocab"],
    wanted: Int[Tensor, " token"],
    at: Int[Tensor, " token"],
    *,
    share: float,
    top: int,
    margin: float,
    anchor: bool,
) -> Float[Tensor, ""]:
    """KL to the untrained model's distribution, with the least likely answer tokens demoted in it.

    Both distributions are restricted to `top` tokens per position: the likeliest ones of the target and, where it is
    demoted, the answer token itself, put `margin` below the lowest other logit kept unless it is lower already.
    Positions that are not demoted are pulled to the untrained distribution; with `anchor` off they are no part of the
    loss.

    Source: after 2605.07482 (selection, demotion, one top-K KL); how far to demote is ours.
    """
    top = min(top, before.shape[1])
    chosen = least_likely(token_logprobs(before, wanted), at, share)
    first = torch.where(chosen[:, None], before.scatter(1, wanted[:, None], math.inf), before)
    kept = first.topk(top, 1).indices  # where demoted, the answer token comes first
    target, found = before.gather(1, kept), now.gather(1, kept)
    demoted = target.clone()
    demoted[:, 0] = torch.minimum(target[:, 0], target[:, 1:].min(1).values - margin)
    target = torch.where(chosen[:, None], demoted, target).log_softmax(1)
    each = (target.exp() * (target - found.log_softmax(1))).sum(1)
    return mean_of_rows(each, at) if anchor else mean_of_rows(each[chosen], at[chosen])
