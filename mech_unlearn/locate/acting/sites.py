"""The sites of a prompt that a locator has measured: its top ones, and random ones of equal number."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Site, SiteKind
from mech_unlearn.locate.patching.pairs import class_places
from mech_unlearn.locate.patching.token_classes import CLASSES, token_classes
from mech_unlearn.model.answers import answer_rows
from mech_unlearn.model.tokens import Query

KINDS: dict[tuple[str, ...], tuple[SiteKind, ...]] = {
    ("token", "layer"): ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"),
    ("layer", "head"): ("z", "q", "k", "v"),
    ("layer", "neuron"): ("mlp_post", "mlp_pre"),
    ("layer", "component"): ("attn_out", "mlp_out"),
}
"""Axes of a result -> the kinds of sites that it can stand for."""
COMPONENTS: dict[str, SiteKind] = {"attn": "attn_out", "mlp": "mlp_out"}
CONTROLS = ("anywhere", "same layers", "same tokens")
PLACES = (*CLASSES, "subject", "answer", "all")


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What is ablated, and how much of it."""

    k: int
    kind: SiteKind
    at: str
    ablation: str
    rank: str
    draws: int
    seed: int


@dataclass(frozen=True, eq=False)
class Grid:
    """The sites of one prompt that a locator has measured."""

    score: Float[Tensor, " site"]
    layer: Int[Tensor, " site"]
    token: Int[Tensor, " site"]
    """First position, where the result tells tokens apart; else 0."""
    cells: Callable[[int], tuple[Site, list[int], int | None]]
    """Site number -> (site, positions, head or neuron)."""


def _places(query: Query, at: str) -> list[int]:
    answer = answer_rows([query])
    if at == "answer":
        return answer
    return list(range(query.span[0], answer[-1] + 1)) if at == "all" else class_places(query)[at]


def grid(result: Attribution, values: Tensor, query: Query, setting: Ablation) -> Grid:
    """The sites of a prompt with their values, without those that have none."""
    axes = result.axes[-2:]
    rows, columns = (result.labels[axis] for axis in axes)
    if axes == ("token", "layer"):
        classes = token_classes(query)
        found = [(p, i) for i, name in enumerate(rows) for p in classes.get(name, ())]
        token = torch.tensor([p for p, _ in found]).repeat_interleave(len(columns))
        layer = torch.tensor(columns).repeat(len(found))
        score = values[[i for _, i in found]].flatten()
    else:
        layer = torch.tensor(rows).repeat_interleave(len(columns))
        token, score = torch.zeros_like(layer), values.flatten()
        numbered = torch.tensor([name in COMPONENTS or isinstance(name, int) for name in columns])
        score = score.masked_fill((layer < 0) | ~numbered.repeat(len(rows)), float("nan"))
    known = (~score.isnan()).nonzero()[:, 0]
    layer, token, score = layer[known], token[known], score[known]
    places = [] if axes == ("token", "layer") else _places(query, setting.at)

    def cell(i: int) -> tuple[Site, list[int], int | None]:
        if axes == ("token", "layer"):
            return Site(int(layer[i]), setting.kind), [int(token[i])], None
        name = columns[int(known[i]) % len(columns)]
        if axes[1] == "component":
            return Site(int(layer[i]), COMPONENTS[name]), places, None
        return Site(int(layer[i]), setting.kind), places, name

    order = {"high": score, "low": -score, "size": score.abs()}[setting.rank]
    return Grid(order, layer, token, cell)


def _draw(free: Bool[Tensor, " site"], n: int, generator: torch.Generator) -> list[int] | None:
    """n of the free sites, none twice; None if there are too few."""
    found = free.nonzero()[:, 0]
    if len(found) < n:
        return None
    return found[torch.randperm(len(found), generator=generator)[:n]].tolist()


def _like(of: Tensor, top: list[int], free: Tensor, generator: torch.Generator) -> list[int] | None:
    """As many free sites with each label (layer or token) as the top ones have."""
    out = []
    for label, n in zip(*(x.tolist() for x in of[top].unique(return_counts=True)), strict=True):
        some = _draw(free & (of == label), n, generator)
        if some is None:
            return None
        out += some
    return out


def sets(grid: Grid, setting: Ablation, by_token: bool, name: str) -> tuple[list[list[int]], list[int]]:
    """(Sets of sites, what each is: 0 the top, 1.. the control it belongs to)."""
    if len(grid.score) < 2 * setting.k:
        raise ValueError(
            f"{name}: {len(grid.score)} sites were measured, too few for k={setting.k} and as many others; lower k"
        )
    generator = torch.Generator().manual_seed(zlib.crc32(f"{setting.seed} {name}".encode()))
    top = grid.score.topk(setting.k).indices.tolist()
    free = torch.ones(len(grid.score), dtype=torch.bool)
    free[top] = False
    sets, what = [top], [0]
    for _ in range(setting.draws):
        drawn = [_draw(free, setting.k, generator), _like(grid.layer, top, free, generator)]
        drawn += [_like(grid.token, top, free, generator)] if by_token else []
        for control, some in enumerate(drawn):
            if some is not None:
                sets.append(some)
                what.append(control + 1)
    return sets, what
