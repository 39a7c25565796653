"""Activation patching: which states, copied between prompts about two subjects, carry the answer with them.

Paper:    Vig et al. 2020, arXiv 2004.12265; Geiger et al. 2021 (interchange), arXiv 2106.02997; Zhang and Nanda 2024,
          best practices, arXiv 2309.16042.
Needs:    facts about several subjects of equally many tokens; per fact two forward passes and one suffix sweep.
Differs:  the other prompt is the same phrasing about another subject drawn from the facts; the tokens of a class are
          patched together; the class `subject` patches the whole name.
Fails:    a state that carries the answer need not be where it is stored; with backups further up, one patch can do
          nothing although the state is used (compare `direction="noise"` with "denoise").

With `direction="denoise"` and `metric="exact"` this is the interchange test: copy one person's state into another's
prompt and count how often the answer follows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact, Site, SiteKind
from mech_unlearn.locate.patching.pairs import UNITS, Pair, check_metric, class_places, make_pairs, record_pairs
from mech_unlearn.locate.patching.token_classes import CLASSES
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.model.answers import answer_rows, answer_score, equal_shape
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.sweep import Patch, put, refuse_interventions, sweep

CLASSES_AND_SPAN = (*CLASSES, "subject")
HEADS = ("q", "k", "v", "z")
Effects = tuple[Float[Tensor, "pair unit layer"], Tensor, Tensor]
"""Effects, and the score of each pair's base and source run."""


def units_of(kind: str, at: str | None) -> tuple[str, ...]:
    """The token classes that are patched: all of them, or the one in `at`.

    Raises:
        ValueError: heads without a class of tokens, or a class that does not exist.
    """
    if at is not None and at not in CLASSES_AND_SPAN:
        raise ValueError(f"at={at!r}: choose one of {', '.join(CLASSES_AND_SPAN)}")
    if kind in HEADS and at is None:
        raise ValueError(
            f"kind {kind!r} has an axis of heads: say where with at=, one of {', '.join(CLASSES_AND_SPAN)}"
        )
    return CLASSES_AND_SPAN if at is None else (at,)


def _patch_group(
    model: Model, pairs: Sequence[Pair], kind: SiteKind, units: Sequence[str], direction: str, metric: str, tokens: int
) -> Effects:
    """True effect of each patch on pairs of equal shape; NaN for a class that the prompt lacks."""
    sites = [Site(layer, kind) for layer in range(model.n_layers)]
    base, source = record_pairs(model, pairs, direction, sites)
    read, answers = answer_rows([p.own for p in pairs]), [p.own.answers[0] for p in pairs]
    places = class_places(pairs[0].own)
    every = torch.arange(len(pairs), device=model.device)
    patches, where = [], []
    for u, unit in enumerate(units):
        if not (chosen := places[unit]):
            continue
        at = torch.tensor(chosen, device=model.device).expand(len(pairs), -1)
        for layer, site in enumerate(sites):
            theirs = source.state(site)[:, chosen]
            for head in range(theirs.shape[2]) if kind in HEADS else (None,):
                part = None if head is None else torch.tensor(head, device=model.device)
                write = put(at, theirs if head is None else theirs[:, :, head], part)
                patches.append(Patch(every, ((site, write),), chosen[0]))
                where.append((u, layer) if head is None else (head, layer))
    before, after = (answer_score(model, run.resid[-1][:, read], answers, metric).cpu() for run in (base, source))
    size = len(units) if kind not in HEADS else base.state(sites[0]).shape[2]
    effects = torch.full((len(pairs), size, model.n_layers), float("nan"))
    states = sweep(base, patches, read, max_tokens=tokens)
    scores = answer_score(model, torch.cat(states), answers * len(patches), metric).unflatten(0, (len(patches), -1))
    for (unit, layer), value in zip(where, scores.cpu(), strict=True):
        effects[:, unit, layer] = value - before
    return effects, before, after


