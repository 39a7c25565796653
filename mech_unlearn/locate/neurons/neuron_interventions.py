"""Suppress or amplify neurons and see what becomes of the answer, the fact's own and another's.

Paper:    Dai et al. 2022, arXiv 2104.08696, section 4.4: activations are set to zero or doubled at the position that
          predicts the answer; other prompts are those of a random fact of another relation.
Needs:    refined sets; per fact a suffix sweep of its phrasings and another's, 4 rows each.
Differs:  the probability of an answer of several tokens is the geometric mean over its tokens, with neurons changed at
          every position that predicts one; random neurons of the same layers are the control.
Fails:    a neuron that is off cannot be amplified; the relative change of a fact with P near 0 is unbounded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact, Site
from mech_unlearn.locate.neurons.neuron_attribution import width
from mech_unlearn.locate.neurons.neuron_sets import Neuron, NeuronSets, random_like
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.model.answers import answer_rows, answer_score, equal_shape
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.sweep import Patch, Recording, Write, record, refuse_interventions, sweep
from mech_unlearn.model.tokens import Query, make_queries

WHERE = ("answer", "all")
CHANGES = {"suppress": 0.0, "amplify": 2.0}


@dataclass(frozen=True)
class Scaling:
    """One row: a query answered with some neurons multiplied by a factor."""

    query: int
    neurons: tuple[Neuron, ...]
    factor: float


def _scale(rows: Sequence[int], neurons: Sequence[int], factors: Sequence[float]) -> Write:
    """Multiply entries of some rows at all positions that are run."""
    row, neuron, factor = torch.tensor(rows), torch.tensor(neurons), torch.tensor(factors)

    def write(x: Tensor, _: int) -> Tensor:
        x = x.clone()
        r, n = row.to(x.device), neuron.to(x.device)
        x[r, :, n] = x[r, :, n] * factor.to(x)[:, None]
        return x

    return write


def _patch(recorded: Sequence[int], jobs: Sequence[Scaling], first: int) -> Patch:
    """One patch for several rows, each with its own neurons."""
    by_layer: dict[int, list[tuple[int, int, float]]] = {}
    for row, job in enumerate(jobs):
        for layer, neuron in job.neurons:
            by_layer.setdefault(layer, []).append((row, neuron, job.factor))
    writes = [(Site(layer, "mlp_post"), _scale(*zip(*some))) for layer, some in sorted(by_layer.items())]
    return Patch(torch.tensor(recorded), tuple(writes), first)


def _patches(recording: Recording, row_of: dict[int, int], jobs: Sequence[Scaling], first: int, size: int):
    """(Indices of jobs, patch): rows that begin at the same layer climb as one patch."""
    by_start: dict[int, list[int]] = {}
    for i, job in enumerate(jobs):
        by_start.setdefault(min(layer for layer, _ in job.neurons), []).append(i)
    for _, members in sorted(by_start.items()):
        for start in range(0, len(members), size):
            some = members[start : start + size]
            patch = _patch([row_of[jobs[i].query] for i in some], [jobs[i] for i in some], first)
            yield some, Patch(patch.rows.to(recording.ids.device), patch.writes, first)


@torch.no_grad()
def scaled_probability(
    model: Model, queries: Sequence[Query], jobs: Sequence[Scaling], *, where: str = "answer", max_tokens: int = 8192
) -> tuple[Float[Tensor, " query"], Float[Tensor, " job"]]:
    """P(answer) of each query as it is, and of each job's query with its neurons scaled; geometric mean over tokens.

    Args:
        where: at the positions that predict the answer's tokens, or at "all" positions.
        max_tokens: tokens of a batch at the most.

    Raises:
        ValueError: no queries, a job without neurons or with one that does not exist, another `where`, or activation
            interventions in force.
    """
    refuse_interventions(model)
    if where not in WHERE:
        raise ValueError(f"where={where!r}: choose {' or '.join(WHERE)}")
    if not queries:
        raise ValueError("no queries: give at least one")
    if bare := [job for job in jobs if not job.neurons or not 0 <= job.query < len(queries)]:
        raise ValueError(f"{bare[0]}: name at least one neuron and one of {len(queries)} queries")
    d_mlp = width(model)
    for job in jobs:
        if wrong := [x for x in job.neurons if not (0 <= x[0] < model.n_layers and 0 <= x[1] < d_mlp)]:
            raise ValueError(f"neuron {wrong[0]}: {model.name!r} has {model.n_layers} layers of {d_mlp} neurons")
    before, after = torch.zeros(len(queries)), torch.zeros(len(jobs))
    by_query: dict[int, list[int]] = {}
    for i, job in enumerate(jobs):
        by_query.setdefault(job.query, []).append(i)
    for members in equal_shape([replace(query, span=(0, 1)) for query in queries], max_tokens):
        ids = torch.tensor([queries[i].full[:-1] for i in members], device=model.device)
        read = answer_rows([queries[i] for i in members])
        rec = record(model, ids)
        before[members] = answer_score(
            model, rec.resid[-1][:, read], [queries[i].answers[0] for i in members], "probability"
        ).cpu()
        mine = [j for i in members for j in by_query.get(i, [])]
        first = read[0] if where == "answer" else 0
        size = max(1, max_tokens // (rec.width - first))
        row_of = {i: row for row, i in enumerate(members)}
        for start in range(0, len(mine), size):
            some = mine[start : start + size]
            pairs = list(_patches(rec, row_of, [jobs[j] for j in some], first, size))
            finals = sweep(rec, [patch for _, patch in pairs], read, max_tokens=max_tokens)
            order = [some[k] for chosen, _ in pairs for k in chosen]
            answers = [queries[jobs[j].query].answers[0] for j in order]
            after[order] = answer_score(model, torch.cat(finals), answers, "probability").cpu()
    return before, after


def suppress(
    model: Model, queries: Sequence[Query], neurons: Sequence[Neuron], where: str = "answer"
) -> Float[Tensor, " query"]:
    """P(answer) of each query with the neurons set to zero; see `scaled_probability`."""
    jobs = [Scaling(i, tuple(neurons), CHANGES["suppress"]) for i in range(len(queries))]
    return scaled_probability(model, queries, jobs, where=where)[1]


def amplify(
    model: Model, queries: Sequence[Query], neurons: Sequence[Neuron], where: str = "answer"
) -> Float[Tensor, " query"]:
    """P(answer) of each query with the neurons doubled; see `scaled_probability`."""
    jobs = [Scaling(i, tuple(neurons), CHANGES["amplify"]) for i in range(len(queries))]
    return scaled_probability(model, queries, jobs, where=where)[1]


def _others(facts: Sequence[Fact], generator: torch.Generator) -> list[int | None]:
    """For each fact a random one of another relation and another subject; None where there is none."""
    out = []
    for fact in facts:
        fit = [i for i, f in enumerate(facts) if f.relation != fact.relation and f.subject != fact.subject]
        out.append(fit[int(torch.randint(len(fit), (1,), generator=generator))] if fit else None)
    return out


def neuron_effects_per_fact(
    model: Model,
    sets: NeuronSets,
    *,
    which: Literal["templates", "prompt", "heldout"] = "templates",
    where: str = "answer",
    seed: int = 0,
    max_tokens: int = 8192,
) -> Attribution:
    """Relative change of P(answer) when a fact's neurons are changed: axes (fact, change, neurons, asked).

    (mean P after - mean P before) / mean P before, means over phrasings. `change`: "suppress" (zero) or "amplify"
    (doubled); `neurons`: the fact's "refined" set or "random" neurons of the same layers; `asked`: the fact's "own"
    phrasings, or those of an "other", random fact of another relation and subject. NaN for a fact without neurons, and
    where there is no other fact.

    Args:
        which: the phrasings that are asked.
        where: change neurons at the positions that predict the answer, or at "all" positions.
        seed: of the random neurons and of the other facts.

    Raises:
        ValueError: settings out of range, or activation interventions in force.
    """
    generator = torch.Generator().manual_seed(seed)
    facts = sets.facts
    queries = make_queries(model.tokenizer, facts, which, distractors=False)
    of: dict[str, list[int]] = {}
    for i, query in enumerate(queries):
        of.setdefault(query.fact.id, []).append(i)
    others = _others(facts, generator)
    jobs: list[Scaling] = []
    cells: list[tuple[int, int, int, int]] = []
    for f, fact in enumerate(facts):
        own = sets.neurons[fact.id]
        if not own:
            continue
        kinds = (own, random_like(own, sets.d_mlp, generator))
        for a, asked in enumerate((f, others[f])):
            for q in of.get(facts[asked].id, []) if asked is not None else []:
                for c, factor in enumerate(CHANGES.values()):
                    for k, neurons in enumerate(kinds):
                        jobs.append(Scaling(q, neurons, factor))
                        cells.append((f, c, k, a))
    before, after = scaled_probability(model, queries, jobs, where=where, max_tokens=max_tokens)
    index = tuple(torch.tensor(cells, dtype=torch.long).view(-1, 4).unbind(1))
    sums = torch.zeros(2, len(facts), 2, 2, 2, dtype=torch.float64)
    sums[0].index_put_(index, before[[job.query for job in jobs]].double(), accumulate=True)
    sums[1].index_put_(index, after.double(), accumulate=True)
    clean, changed = sums
    labels = {"change": tuple(CHANGES), "neurons": ("refined", "random"), "asked": ("own", "other")}
    pooled = _pooled(
        clean, changed, lambda c, k, a: f"{labels['change'][c]} {labels['neurons'][k]}, {labels['asked'][a]}"
    )
    return Attribution(
        name="effect of knowledge neurons",
        values=((changed - clean) / clean).float(),
        axes=("fact", "change", "neurons", "asked"),
        labels={"fact": tuple(fact.id for fact in facts), **labels},
        unit="relative change of P(answer)",
        n=len(facts),
        note=f"{which}, neurons changed at {where} positions; change of the mean P over facts: {pooled}",
    )


def _pooled(clean: Tensor, changed: Tensor, name: Callable[[int, int, int], str]) -> str:
    """The paper's numbers: change of the mean over all prompts, relative to that mean."""
    ratio = changed.sum(0) / clean.sum(0) - 1
    cells = [(c, k, a) for c in range(2) for k in range(2) for a in range(2)]
    return ", ".join(f"{name(*cell)} {ratio[cell].item():+.1%}" for cell in cells)


@takes_settings_of(neuron_effects_per_fact)
def neuron_effects(model: Model, sets: NeuronSets, **settings: Any) -> Attribution:
    """Mean of `neuron_effects_per_fact` over facts that have neurons, with 95 % intervals: (change, neurons, asked)."""
    return neuron_effects_per_fact(model, sets, **settings).mean(sets.facts)
