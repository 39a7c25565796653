"""Path patching: which attention heads reach the answer, or chosen later heads, by a direct path.

Paper:    Wang et al. 2022, IOI, arXiv 2211.00593, appendix B; Goldowsky-Dill et al. 2023, arXiv 2304.05969.
Needs:    per fact two forward passes and a suffix sweep over all heads; with receivers a second sweep.
Differs:  the other prompt is the same phrasing about another subject of the facts; a sender is patched at all
          positions from the subject on, since none before it differ.
Fails:    with `mlps="frozen"` whatever goes through an MLP does not count; a path through two or more heads counts
          for neither; heads that stand in for each other hide each other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact, Site, SiteKind
from mech_unlearn.locate.patching.activation_patching import Effects, as_attribution, patch_table
from mech_unlearn.locate.patching.pairs import Pair, check_metric, make_pairs, record_pairs
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.model.answers import answer_rows, answer_score
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.sweep import Patch, Recording, Write, put, refuse_interventions, sweep

Head = tuple[int, int]
"""Layer and head."""


def _tap(store: list[Tensor]) -> Write:
    """A write that changes nothing and keeps what passes by."""

    def look(x: Tensor, first: int) -> Tensor:
        store.append(x)
        return x

    return look


def _senders(
    base: Recording, source: Recording, first: int, top: int, mlps: str, receivers: Sequence[Site]
) -> tuple[list[Patch], list[Head], list[dict[Site, list[Tensor]]]]:
    """One patch per head below layer `top`, everything else held at the base run; and what the receivers are given."""
    every = torch.arange(len(base.ids), device=base.ids.device)
    at = torch.arange(first, base.width, device=base.ids.device).expand(len(every), -1)
    layers = base.model.n_layers

    def hold(site: Site) -> tuple[Site, Write]:
        return site, put(at, base.state(site)[:, first:])

    patches, heads, taps = [], [], []
    for layer in range(top):
        theirs = source.state(Site(layer, "z"))[:, first:]
        frozen = [hold(Site(above, "z")) for above in range(layer + 1, layers)]
        if mlps == "frozen":
            frozen += [hold(Site(above, "mlp_out")) for above in range(layer, layers)]
        for head in range(theirs.shape[2]):
            part = torch.tensor(head, device=base.ids.device)
            seen: dict[Site, list[Tensor]] = {site: [] for site in receivers if site.layer > layer}
            writes = [(Site(layer, "z"), put(at, theirs[:, :, head], part)), *frozen]
            patches.append(Patch(every, (*writes, *((site, _tap(store)) for site, store in seen.items())), first))
            heads.append((layer, head))
            taps.append(seen)
    return patches, heads, taps


def _received(
    base: Recording, receivers: Sequence[Head], through: SiteKind, taps: Sequence[dict[Site, list[Tensor]]], first: int
) -> list[Patch]:
    """For each sender one patch that gives the receivers what the sender's direct path made of their input."""
    every = torch.arange(len(base.ids), device=base.ids.device)
    at = torch.arange(first, base.width, device=base.ids.device).expand(len(every), -1)
    patches = []
    for seen in taps:
        writes = []
        for layer, head in receivers:
            if store := seen.get(Site(layer, through)):
                part = torch.tensor(head, device=base.ids.device)
                writes.append((Site(layer, through), put(at, store[0][:, :, head], part)))
        patches.append(Patch(every, tuple(writes), first))
    return patches


def _group(
    model: Model,
    pairs: Sequence[Pair],
    receivers: Sequence[Head],
    through: SiteKind,
    mlps: str,
    direction: str,
    metric: str,
    max_tokens: int,
) -> Effects:
    kinds: tuple[SiteKind, ...] = ("z", "mlp_out") if mlps == "frozen" else ("z",)
    keep = [Site(layer, kind) for layer in range(model.n_layers) for kind in kinds]
    base, source = record_pairs(model, pairs, direction, keep)
    read, answers = answer_rows([p.own for p in pairs]), [p.own.answers[0] for p in pairs]
    first = pairs[0].own.span[0]
    sites = sorted({Site(layer, through) for layer, _ in receivers})
    top = max((layer for layer, _ in receivers), default=model.n_layers)
    patches, heads, taps = _senders(base, source, first, top, mlps, sites)
    final = sweep(base, patches, read, max_tokens=max_tokens)
    if receivers:
        final = sweep(base, _received(base, receivers, through, taps, first), read, max_tokens=max_tokens)
    before, after = (answer_score(model, run.resid[-1][:, read], answers, metric).cpu() for run in (base, source))
    scores = answer_score(model, torch.cat(final), answers * len(final), metric).unflatten(0, (len(final), -1)).cpu()
    effects = torch.full((len(pairs), base.state(Site(0, "z")).shape[2], model.n_layers), float("nan"))
    for (layer, head), value in zip(heads, scores, strict=True):
        effects[:, head, layer] = value - before
    return effects, before, after


def _check(model: Model, receivers: Sequence[Head], through: str, mlps: str) -> None:
    if through not in ("q", "k", "v") or mlps not in ("frozen", "recomputed"):
        raise ValueError(f"through={through!r}, mlps={mlps!r}: choose q, k or v; and frozen or recomputed")
    config = model.hf.config
    heads = config.num_attention_heads
    if through != "q":
        heads = getattr(config, "num_key_value_heads", None) or heads
    for layer, head in receivers:
        if not (0 < layer < model.n_layers and 0 <= head < heads):
            raise ValueError(
                f"receiver {(layer, head)}: {model.name!r} has layers 1..{model.n_layers - 1} that can receive, "
                f"{heads} heads at {through}"
            )


@torch.no_grad()
def path_patching_per_fact(
    model: Model,
    facts: Sequence[Fact],
    *,
    receivers: Sequence[Head] = (),
    through: SiteKind = "q",
    mlps: str = "frozen",
    direction: str = "noise",
    metric: str = "logprob",
    others: Sequence[Fact] = (),
    seed: int = 0,
    max_tokens: int = 32_768,
) -> Attribution:
    """Effect of each head's direct path for each fact: axes (fact, layer, head); NaN above the last receiver.

    A sender's output is replaced by that of the other run; all other heads (and MLPs) keep their outputs of the base
    run. Without receivers the score is read from what then reaches the end: the direct path to the answer. With
    receivers, only what they are given of it is put into a base run in which all else is recomputed.

    Args:
        receivers: (layer, head) of the heads that receive; for k and v key-value heads.
        through: by which of their inputs: q, k or v.
        mlps: "frozen" holds MLP outputs too, "recomputed" lets the path go through them.
        direction, metric, others, seed, max_tokens: as in `activation_patching`.

    Raises:
        ValueError: no facts, no partner of equal length, no such head, settings out of range, interventions in force.
    """
    refuse_interventions(model)
    check_metric(metric)
    _check(model, receivers, through, mlps)
    pairs = make_pairs(model, facts, others, seed)
    found = patch_table(
        model,
        pairs,
        lambda some: _group(model, some, receivers, through, mlps, direction, metric, max_tokens),
        max_tokens,
    )
    goal = f"{through} of {', '.join(f'L{layer}H{head}' for layer, head in receivers)}" if receivers else "the answer"
    note = f"direct paths to {goal}, MLPs {mlps}"
    return as_attribution(f"path patching, {direction}", facts, found, "z", (), metric, note)


@takes_settings_of(path_patching_per_fact)
def path_patching(model: Model, facts: Sequence[Fact], **settings: Any) -> Attribution:
    """Average over facts of `path_patching_per_fact`: axes (layer, head)."""
    return path_patching_per_fact(model, facts, **settings).mean(facts)