def patch_table(
    model: Model, pairs: Sequence[Pair], run: Callable[[Sequence[Pair]], Effects], max_tokens: int
) -> Effects:
    """Run groups of pairs of equal shape and put their effects together in order."""
    effects: list[Tensor] = [torch.empty(0)] * len(pairs)
    before, after = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    for members in equal_shape([p.own for p in pairs], max(1, max_tokens // model.n_layers)):
        found, before[members], after[members] = run([pairs[i] for i in members])
        for i, effect in zip(members, found, strict=True):
            effects[i] = effect
    return torch.stack(effects), before, after


def as_attribution(name: str, facts: Sequence[Fact], found: Effects, kind: str, units: Sequence[str], metric: str,
                   note: str) -> Attribution:  # fmt: skip
    """Effects as an Attribution per fact: axes (fact, token, layer), or (fact, layer, head) for heads."""
    values, before, after = found
    layers = tuple(range(values.shape[2]))
    ids = tuple(f.id for f in facts)
    labels: dict[str, tuple] = {"fact": ids, "token": tuple(units), "layer": layers}
    if kind in HEADS:
        values, labels = values.transpose(1, 2), {"fact": ids, "layer": layers, "head": tuple(range(values.shape[1]))}
    return Attribution(
        name=name,
        values=values.contiguous(),
        axes=tuple(labels),
        labels=labels,
        unit=f"change of {UNITS[metric]}",
        n=len(facts),
        note=f"{note}; mean score of the patched run {before.mean():.3f}, of the run the states come from "
        f"{after.mean():.3f}",
    )


@torch.no_grad()
def activation_patching_per_fact(
    model: Model,
    facts: Sequence[Fact],
    *,
    kind: SiteKind = "resid_post",
    direction: str = "denoise",
    metric: str = "logprob",
    at: str | None = None,
    others: Sequence[Fact] = (),
    seed: int = 0,
    max_tokens: int = 32_768,
) -> Attribution:
    """Effect of each patch for each fact: axes (fact, token, layer), or (fact, layer, head) for q, k, v and z.

    The effect is the score of the fact's own answer after the patch minus before it, on the main prompt; NaN where a
    prompt lacks a class of tokens.

    Args:
        kind: what is patched; for heads `at` names the class of tokens.
        direction: "denoise" puts the fact's own states into the prompt about another subject (positive where a state
            suffices), "noise" the other subject's into its own prompt (negative where a state is needed).
        metric: "logprob" (mean per answer token, nats), "probability" (its exponential) or "exact" (greedy decoding
            gives the answer).
        at: one class of tokens, or all of them.
        others: further facts whose subjects may serve as the other subject.
        max_tokens: tokens in a batch at the most; bounds memory.

    Raises:
        KeyError: a kind that the architecture lacks.
        ValueError: no facts, no partner of equal length, settings out of range, or interventions in force.
    """
    refuse_interventions(model)
    check_metric(metric)
    units = units_of(kind, at)
    pairs = make_pairs(model, facts, others, seed)
    found = patch_table(
        model, pairs, lambda some: _patch_group(model, some, kind, units, direction, metric, max_tokens), max_tokens
    )
    where = f" at {at}" if at else ""
    return as_attribution(
        f"activation patching, {kind}{where}, {direction}", facts, found, kind, units, metric,
        "states of the same prompt about another subject",
    )  # fmt: skip


@takes_settings_of(activation_patching_per_fact)
def activation_patching(model: Model, facts: Sequence[Fact], **settings: Any) -> Attribution:
    """Average over facts of `activation_patching_per_fact`: axes (token, layer) or (layer, head)."""
    return activation_patching_per_fact(model, facts, **settings).mean(facts)


@takes_settings_of(activation_patching_per_fact, without=("direction", "metric"))
def interchange(model: Model, facts: Sequence[Fact], **settings: Any) -> Attribution:
    """Share of swaps after which greedy decoding gives the answer of the person whose state was copied in.

    `activation_patching` with direction="denoise" and metric="exact", less what the other prompt answers anyway.
    """
    return activation_patching(model, facts, direction="denoise", metric="exact", **settings)
