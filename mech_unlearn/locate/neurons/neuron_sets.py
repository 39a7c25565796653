"""Refined sets of knowledge neurons: those that a fact's phrasings share, and how far the sets of facts overlap.

Paper:    Dai et al. 2022, arXiv 2104.08696, sections 3.3 and 4.3; thresholds and the search for the sharing
          rate are those of the official code.
Needs:    `neuron_scores` of facts with at least three phrasings.
Differs:  a random baseline (as many neurons in the same layers) and bootstrap intervals over groups of facts are added.
Fails:    phrasings that share words share neurons for these words, whatever the fact: compare facts of one relation.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.locate.neurons.neuron_scores import NeuronScores
from mech_unlearn.metrics.intervals import DRAWS

Neuron = tuple[int, int]
"""Layer and index."""
THRESHOLDS = {"integrated_gradients": 0.2, "activation": 0.5}
"""Share of a phrasing's largest score. Source: arXiv 2104.08696, section 4."""


@dataclass(frozen=True, kw_only=True)
class NeuronSets:
    """The refined neurons of each fact."""

    facts: tuple[Fact, ...]
    neurons: Mapping[str, tuple[Neuron, ...]]
    """Fact id -> its neurons, sorted."""
    sharing: Mapping[str, float]
    """Relation -> the share of phrasings that a neuron had to appear in."""
    n_layers: int
    d_mlp: int


def _counts(scores: NeuronScores, threshold: float) -> list[Counter[Neuron]]:
    """Per fact, how many of its phrasings each neuron reaches the threshold in."""
    fact, phrasing = scores.entries[:, 0].long(), scores.entries[:, 1].long()
    row = fact * (max(scores.phrasings) + 1) + phrasing
    largest = torch.zeros(int(row.max()) + 1 if len(row) else 1).scatter_reduce(0, row, scores.values, "amax")
    kept = scores.entries[scores.values >= threshold * largest[row]]
    out: list[Counter[Neuron]] = [Counter() for _ in scores.facts]
    for i, _, layer, neuron in kept.tolist():
        out[i][layer, neuron] += 1
    return out


def refine(
    scores: NeuronScores,
    *,
    threshold: float | None = None,
    sharing: float = 0.7,
    min_prompts: int = 3,
    wanted: tuple[float, float] | None = (2, 5),
    step: float = 0.05,
    rounds: int = 6,
) -> NeuronSets:
    """The neurons that reach the threshold in most phrasings of a fact.

    Args:
        threshold: share of a phrasing's largest score (0.2; 0.5 for the activation baseline).
        sharing: share of a fact's phrasings that a neuron must appear in.
        min_prompts: and at least so many.
        wanted: mean neurons per fact of a relation; the relation's sharing rate is lowered or raised by `step`, at
            most `rounds` times, until the mean is within. None: the rate stays as given.

    Raises:
        ValueError: settings out of range, a threshold below the floor of the scores, or fewer phrasings than
            `min_prompts`.
    """
    threshold = THRESHOLDS[scores.scoring.method] if threshold is None else threshold
    if not scores.floor <= threshold <= 1:
        raise ValueError(f"threshold={threshold}: choose {scores.floor:g} (the floor of these scores) to 1")
    if not 0 < sharing <= 1 or min_prompts < 1 or step <= 0 or rounds < 0:
        raise ValueError(f"sharing={sharing}, min_prompts={min_prompts}, step={step}, rounds={rounds}: out of range")
    for fact, n in zip(scores.facts, scores.phrasings, strict=True):
        if n < min_prompts:
            raise ValueError(f"fact {fact.id!r} has {n} phrasings, needs {min_prompts}: add some or lower min_prompts")
    counts = _counts(scores, threshold)
    neurons: dict[str, tuple[Neuron, ...]] = {}
    rates: dict[str, float] = {}
    for relation in dict.fromkeys(fact.relation for fact in scores.facts):
        members = [i for i, fact in enumerate(scores.facts) if fact.relation == relation]
        rate = sharing
        for round_ in range(rounds + 1):
            needed = [max(rate * scores.phrasings[i], min_prompts) - 1e-9 for i in members]
            found = [
                tuple(sorted(x for x, n in counts[i].items() if n >= need))
                for i, need in zip(members, needed, strict=True)
            ]
            mean = sum(map(len, found)) / len(found)
            if wanted is None or wanted[0] <= mean <= wanted[1] or round_ == rounds:
                break
            rate += step if mean > wanted[1] else -step
        rates[relation] = rate
        neurons |= {scores.facts[i].id: some for i, some in zip(members, found, strict=True)}
    return NeuronSets(facts=scores.facts, neurons=neurons, sharing=rates, n_layers=scores.n_layers, d_mlp=scores.d_mlp)


