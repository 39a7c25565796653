"""Restored components: which part of U, put back from the full model, brings F's answer back?

Paper:    Knowledge restoration score (KRS), Hong et al. 2024, Intrinsic or extrinsic, arXiv 2410.06606.
Changes:  nothing kept; MLP coefficients or attention outputs of U are written over with F's of the same prompt in a
          window of layers, or, in a clone, the matrices that the coefficients weigh (`values`).
Needs:    per model 2 + 3 L forward passes of each prompt with F's own answer of up to 30 tokens, and L clones.
Differs:  windows of l - r to l + r, r = n_layers / 6, at most the paper's 2. F's states on the very prompt carry the
          answer into any model whose read-out is intact, so KRS of retrained models is subtracted: recoverability =
          (KRS(U) - KRS(R)) / (1 - KRS(R)) at the part and window chosen on TUNE, among those where retrained models
          stay low.
Fails:    blind to an edit of the embedding or of the final read-out (no part holds it), and to one spread over more
          layers than a window. Without retrained models the raw KRS cannot be told from what F's states inject: it is
          reported, but the test is silent (NaN, flag `needs_retrained`).

loss = mean squared difference of U's and F's logits on the rows that predict F's own answer (logits squared); KRS = 1
- loss(restored) / loss(U): 1 = F again, 0 = no effect. `score_raw` is KRS, NaN with the flag `not_lost` where U's
logits are F's already.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attach import require_positions
from mech_unlearn.core import Site, SiteKind
from mech_unlearn.edit import clone
from mech_unlearn.model import Model
from mech_unlearn.prompts import Query, buckets
from mech_unlearn.restoration import readouts
from mech_unlearn.restoration.case import Case, Result, mean_by_fact, split_queries
from mech_unlearn.restoration.levels import Levels
from mech_unlearn.restoration.readouts import Read, ReadLevels
from mech_unlearn.scoring import greedy

Part = Literal["coefficients", "attention", "values"]
SITES: Mapping[Part, SiteKind] = {"coefficients": "mlp_post", "attention": "attn_out"}
ANSWER_TOKENS, TUNE_FACTS, MIN_GAP, SAME = 30, 40, 0.1, 1e-8
"""Tokens of F's answer; facts that choose the window; 1 - KRS(R) below which nothing is said; loss of equal logits."""


