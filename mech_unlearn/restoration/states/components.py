"""Restored components: which part of U, put back from the full model, brings F's answer back?

Paper:    Knowledge restoration score (KRS), Hong et al. 2024, Intrinsic or extrinsic, arXiv 2410.06606.
Changes:  nothing kept; MLP coefficients or attention outputs of U are written over with F's of the same prompt in a
          window of layers, or, in a clone, the matrices that the coefficients weigh (`values`).
Needs:    per model 2 + 3 L forward passes of each prompt with F's own answer of up to 30 tokens, and a clone. In memory
          at a time, for one batch of at most 2,048 tokens: F's coefficients and attention outputs of all layers, and
          the logits of both models from the first row that is compared on.
Differs:  windows of l - r to l + r, r = n_layers / 6, at most the paper's 2. F's states on the very prompt carry the
          answer into any model whose read-out is intact, so KRS of retrained models is subtracted: recoverability =
          (KRS(U) - KRS(R)) / (1 - KRS(R)) at the part and window chosen on TUNE, among those where retrained models
          stay low.
Fails:    blind to an edit of the embedding or of the final read-out (no part holds it), and to one spread over more
          layers than a window. Without retrained models the raw KRS cannot be told from what F's states inject: it is
          reported, but the test is silent (NaN, flag `needs_retrained`). Parts that a model does not have as one
          place per layer (`values` of a mixture of experts, whose `coefficients` are the MLP's output) are left out,
          flag `no_<part>`.

loss = mean squared difference of U's and F's logits on the rows that predict F's own answer (logits squared); KRS = 1
- loss(restored) / loss(U): 1 = F again, 0 = no effect. `score_raw` is KRS, NaN with the flag `not_lost` where U's
logits are F's already.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Site, SiteKind
from mech_unlearn.edit.edit import clone
from mech_unlearn.model.bridge import Model, require_positions
from mech_unlearn.model.forward import last_logits
from mech_unlearn.model.scores import greedy
from mech_unlearn.model.tokens import Query, buckets
from mech_unlearn.restoration.engine.case import Case, split_queries, tune_facts
from mech_unlearn.restoration.engine.levels import Levels
from mech_unlearn.restoration.engine.normalise import mean_by_fact
from mech_unlearn.restoration.engine.readouts import Read, ReadLevels, readout_result
from mech_unlearn.verdict.result import Result

Part = Literal["coefficients", "attention", "values"]
SITES: Mapping[Part, SiteKind] = {"coefficients": "mlp_post", "attention": "attn_out"}
ANSWER_TOKENS, MIN_KRS_GAP, SAME, BATCH_TOKENS = 30, 0.1, 1e-8, 2048
"""Tokens of F's answer; facts that choose the window; 1 - KRS(R) below which nothing is said; loss of equal logits;
tokens of a batch."""


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
    lacking: tuple[Part, ...] = ()
    """Parts that the model does not have."""


def lacking(model: Model) -> tuple[Part, ...]:
    """The parts that the model does not have as one place in every layer."""
    out: list[Part] = []
    for part in get_args(Part):
        try:
            for layer in range(model.n_layers):
                model.w_out(layer) if part == "values" else model.resolve(Site(layer, SITES[part]))
        except KeyError:
            out.append(part)
    return tuple(out)


def spoken(full: Model, queries: Sequence[Query], tokens: int = ANSWER_TOKENS) -> Spoken:
    """The prompts and what the full model says after them, greedily."""
    room = max(1, min(tokens, (full.n_ctx or 10**9) - max(len(q.prompt) for q in queries)))
    said = greedy(full, [q.prompt for q in queries], room)
    return Spoken(tuple(queries), tuple(q.prompt + answer for q, answer in zip(queries, said, strict=True)))


@contextmanager
def with_values(model: Model, other: Model, layers: Sequence[int]) -> Iterator[None]:
    """The model's MLP output matrices in some layers are those of the other model."""
    names = [model.w_out(layer)[0] for layer in layers]
    own = {name: model.held[name].detach().clone() for name in names}
    try:
        _write(model, {name: other.held[name] for name in names})
        yield
    finally:
        _write(model, own)


