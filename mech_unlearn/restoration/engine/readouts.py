"""What read-outs with a choice of place share: the place is chosen on TUNE, scores stand between retrained and full.

A read-out gives each model a score per *point* (a layer, or a layer and a position) and fact, on TUNE and on TEST
phrasings, and changes nothing in the model, so that there is no gain to subtract: kappa = (s(U) - mean s(R)) / (s(F)
- mean s(R)) at each point. Of the points that full reads well, the one with the largest pooled kappa on TUNE is
reported on TEST. Held-out retrained models choose their own point in the same way, so that the null contains what
choosing gains.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.model.bridge import Model
from mech_unlearn.restoration.engine.case import Case, make_result
from mech_unlearn.verdict.result import Result

READABLE = 0.25
"""Share of the largest gap between full and retrained that a point needs to be chosen."""
NEAR = 0.05
"""Difference of two points' shares below which the one that more facts can be read at is taken."""


@dataclass(frozen=True, eq=False)
class Read:
    """What one model scores at each point; NaN where there is nothing to be read."""

    tune: Float[Tensor, "point tune_fact"]
    test: Float[Tensor, "point fact"]


@dataclass(frozen=True, eq=False)
class ReadLevels:
    """The scores of the full and the retrained models; in grade B those of stand-ins for the latter."""

    points: tuple[str, ...]
    """The places, in words."""
    layers: tuple[int, ...]
    """The layer of each point."""
    full: Read
    never: tuple[Read, ...]
    min_gap: float
    """Score between full and retrained below which a point says nothing about a fact."""


def kappa_at(
    found: Float[Tensor, "point fact"],
    full: Float[Tensor, "point fact"],
    never: Float[Tensor, "point fact"],
    gap: float,
) -> Float[Tensor, "point fact"]:
    """kappa at each point, unclipped; NaN where full is less than `gap` above retrained."""
    room = full - never
    return torch.where(room >= gap, (found - never) / room.clamp(min=gap), torch.nan)


def choose_place(
    found: Float[Tensor, "point tune_fact"],
    full: Float[Tensor, "point tune_fact"],
    never: Float[Tensor, "point tune_fact"],
) -> int:
    """The point where the sum over facts of s(U) - s(R) is the largest share of that of s(F) - s(R).

    Only points count whose gap between full and retrained, summed over facts, is a quarter of the largest one at least:
    where full itself reads little, the share is noise. Of shares that are nearly the largest, that with the widest gap.
    """
    room = (full - never).nan_to_num().sum(1)
    share = (found - never).nan_to_num().sum(1) / room.clamp(min=1e-9)
    readable = (room >= READABLE * room.max()) & (room > 0)
    if not readable.any():
        return int(room.argmax())
    share = torch.where(readable, share, -torch.inf)
    return int(torch.where(share >= share.max() - NEAR, room, -torch.inf).argmax())


def _never(reads: Sequence[Read]) -> Read:
    return Read(torch.stack([r.tune for r in reads]).mean(0), torch.stack([r.test for r in reads]).mean(0))


def _placed(levels: ReadLevels, read: Read, others: Sequence[Read]) -> tuple[int, Float[Tensor, "point fact"]]:
    """(The point chosen on TUNE, kappa on TEST at every point)."""
    base = _never(others)
    return choose_place(read.tune, levels.full.tune, base.tune), kappa_at(
        read.test, levels.full.test, base.test, levels.min_gap
    )


def place_null(levels: ReadLevels) -> Float[Tensor, "heldout fact"]:
    """Recoverability of each retrained model against the others, each at the point that it chooses itself."""
    rows = []
    for k, read in enumerate(levels.never if len(levels.never) > 1 else ()):
        best, found = _placed(levels, read, [r for i, r in enumerate(levels.never) if i != k])
        rows.append(found[best].clamp(0, 1))
    return torch.stack(rows) if rows else levels.full.test[:0]


def readout_result(
    case: Case,
    levels: ReadLevels,
    model: Model,
    found: Read,
    *,
    test: str,
    name: str,
    cost_fe: float,
    columns: Callable[[int], Mapping[str, Float[Tensor, " fact"]]] = lambda _: {},
) -> Result:
    """Choose the point on TUNE and report it on TEST, with the curves over all points.

    Args:
        columns: further numbers, given the chosen point.
    """
    keep = case.others_than(model)
    others = [levels.never[k] for k in keep] if keep else list(levels.never)
    best, placed = _placed(levels, found, others)
    never = torch.stack([r.test for r in others])
    flags = tuple((*(("no_gap",) if x != x else ()), f"point:{levels.points[best]}") for x in placed[best].tolist())
    return make_result(
        case,
        test,
        name,
        score_raw=found.test[best],
        score_full=levels.full.test[best],
        score_retrained=never[:, best],
        null=place_null(levels),
        kappa=placed[best],
        cost_fe=cost_fe,
        layer=levels.layers[best],
        flags=flags,
        columns=columns(best),
        curves={"score": found.test, "score_F": levels.full.test, "score_R": never.mean(0), "kappa": placed},
    )