@dataclass(frozen=True)
class Restore:
    """What is put back: parts of some layers."""

    parts: tuple[Part, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Spoken:
    """Prompts with the full model's own answers."""

    queries: tuple[Query, ...]
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class ComponentLevels:
    points: tuple[Restore, ...]
    tune: Spoken
    test: Spoken
    levels: ReadLevels


def spoken(full: Model, queries: Sequence[Query], tokens: int = ANSWER_TOKENS) -> Spoken:
    """The prompts and what the full model says after them, greedily."""
    limit = getattr(full.hf.config, "max_position_embeddings", None) or 10**9
    room = max(1, min(tokens, limit - max(len(q.prompt) for q in queries)))
    said = greedy(full, [q.prompt for q in queries], room)
    return Spoken(tuple(queries), tuple(q.prompt + answer for q, answer in zip(queries, said, strict=True)))


@contextmanager
def with_values(model: Model, full: Model, layers: Sequence[int]) -> Iterator[Model]:
    """The model, or a clone whose MLP output matrices in some layers are the full model's."""
    if not layers:
        yield model
        return
    with clone(model) as copy:
        names = [copy.w_out(layer)[0] for layer in layers]
        with torch.no_grad():
            for name in names:
                copy.held[name].copy_(full.held[name])
        copy.require_live(names)
        yield copy


def _fixed(kept: dict[Site, Tensor], site: Site, x: Tensor) -> Tensor:
    return kept[site].to(x)


@torch.no_grad()
def losses(full: Model, model: Model, told: Spoken, restores: Sequence[Restore]) -> Float[Tensor, "point query"]:
    """Mean squared difference of logits to F's on the rows that predict F's answer, row 0 with nothing restored."""
    require_positions(model)
    out = torch.zeros(1 + len(restores), len(told.rows))
    everything = [Restore((), ()), *restores]
    kinds: tuple[SiteKind, ...] = tuple(SITES.values())
    sites = [Site(layer, kind) for kind in kinds for layer in range(full.n_layers)]
    batches = []
    for members in buckets(told.rows):
        ids = torch.tensor([told.rows[i] for i in members], device=full.device)
        kept: dict[Site, Tensor] = {}
        with full.hooks(*((s, lambda x, s=s, kept=kept: kept.__setitem__(s, x)) for s in sites)):
            wanted = full.logits(ids).float()
        batches.append((members, ids, kept, wanted))
    for number, restore in enumerate(everything):
        with with_values(model, full, restore.layers if "values" in restore.parts else ()) as used:
            chosen: list[SiteKind] = [SITES[part] for part in restore.parts if part != "values"]
            places = [Site(layer, kind) for kind in chosen for layer in restore.layers]
            for members, ids, kept, wanted in batches:
                with used.hooks(*((s, partial(_fixed, kept, s)) for s in places)):
                    apart = (used.logits(ids.to(used.device)).float().to(wanted.device) - wanted).square().mean(-1)
                for row, i in enumerate(members):
                    start = len(told.queries[i].prompt) - 1
                    end = max(start + 1, len(told.rows[i]) - 1)
                    out[number, i] = apart[row, start:end].mean().cpu()
    return out


def krs(loss: Float[Tensor, "point fact"]) -> Float[Tensor, "restored fact"]:
    """1 - loss(restored) / loss(nothing restored); NaN where there is nothing to restore."""
    return torch.where(loss[0] > SAME, 1 - loss[1:] / loss[0].clamp(min=SAME), torch.nan)


def _read(case: Case, ready: ComponentLevels, model: Model) -> Read:
    facts = [case.facts[i] for i in readouts.tune_facts(case, TUNE_FACTS)]
    return Read(
        krs(mean_by_fact(losses(case.full, model, ready.tune, ready.points), ready.tune.queries, facts)),
        krs(mean_by_fact(losses(case.full, model, ready.test, ready.points), ready.test.queries, case.facts)),
    )


def prepare(
    case: Case,
    shared: Levels | None = None,
    *,
    parts: Sequence[Part] = ("coefficients", "attention", "values"),
    radius: int | None = None,
    tokens: int = ANSWER_TOKENS,
) -> ComponentLevels:
    """Let the full model speak, and restore its parts in the retrained models.

    Args:
        radius: of the window of layers.

    Raises:
        ValueError: an unknown part, a negative radius or no token to be said.
    """
    if any(part not in get_args(Part) for part in parts) or not parts:
        raise ValueError(f"parts {tuple(parts)}: choose from {', '.join(get_args(Part))}")
    if tokens < 1 or (radius is not None and radius < 0):
        raise ValueError(f"tokens={tokens}, radius={radius}: one token at least, and no negative radius")
    depth = case.full.n_layers
    r = min(2, depth // 6) if radius is None else radius
    points = tuple(
        Restore((part,), tuple(range(max(0, layer - r), min(depth, layer + r + 1))))
        for part in parts
        for layer in range(depth)
    )
    facts = [case.facts[i] for i in readouts.tune_facts(case, TUNE_FACTS)]
    told = [
        spoken(case.full, queries, tokens)
        for queries in (split_queries(case, "tune", facts), split_queries(case, "test"))
    ]
    names = tuple(f"{part} {point.layers[0]}-{point.layers[-1]}" for point in points for part in point.parts)
    ones = Read(torch.ones(len(points), len(facts)), torch.ones(len(points), len(case.facts)))
    levels = ReadLevels(names, tuple(range(depth)) * len(parts), ones, (), MIN_GAP)
    ready = ComponentLevels(points, told[0], told[1], levels)
    never = tuple(_read(case, ready, model) for model in case.retrained)
    unknown = Read(torch.full_like(ones.tune, torch.nan), torch.full_like(ones.test, torch.nan))
    return replace(ready, levels=replace(levels, never=never or (unknown,)))


def audit(case: Case, ready: ComponentLevels, model: Model, name: str) -> Result:
    """Restore the full model's parts in the audited model."""
    index = next((k for k, r in enumerate(case.retrained) if r is model), None)
    read = _read(case, ready, model) if index is None else ready.levels.never[index]
    passes = (2 + len(ready.points)) * (len(ready.tune.rows) + len(ready.test.rows)) / len(case.facts)
    found = readouts.result(case, ready.levels, model, read, test="components", name=name, cost_fe=passes)
    same = read.test.isnan().all(0).tolist()
    more = () if case.retrained else ("needs_retrained",)
    flags = tuple((*f, *more, *(("not_lost",) if s else ())) for f, s in zip(found.flags, same, strict=True))
    return replace(found, flags=flags)