@torch.no_grad()
def _write(model: Model, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        model.held[name].copy_(weight)
    model.require_live(weights)


def _fixed(kept: dict[Site, Tensor], site: Site, x: Tensor) -> Tensor:
    return kept[site].to(x)


@torch.no_grad()
def restored_losses(
    full: Model, model: Model, told: Spoken, restores: Sequence[Restore]
) -> Float[Tensor, "point query"]:
    """Mean squared difference of logits to F's on the rows that predict F's answer, row 0 with nothing restored; over
    the tokens that both have where one vocabulary was padded."""
    require_positions(model)
    everything = (Restore((), ()), *restores)
    places = [[Site(n, SITES[p]) for p in r.parts if p != "values" for n in r.layers] for r in everything]
    sites = list(dict.fromkeys(site for some in places for site in some))
    out = torch.zeros(len(everything), len(told.rows))
    with clone(model) if any("values" in r.parts and r.layers for r in restores) else nullcontext(model) as copy:
        for members in buckets(told.rows, BATCH_TOKENS):
            ids = torch.tensor([told.rows[i] for i in members], device=full.device)
            start = [len(told.queries[i].prompt) - 1 for i in members]
            read = ids.shape[1] - min(start)
            kept: dict[Site, Tensor] = {}
            with full.hooks(*((s, partial(kept.__setitem__, s)) for s in sites)):
                wanted = last_logits(full, ids, read).float()
            for number, (restore, at) in enumerate(zip(everything, places, strict=True)):
                values = restore.layers if "values" in restore.parts else ()
                used = copy if values else model
                with with_values(used, full, values), used.hooks(*((s, partial(_fixed, kept, s)) for s in at)):
                    found = last_logits(used, ids.to(used.device), read).float().to(wanted.device)
                shared = min(found.shape[-1], wanted.shape[-1])
                apart = (found[..., :shared] - wanted[..., :shared]).square().mean(-1)
                for row, i in enumerate(members):
                    first = start[row] - min(start)
                    out[number, i] = apart[row, first : max(first + 1, read - 1)].mean().cpu()
    return out


def krs(loss: Float[Tensor, "point fact"]) -> Float[Tensor, "restored fact"]:
    """1 - loss(restored) / loss(nothing restored); NaN where there is nothing to restore."""
    return torch.where(loss[0] > SAME, 1 - loss[1:] / loss[0].clamp(min=SAME), torch.nan)


def _read(case: Case, ready: ComponentLevels, model: Model) -> Read:
    facts = [case.facts[i] for i in tune_facts(case)]
    return Read(
        krs(mean_by_fact(restored_losses(case.full, model, ready.tune, ready.points), ready.tune.queries, facts)),
        krs(mean_by_fact(restored_losses(case.full, model, ready.test, ready.points), ready.test.queries, case.facts)),
    )


def prepare(
    case: Case,
    shared: Levels | None = None,
    *,
    parts: Sequence[Part] | None = None,
    radius: int | None = None,
    tokens: int = ANSWER_TOKENS,
) -> ComponentLevels:
    """Let the full model speak, and restore its parts in the retrained models.

    Args:
        parts: by default all that the model has.
        radius: of the window of layers.

    Raises:
        ValueError: an unknown part or one that the model lacks, a negative radius or no token to be said.
    """
    absent = lacking(case.full)
    has = tuple(part for part in get_args(Part) if part not in absent)
    chosen = has if parts is None else tuple(parts)
    if any(part not in has for part in chosen) or not chosen:
        raise ValueError(f"parts {chosen}: {case.full.name!r} has {', '.join(has) or 'none'}")
    if tokens < 1 or (radius is not None and radius < 0):
        raise ValueError(f"tokens={tokens}, radius={radius}: one token at least, and no negative radius")
    depth = case.full.n_layers
    r = min(2, depth // 6) if radius is None else radius
    points = tuple(
        Restore((part,), tuple(range(max(0, layer - r), min(depth, layer + r + 1))))
        for part in chosen
        for layer in range(depth)
    )
    facts = [case.facts[i] for i in tune_facts(case)]
    told = [
        spoken(case.full, queries, tokens)
        for queries in (split_queries(case, "tune", facts), split_queries(case, "test"))
    ]
    names = tuple(f"{part} {point.layers[0]}-{point.layers[-1]}" for point in points for part in point.parts)
    ones = Read(torch.ones(len(points), len(facts)), torch.ones(len(points), len(case.facts)))
    levels = ReadLevels(names, tuple(range(depth)) * len(chosen), ones, (), MIN_KRS_GAP)
    ready = ComponentLevels(points, told[0], told[1], levels, absent if parts is None else ())
    never = tuple(_read(case, ready, model) for model in case.retrained)
    unknown = Read(torch.full_like(ones.tune, torch.nan), torch.full_like(ones.test, torch.nan))
    return replace(ready, levels=replace(levels, never=never or (unknown,)))


def audit(case: Case, ready: ComponentLevels, model: Model, name: str) -> Result:
    """Restore the full model's parts in the audited model."""
    index = case.index_of(model)
    read = _read(case, ready, model) if index is None else ready.levels.never[index]
    passes = (2 + len(ready.points)) * (len(ready.tune.rows) + len(ready.test.rows)) / len(case.facts)
    found = readout_result(case, ready.levels, model, read, test="components", name=name, cost_fe=passes)
    same = read.test.isnan().all(0).tolist()
    more = (*(() if case.retrained else ("needs_retrained",)), *(f"no_{part}" for part in ready.lacking))
    flags = tuple((*f, *more, *(("not_lost",) if s else ())) for f, s in zip(found.flags, same, strict=True))
    return replace(found, flags=flags)
