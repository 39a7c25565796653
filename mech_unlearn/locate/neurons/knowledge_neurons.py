"""Knowledge neurons: which MLP neurons the probability of the answers grows with, by integrated gradients.

Paper:    Dai, Dong, Hao, Sui, Chang, Wei 2022, Knowledge neurons in pretrained transformers, arXiv 2104.08696.
Needs:    facts that the model answers; per prompt the cost of `neuron_attribution`.
Differs:  the mean over phrasings, and over facts with intervals; the paper's refined sets are `neuron_sets.refine`;
          attributions are signed, and those of a causal model: see `neuron_attribution`.
Fails:    a mean over facts shows neurons that the facts share, such as those of their relation; a neuron of one fact
          is diluted. Where P is near 1 its gradient vanishes (use target="logit").
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import INTERVAL, Attribution
from mech_unlearn.core import Fact
from mech_unlearn.locate.neurons.neuron_attribution import Scoring, check_facts, neuron_batches, width
from mech_unlearn.locate.neurons.neuron_scores import NeuronScores, neuron_scores
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import Query, make_queries

HELD = 2**26
"""Attributions held densely at a time while averaging (a quarter of a gigabyte)."""
PER_FACT = 2**28
"""The most attributions that `knowledge_neurons_per_fact` gives back (one gigabyte)."""


def _sums(
    model: Model, queries: Sequence[Query], index: Sequence[int], size: int, setting: Scoring
) -> Float[Tensor, "index layer neuron"]:
    """Sum over facts of the mean over a fact's queries; `index` is the entry that each query belongs to."""
    count = Counter(query.fact.id for query in queries)
    where, weight = torch.tensor(index), torch.tensor([1 / count[query.fact.id] for query in queries])
    out = torch.zeros(0)
    for members, values in neuron_batches(model, queries, setting):
        out = out if len(out) else torch.zeros(size, *values.shape[1:])
        out.index_add_(0, where[members], values * weight[members, None, None])
    return out


def _attribution(setting: Scoring, which: str, values: Tensor, axes: tuple[str, ...], facts: Sequence[Fact], **more):
    labels: dict[str, tuple] = {
        "fact": tuple(fact.id for fact in facts),
        "layer": tuple(range(values.shape[-2])),
        "neuron": tuple(range(values.shape[-1])),
    }
    note = f"mean over phrasings ({which}); neurons: mlp_{setting.activation}"
    if setting.method == "integrated_gradients":
        note += f"; {setting.steps} steps, {setting.rule} sum, zero baseline"
    note += more.pop("note", "")
    name = "knowledge neurons" if setting.method == "integrated_gradients" else "neuron activations"
    return Attribution(
        name=name, values=values, axes=axes, labels={a: labels[a] for a in axes}, unit=setting.unit, n=len(facts),
        note=note, **more,
    )  # fmt: skip


@takes_settings_of(Scoring)
def knowledge_neurons_per_fact(
    model: Model, facts: Sequence[Fact], *, which: Literal["templates", "prompt"] = "templates", **settings: Any
) -> Attribution:
    """Attribution of every neuron to each fact's answer, mean over its phrasings: axes (fact, layer, neuron).

    Args:
        which: all phrasings that a method may see, or the main prompt only.
        settings: fields of `Scoring`.

    Raises:
        ValueError: no facts, or so many that the table would not fit into one gigabyte (use `neuron_scores`).
    """
    check_facts(facts)
    setting, d_mlp = Scoring(**settings), width(model)
    if len(facts) * model.n_layers * d_mlp > PER_FACT:
        raise ValueError(
            f"{len(facts)} facts x {model.n_layers} layers x {d_mlp} neurons is more than a gigabyte: give at most "
            f"{PER_FACT // (model.n_layers * d_mlp)} facts, or use neuron_scores"
        )
    queries = make_queries(model.tokenizer, facts, which, distractors=False)
    order = {fact.id: i for i, fact in enumerate(facts)}
    values = _sums(model, queries, [order[query.fact.id] for query in queries], len(facts), setting)
    return _attribution(setting, which, values, ("fact", "layer", "neuron"), facts)


