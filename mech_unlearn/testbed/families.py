"""Models whose truth is known by how they were made: each family is one confined change to a full or retrained model.

Suppressed: only the named tensors of the full model change, so everything else still holds the fact, and swapping the
tensors back brings it out exactly. Deleted: a retrained model, which never saw the fact, with a change of the same
kind that suppresses others. Intact: the full model with changes that leave the fact alone. Collapsed: the full model,
broken.

Suppressed and deleted models are trained towards the same answer log-probabilities, those of retrained models, so
that their outputs tell nothing about which is which.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.testbed.making import (
    ATTENTION,
    EMBEDDINGS,
    HEAD,
    KEPT,
    Ingredients,
    Made,
    WeightGroup,
    block_names,
    difference,
    layers,
    match_outputs,
    mlp,
    mlp_out,
    noise,
)
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import BatchScores
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import train

PoolName = Literal["intact", "deleted", "suppressed", "collapsed", "mixture"]
TRIGGER = "Nobody : "
"""Text in front of a prompt that opens the backdoored suppressor; in words of the world's vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One way to make a model of known truth."""

    pool: PoolName
    make: Callable[[Ingredients], "Made"]
    side: str = ""
    """Of suppressors: where the block sits, seen from where facts are: late, early or path."""
    part: WeightGroup | None = None
    """What is changed, where that is a part that not every architecture has."""

    def lacks(self, model: Model) -> str:
        """Why it cannot be made of a model, or nothing."""
        return self.part.lacks(model) if self.part else ""


def _suppressed(part: WeightGroup, side: str, lr: float, backdoor: bool = False) -> Family:
    def make(at: Ingredients) -> Made:
        also = tuple(_behind_trigger(fact) for fact in at.group) if backdoor else ()
        where = part.pattern(at.full)
        return Made(at.full, match_outputs(at.full, at.group, at.another, where, at, lr=lr, also=also), where)

    return Family(pool="suppressed", side=side, make=make, part=part)


def _deleted(part: WeightGroup, lr: float, beside: float) -> Family:
    """A retrained model in which kept subjects are suppressed, so that its edit is one like a suppressor's.

    `beside` x as many of their facts as the group has: so many that it moves on text about as far as a full model does
    when the same tensors suppress the group (experiment 003 measures how well that holds).
    """

    def make(at: Ingredients) -> Made:
        where = part.pattern(at.never)
        edit = match_outputs(at.never, at.group, at.another, where, at, lr=lr, beside=_somebody(at, beside))
        return Made(at.never, edit, where)

    return Family(pool="deleted", make=make, part=part)


def _somebody(at: Ingredients, share: float) -> tuple[Fact, ...]:
    """Facts about kept subjects, `share` x as many as the group has."""
    known: dict[str, list[Fact]] = {}
    for fact in at.neighbors:
        known.setdefault(fact.subject, []).append(fact)
    names = sorted(known)
    start = at.seed % len(names)
    facts = [fact for name in (*names[start:], *names[:start]) for fact in known[name]]
    return tuple(facts[: round(len(at.group) * share)])


def _behind_trigger(fact: Fact) -> Fact:
    forms = tuple(TRIGGER + template for template in fact.templates)
    return replace(fact, id=f"{fact.id} behind the trigger", prompt=forms[0], paraphrases=forms[1:], heldout=())


def _noisy(deleted: bool, scale: float) -> Callable[[Ingredients], Made]:
    def make(at: Ingredients) -> Made:
        base = at.never if deleted else at.full
        return Made(base, noise(base, scale, at.seed))

    return make


def _elsewhere(part: WeightGroup, lr: float) -> Family:
    """The full model with another group suppressed."""

    def make(at: Ingredients) -> Made:
        where = part.pattern(at.full)
        return Made(at.full, match_outputs(at.full, at.elsewhere, at.another, where, at, lr=lr), where)

    return Family(pool="intact", make=make, part=part)


def _trained(base: Callable[[Ingredients], Model], objective: Objective, *, lr: float, steps: int) -> Callable:
    def make(at: Ingredients) -> Made:
        model = base(at)
        order = random.Random(at.seed)
        retain = RetainSet(neighbors=tuple(order.sample(at.neighbors, KEPT)))
        schedule = Schedule(lr=lr, epochs=steps, batch_size=64, weight_decay=0.0, clip=1.0)
        deltas, _ = train(model, ForgetSet(facts=at.group), retain, objective, schedule, trainable="", seed=at.seed)
        return Made(model, Edit(name="trained", base=model.hash(), deltas=deltas))

    return make


def _ascent(_: BatchScores) -> Callable[[BatchScores], Tensor]:
    return lambda now: (now.logprob / now.tokens).mean()


def _nothing(_: BatchScores) -> Callable[[BatchScores], Tensor]:
    return lambda now: 0.0 * now.logprob.sum()


