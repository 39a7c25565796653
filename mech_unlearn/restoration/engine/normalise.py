"""From raw scores to the common scale: 0 = a model that never saw the fact, 1 = the full model.

Without retrained models the level and the gain of "never saw it" are read off *sham* facts: same subject, same
relation, but an object drawn from the distractors, which was never trained (grade B evidence). The true object is
not among a sham fact's distractors, so the full model's strong belief in it does not enter. Shams put scores on the
scale; they are no null of what a test says of a model that never knew: no verdict rests on them (`verdict.py`).
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.model.tokens import Query

MIN_GAP = 0.5
"""Nats of margin between full and retrained below which a fact cannot be tested."""


def kappa(
    unlearned: Float[Tensor, " fact"], full: Float[Tensor, " fact"], retrained: Float[Tensor, "retrained fact"]
) -> Float[Tensor, " fact"]:
    """(s(U) - mean s(R)) / (s(F) - mean s(R)), unclipped; NaN where full and retrained are closer than 1e-6."""
    base = retrained.mean(0)
    gap = full - base
    return torch.where(gap.abs() > 1e-6, (unlearned - base) / gap, torch.nan)


def gains(
    before: Float[Tensor, "*any fact"], after: Float[Tensor, "*point fact"], base: Float[Tensor, " fact"]
) -> Float[Tensor, "*point fact"]:
    """max(s(A(M)), base) - max(s(M), base): what an operator A gives to a model M above never having known the fact.

    Climbing from below back to that level is the end of a grudge against one answer, not the return of knowledge,
    and falling below it is no less knowledge; both count as nothing.
    """
    return torch.maximum(after, base) - torch.maximum(before, base)


def rho(
    gain: Float[Tensor, "*point fact"],
    injected: Float[Tensor, "*point fact"],
    full: Float[Tensor, " fact"],
    base: Float[Tensor, " fact"],
) -> Float[Tensor, "*point fact"]:
    """Difference in differences: what an operator gives back to U beyond what it injects into any model, in [0, 1].

    rho = clip((gain - injected) / (s(F) - base), 0, 1), where base is mean_k s(R_k) and injected the mean gain of the
    R_k. NaN where s(F) - base is below 0.5 nat.
    """
    gap = full - base
    return torch.where(gap >= MIN_GAP, ((gain - injected) / gap.clamp(min=MIN_GAP)).clamp(0, 1), torch.nan)


def relation_mean(values: Float[Tensor, "*point fact"], facts: Sequence[Fact]) -> Float[Tensor, "*point fact"]:
    """Each value replaced by the mean over the facts of its relation."""
    names = [fact.relation for fact in facts]
    index = torch.tensor([names.index(name) for name in names])
    total = torch.zeros_like(values).index_add(-1, index, values)
    count = torch.bincount(index, minlength=len(facts)).clamp(min=1)
    return (total / count)[..., index]


def sham_facts(facts: Sequence[Fact], seed: int) -> tuple[Fact, ...]:
    """For each fact a false one, never trained: same subject and relation, its object drawn from the distractors.

    The sham's distractors are the fact's other distractors; the true object is left out.

    Raises:
        ValueError: a fact with fewer than two distractors.
    """
    draw = random.Random(seed)
    shams = []
    for fact in facts:
        if len(fact.distractors) < 2:
            raise ValueError(f"fact {fact.id!r} has fewer than two distractors; without retrained models it needs them")
        chosen = draw.choice(fact.distractors)
        shams.append(replace(fact, object=chosen, distractors=tuple(d for d in fact.distractors if d != chosen)))
    return tuple(shams)


def is_testable(
    full_margin: Float[Tensor, " fact"],
    full_choice: Float[Tensor, " fact"],
    retrained_margin: Float[Tensor, "retrained fact"],
    retrained_choice: Float[Tensor, "retrained fact"],
    candidates: Float[Tensor, " fact"],
) -> Bool[Tensor, " fact"]:
    """Whether a fact can be tested at all: full knows it and retrained models do no better than guess.

    Full - retrained margin >= 0.5 nat; full prefers the true object on at least 75 % of the phrasings; retrained
    models prefer it no more often than chance + 2 SE, and not always (with one retrained model or few candidates that
    bound reaches 1), where there is a second candidate. The phrasings of one fact agree with each other, so the SE
    counts models, not phrasings: sqrt(p (1 - p) / number of retrained models).
    """
    chance, chosen = 1 / candidates, retrained_choice.mean(0)
    slack = 2 * (chance * (1 - chance) / len(retrained_choice)).sqrt()
    gap = full_margin - retrained_margin.mean(0)
    guess = (chosen <= chance + slack + 1e-6) & ((chosen < 1 - 1e-6) | (candidates < 2))
    return (gap >= MIN_GAP) & (full_choice >= 0.75) & guess


def mean_by_fact(values: Float[Tensor, "*other query"], queries: Sequence[Query], facts: Sequence[Fact]) -> Tensor:
    """The mean over the phrasings of each fact, on the last axis."""
    order = {fact.id: i for i, fact in enumerate(facts)}
    index = torch.tensor([order[query.fact.id] for query in queries])
    total = torch.zeros(*values.shape[:-1], len(facts)).index_add(-1, index, values.float())
    return total / torch.bincount(index, minlength=len(facts))