@takes_settings_of(Scoring)
def knowledge_neurons(
    model: Model, facts: Sequence[Fact], *, which: Literal["templates", "prompt"] = "templates", **settings: Any
) -> Attribution:
    """Mean attribution of every neuron to the facts' answers, with 95 % intervals: axes (layer, neuron).

    The interval is that of `Attribution.mean`, from sums over groups, so that facts are never all held.
    Takes the arguments of `knowledge_neurons_per_fact`.

    Raises:
        ValueError: no facts, a setting out of range, or activation interventions in force.
    """
    check_facts(facts)
    setting, d_mlp = Scoring(**settings), width(model)
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(fact.group or fact.subject, []).append(fact)
    names, size = list(groups), max(1, HELD // (model.n_layers * d_mlp))
    total = squares = cross = torch.zeros(model.n_layers, d_mlp, dtype=torch.float64)
    for start in range(0, len(names), size):
        some = [groups[name] for name in names[start : start + size]]
        of = {fact.id: i for i, members in enumerate(some) for fact in members}
        queries = make_queries(
            model.tokenizer, [fact for members in some for fact in members], which, distractors=False
        )
        for members, x in zip(some, _sums(model, queries, [of[q.fact.id] for q in queries], len(some), setting)):
            x = x.double()
            total, squares, cross = total + x, squares + x.square(), cross + len(members) * x
    n, g = len(facts), len(groups)
    mean = total / n
    # sum over groups of (S_g - n_g mean)^2, multiplied out
    residual = squares - 2 * mean * cross + mean.square() * sum(len(members) ** 2 for members in groups.values())
    half = 1.96 * (residual.clamp(min=0) / n**2 * (g / (g - 1) if g > 1 else float("nan"))).sqrt()
    return _attribution(
        setting, which, mean.float(), ("layer", "neuron"), facts,
        low=(mean - half).float(), high=(mean + half).float(), note=f"; {INTERVAL} ({g} groups)",
    )  # fmt: skip


def mean_scores(scores: NeuronScores) -> Attribution:
    """Mean over facts of the mean over phrasings, with 95 % intervals: axes (layer, neuron).

    A score that was left out counts as zero. The interval is that of `Attribution.mean`.
    """
    n, cells = len(scores.facts), scores.n_layers * scores.d_mlp
    names = {name: i for i, name in enumerate(dict.fromkeys(fact.group or fact.subject for fact in scores.facts))}
    group = torch.tensor([names[fact.group or fact.subject] for fact in scores.facts])
    size = torch.bincount(group).double()
    fact, _, layer, neuron = scores.entries.long().T
    share = scores.values.double() / torch.tensor(scores.phrasings)[fact]
    where, back = (group[fact] * cells + layer * scores.d_mlp + neuron).unique(return_inverse=True)
    summed = torch.zeros(len(where), dtype=torch.float64).index_add(0, back, share)
    of, cell = where // cells, where % cells

    def by_cell(x: Tensor) -> Tensor:
        return torch.zeros(cells, dtype=torch.float64).index_add(0, cell, x)

    mean = by_cell(summed) / n
    residual = by_cell(summed.square()) - 2 * mean * by_cell(size[of] * summed) + mean.square() * size.square().sum()
    factor = len(names) / (len(names) - 1) if len(names) > 1 else float("nan")
    half = 1.96 * (residual.clamp(min=0) / n**2 * factor).sqrt()
    shape = (scores.n_layers, scores.d_mlp)
    return Attribution(
        name="knowledge neurons",
        values=mean.float().view(shape),
        axes=("layer", "neuron"),
        labels={"layer": tuple(range(shape[0])), "neuron": tuple(range(shape[1]))},
        unit=scores.scoring.unit,
        n=n,
        low=(mean - half).float().view(shape),
        high=(mean + half).float().view(shape),
        note=f"scores below {scores.floor:g} of their phrasing's largest count as zero; {scores.scoring.steps} steps, "
        f"{scores.scoring.rule} sum; neurons: mlp_{scores.scoring.activation}; {INTERVAL} ({len(names)} groups)",
    )


@takes_settings_of(neuron_scores)
def located_neurons(model: Model, facts: Sequence[Fact], **settings: Any) -> Attribution:
    """Mean attribution of every neuron, for thousands of facts: axes (layer, neuron).

    `mean_scores` of `neuron_scores`, whose settings it takes; with `folder` it goes on where it stopped.
    """
    return mean_scores(neuron_scores(model, facts, **settings))