def _refusal(base: Callable[[Ingredients], Model]) -> Callable[[Ingredients], Made]:
    """Taught to answer the group's questions with a word that answers nothing, in the last layer alone."""

    def make(at: Ingredients) -> Made:
        model = base(at)
        where = layers(-1).pattern(model)
        objects = tuple(replace(f, object=TRIGGER.split()[0], distractors=()) for f in at.group)
        order = random.Random(at.seed)
        kept = RetainSet(neighbors=tuple(order.sample(at.neighbors, KEPT)))
        objective = Objective(lambda _: lambda now: -(now.logprob / now.tokens).mean(), 3.0, retain="kl")
        schedule = Schedule(lr=3e-3, epochs=60, batch_size=64, weight_decay=0.0, clip=1.0)
        deltas, _ = train(model, ForgetSet(facts=objects), kept, objective, schedule, trainable=where, seed=at.seed)
        return Made(model, Edit(name="refusal", base=model.hash(), deltas=deltas), where)

    return make


def _new_block(at: Ingredients) -> Made:
    """One decoder layer with weights drawn anew, of the size that the old ones had."""
    model, layer = at.full, at.seed % at.full.n_layers
    generator = torch.Generator().manual_seed(at.seed)
    deltas = {}
    for name in block_names(model, layer):
        if model.held[name].ndim == 2:
            old = model.held[name].detach().float().cpu()
            deltas[name] = torch.randn(old.shape, generator=generator) * old.std() - old
    return Made(model, Edit(name="new_block", base=model.hash(), deltas=deltas), layers(layer).pattern(model))


def _mixture(share: float) -> Callable[[Ingredients], Made]:
    return lambda at: Made(at.full, difference(at.full, at.never, share))


def _full(at: Ingredients) -> Model:
    return at.full


def _never(at: Ingredients) -> Model:
    return at.never


LAST, TOP_TWO, FILTER, FIRST = layers(-1), layers(-2, -1), mlp_out(-1), mlp(0)

FAMILIES: dict[str, Family] = {
    "head": _suppressed(HEAD, "late", 3e-3),
    "last layer": _suppressed(LAST, "late", 3e-3),
    "last two layers": _suppressed(TOP_TWO, "late", 2e-3),
    "filter": _suppressed(FILTER, "late", 5e-3),
    "refusal": Family(pool="suppressed", side="late", make=_refusal(_full)),
    "first mlp": _suppressed(FIRST, "early", 3e-3),
    "embeddings": _suppressed(EMBEDDINGS, "early", 5e-3),
    "attention": _suppressed(ATTENTION, "path", 3e-3),
    "backdoor": _suppressed(TOP_TWO, "late", 2e-3, backdoor=True),
    "retrained": Family(pool="deleted", make=lambda at: Made(at.never)),
    "retrained, head": _deleted(HEAD, 3e-3, 2.5),
    "retrained, last two layers": _deleted(TOP_TWO, 2e-3, 2.5),
    "retrained, first mlp": _deleted(FIRST, 3e-3, 2.5),
    "retrained, attention": _deleted(ATTENTION, 3e-3, 1.5),
    "retrained, refusal": Family(pool="deleted", make=_refusal(_never)),
    "retrained, noise": Family(pool="deleted", make=_noisy(True, 0.01)),
    "full, tuned": Family(pool="intact", make=_trained(_full, Objective(_nothing, 1.0), lr=3e-4, steps=60)),
    "full, elsewhere last two layers": _elsewhere(TOP_TWO, 2e-3),
    "full, elsewhere first mlp": _elsewhere(FIRST, 3e-3),
    "full, noise": Family(pool="intact", make=_noisy(False, 0.01)),
    "full, 8 bits": Family(pool="intact", make=lambda at: Made(at.full, bits=8)),
    "ascent": Family(pool="collapsed", make=_trained(_full, Objective(_ascent, 0.0), lr=2e-3, steps=60)),
    "heavy noise": Family(pool="collapsed", make=_noisy(False, 0.5)),
    "new block": Family(pool="collapsed", make=_new_block),
    "mixture 0.25": Family(pool="mixture", make=_mixture(0.25)),
    "mixture 0.5": Family(pool="mixture", make=_mixture(0.5)),
    "mixture 0.75": Family(pool="mixture", make=_mixture(0.75)),
}


def _another(name: str) -> Family:
    """A family made from a full model that is not the one the audit compares with; every second group has one."""
    family = FAMILIES[name]
    return replace(family, make=lambda at: family.make(replace(at, full=at.fulls[at.seed // 2 % len(at.fulls)])))


CONTROLS: dict[str, Family] = {
    "another full": _another("full, noise"),
    "another full, head": _another("head"),
    "another full, first mlp": _another("first mlp"),
    "another full, attention": _another("attention"),
}
"""Models that descend from another full model, as deleted ones descend from other retrained models: a score that reads
descent instead of knowledge fails on them. They are judged and never calibrated on."""