def relation_neurons(sets: NeuronSets, relation: str, *, share: float = 0.1, limit: int | None = 20) -> list[Neuron]:
    """The neurons of at least a share of a relation's facts, most frequent first (the paper's section 5.2 takes 20).

    Raises:
        ValueError: no fact of this relation.
    """
    members = [fact.id for fact in sets.facts if fact.relation == relation]
    if not members:
        known = ", ".join(dict.fromkeys(fact.relation for fact in sets.facts))
        raise ValueError(f"no fact of relation {relation!r}; there are {known}")
    counts = Counter(x for name in members for x in sets.neurons[name])
    often = [x for x, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n >= share * len(members)]
    return often[:limit]


def random_like(neurons: Sequence[Neuron], d_mlp: int, generator: torch.Generator) -> tuple[Neuron, ...]:
    """As many other neurons of the same layers, none twice, none of the given ones.

    Raises:
        ValueError: a layer with too few neurons left.
    """
    out = []
    for layer, n in sorted(Counter(layer for layer, _ in neurons).items()):
        own = torch.tensor([j for at, j in neurons if at == layer])
        order = torch.randperm(d_mlp, generator=generator)
        free = order[~torch.isin(order, own)]
        if len(free) < n:
            raise ValueError(f"layer {layer} has {d_mlp} neurons, of which {n} are taken: too few for a random control")
        out += [(layer, int(j)) for j in free[:n]]
    return tuple(out)


def _shared(sets: Sequence[Sequence[Neuron]], d_mlp: int) -> Float[Tensor, "fact fact"]:
    """How many neurons each two sets share."""
    from scipy.sparse import csr_matrix

    rows = [i for i, some in enumerate(sets) for _ in some]
    names = [layer * d_mlp + j for some in sets for layer, j in some]
    columns = {name: k for k, name in enumerate(dict.fromkeys(names))}
    shape = (len(sets), max(len(columns), 1))
    table = csr_matrix(([1.0] * len(rows), (rows, [columns[name] for name in names])), shape=shape)
    return torch.from_numpy((table @ table.T).toarray())


def _pair_means(shared: Tensor, same: Tensor, weights: Float[Tensor, "draw fact"]) -> dict[str, Tensor]:
    """Per draw: neurons per fact, and the mean overlap of pairs of unlike facts within and across relations."""
    size = shared.diagonal()

    def mean(mask: Tensor) -> Tensor:
        mask = mask.double().fill_diagonal_(0)
        pairs = ((weights @ mask) * weights).sum(1)
        return ((weights @ (shared * mask)) * weights).sum(1) / pairs

    return {
        "neurons per fact": (weights @ size) / weights.sum(1),
        "shared within a relation": mean(same),
        "shared across relations": mean(~same),
    }


def overlap(sets: NeuronSets, *, repeats: int = 20, draws: int = DRAWS, seed: int = 0):
    """How large refined sets are and how many neurons two facts share, as in the paper's section 4.3.

    A pandas frame with the columns neurons ("refined", "random"), quantity, value, low, high, n: means over facts or
    over pairs of facts with 95 % percentile-bootstrap intervals over groups of facts; n counts facts or pairs. The
    random sets have as many neurons in the same layers (mean of `repeats` draws). NaN where there is no such pair.

    Raises:
        ValueError: fewer than two facts.
    """
    import pandas as pd

    if len(sets.facts) < 2:
        raise ValueError("overlap needs at least two facts")
    generator = torch.Generator().manual_seed(seed)
    own = [sets.neurons[fact.id] for fact in sets.facts]
    by_kind = {"refined": _shared(own, sets.d_mlp)}
    by_kind["random"] = (
        sum(
            (_shared([random_like(x, sets.d_mlp, generator) for x in own], sets.d_mlp) for _ in range(repeats)),
            torch.zeros(len(own), len(own), dtype=torch.float64),
        )
        / repeats
    )
    codes = {name: i for i, name in enumerate(sets.sharing)}
    relation = torch.tensor([codes[fact.relation] for fact in sets.facts])
    same = relation[:, None] == relation
    groups = {name: i for i, name in enumerate(dict.fromkeys(fact.group or fact.subject for fact in sets.facts))}
    group = torch.tensor([groups[fact.group or fact.subject] for fact in sets.facts])
    drawn = torch.randint(len(groups), (draws, len(groups)), generator=generator)
    times = torch.zeros(draws, len(groups), dtype=torch.float64).scatter_add(1, drawn, torch.ones_like(drawn).double())
    inside = int(same.sum() - len(own)) // 2
    n = {"neurons per fact": len(own), "shared within a relation": inside}
    n["shared across relations"] = len(own) * (len(own) - 1) // 2 - inside
    rows = []
    for kind, shared in by_kind.items():
        mean = _pair_means(shared, same, torch.ones(1, len(own), dtype=torch.float64))
        for quantity, values in _pair_means(shared, same, times[:, group]).items():
            low, high = values.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            rows.append((kind, quantity, mean[quantity].item(), low, high, n[quantity]))
    return pd.DataFrame(rows, columns=["neurons", "quantity", "value", "low", "high", "n"])
