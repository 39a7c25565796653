"""Writing profiles into a running model: the arms of the steering test as write functions, and its two nulls."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.model.scores import Batch
from mech_unlearn.restoration.profiles.experts import Profiles, Units

Arm = Literal["amplify", "profile", "oracle", "full"]


@dataclass(frozen=True, eq=False)
class Steer:
    """One arm at one strength, as a write function for the prompts of a set of queries."""

    profiles: Profiles
    arm: Arm
    alpha: float
    fact: Int[Tensor, " query"]
    """Index into `profiles.facts` of each query."""
    donor: Int[Tensor, " fact"] | None = None
    """Whose experts and profile are written, if not the fact's own (null N2)."""
    rows: Float[Tensor, "unit d_model"] | None = None
    """Directions written along, if not the units' own (null N1)."""
    states: Float[Tensor, "query offset d_model"] | None = None
    """F's states at the subject's tokens, last first; for the arms oracle and full."""

    def __call__(self, x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Tensor:
        out = x.clone()
        fact = self.fact[batch.query]
        donor = fact if self.donor is None else self.donor[fact]
        for offset in range(self.profiles.target.shape[1]):
            position = batch.span[:, 1] - 1 - offset
            there = (position >= batch.span[:, 0]) & self.profiles.known[donor, offset]
            row = there.nonzero()[:, 0]
            if len(row):
                at = (row, position[row])
                out[at] = (x[at].float() + self._change(x[at], batch.query[row], donor[row], offset)).to(x)
        return out

    def _change(self, h: Tensor, query: Tensor, donor: Tensor, offset: int) -> Float[Tensor, "row d_model"]:
        if self.arm in ("oracle", "full"):
            assert self.states is not None, f"arm {self.arm!r} needs the full model's states"
            theirs = self.states[query, offset]
        else:
            theirs = h.float()
        if self.arm == "full":
            return self.alpha * (theirs - h.float())
        units = self.profiles.units
        now = units.read(h)
        if self.arm == "amplify":
            toward = now
        elif self.arm == "profile":
            toward = self.profiles.target[donor, offset] - now
        else:
            toward = units.read(theirs) - now
        rows = units.rows if self.rows is None else self.rows
        return (self.alpha * toward * self.profiles.chosen[donor]) @ rows


def null_rows(units: Units, used: Tensor, rate: Tensor, seed: int) -> Float[Tensor, "unit d_model"]:
    """Each used latent's decoder row replaced by that of another latent which fires as often (+-20 %, else nearest).

    The length of the row is kept. A direction is replaced by a random unit direction.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, latents = units.rows.clone(), len(units.rows) - len(units.directions)
    random_rows = torch.randn(len(units.directions), rows.shape[1], generator=generator).to(rows)
    rows[latents:] = random_rows / random_rows.norm(dim=1, keepdim=True)
    frequency = rate[:latents]
    for j in used[used < latents].tolist():
        apart = (frequency - frequency[j]).abs()
        apart[j] = torch.inf
        near = (apart <= 0.2 * frequency[j]).nonzero()[:, 0]
        pick = near[torch.randint(len(near), (1,), generator=generator)] if len(near) else apart.argmin()[None]
        other = units.rows[pick[0]]
        rows[j] = other / other.norm().clamp(min=1e-12) * units.rows[j].norm()
    return rows


def null_donors(facts: Sequence[Fact], draw: random.Random) -> Int[Tensor, " fact"]:
    """For each fact another one of the same relation and kind, about another subject with another object.

    A fact without such a partner takes any fact about another subject.
    """
    out = []
    for fact in facts:
        away = [i for i, o in enumerate(facts) if o.subject != fact.subject and o.object != fact.object]
        alike = [i for i in away if facts[i].relation == fact.relation and facts[i].kind == fact.kind]
        if not away:
            raise ValueError(f"fact {fact.id!r}: no other subject with another object to draw a null from")
        out.append(draw.choice(alike or away))
    return torch.tensor(out)
