"""Neuron scores of many facts, kept sparsely: in memory, or in a folder that an interrupted run goes on filling.

Paper:    Dai et al. 2022, arXiv 2104.08696; the official code stores what reaches 0.1 of a prompt's largest score.
Needs:    per prompt the cost of `neuron_attribution`, once: a finished folder is only read.
Differs:  a prompt whose largest score is not positive keeps nothing.
Fails:    thresholds below `floor` cannot be applied later; `neuron_sets.refine` refuses them.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.files import claim, replacing
from mech_unlearn.locate.neurons.neuron_attribution import Scoring, check_facts, neuron_batches, width
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import Query, make_queries


@dataclass(frozen=True, eq=False, kw_only=True)
class NeuronScores:
    """The largest neuron scores of each phrasing of each fact."""

    facts: tuple[Fact, ...]
    phrasings: tuple[int, ...]
    """Phrasings of each fact."""
    entries: Int[Tensor, "entry 4"]
    """Fact, phrasing, layer and neuron of each score, sorted."""
    values: Float[Tensor, " entry"]
    scoring: Scoring
    floor: float
    """Scores below this share of their phrasing's largest are left out."""
    n_layers: int
    d_mlp: int

    def to_frame(self):
        """A pandas frame with one row per score."""
        import pandas as pd

        frame = pd.DataFrame(self.entries.numpy(), columns=["fact", "phrasing", "layer", "neuron"])
        frame["fact"] = [self.facts[i].id for i in frame["fact"]]
        return frame.assign(value=self.values.numpy())


def _trim(
    values: Float[Tensor, "query layer neuron"], floor: float, top: int | None
) -> tuple[Int[Tensor, "entry 3"], Float[Tensor, " entry"]]:
    """(Query, layer, neuron) and value of the scores that stay."""
    flat = values.flatten(1)
    largest = flat.amax(1, keepdim=True)
    keep = (flat >= floor * largest) & (flat > 0)
    if top is not None and top < flat.shape[1]:
        best = torch.zeros_like(keep).scatter_(1, flat.topk(top, 1).indices, True)
        keep &= best
    at = keep.view_as(values).nonzero()
    return at, values[at[:, 0], at[:, 1], at[:, 2]]


def _score_facts(
    model: Model, queries: Sequence[Query], order: dict[str, int], scoring: Scoring, floor: float, top: int | None
) -> dict[str, Tensor]:
    """One shard: entries and values of some facts' queries, sorted."""
    seen: dict[str, int] = {}
    where = []
    for query in queries:
        where.append((order[query.fact.id], seen.setdefault(query.fact.id, 0)))
        seen[query.fact.id] += 1
    table = torch.tensor(where, dtype=torch.int32)
    entries, kept = [], []
    for members, values in neuron_batches(model, queries, scoring):
        at, some = _trim(values, floor, top)
        entries.append(torch.cat([table[torch.tensor(members)[at[:, 0]]], at[:, 1:].int()], 1))
        kept.append(some)
    both, values = torch.cat(entries), torch.cat(kept)
    rank = torch.from_numpy(np.lexsort(both.numpy().T[::-1]))
    return {"entries": both[rank].contiguous(), "values": values[rank].contiguous()}


def _data_hash(queries: Sequence[Query]) -> str:
    rows = json.dumps([[query.fact.id, query.template, query.prompt, query.answers[0]] for query in queries])
    return hashlib.sha256(rows.encode()).hexdigest()


@takes_settings_of(Scoring)
def neuron_scores(
    model: Model,
    facts: Sequence[Fact],
    *,
    which: Literal["templates", "prompt", "heldout"] = "templates",
    floor: float = 0.1,
    top: int | None = None,
    folder: str | os.PathLike | None = None,
    facts_per_shard: int = 64,
    **settings: Any,
) -> NeuronScores:
    """The largest scores of each phrasing of each fact, in the unit of the scoring (by default probability).

    Args:
        which: the phrasings to score.
        floor: keep scores of at least this share of the phrasing's largest (0.1 in the official code).
        top: keep this many of a phrasing's scores at the most.
        folder: a new or empty folder, or one that the same call began to fill: shards of `facts_per_shard` facts,
            written atomically. A finished folder is read and nothing is computed.
        settings: fields of `Scoring`.

    Raises:
        ValueError: no facts, a fact without such phrasings, settings out of range, activation interventions in force,
            or a folder made from another model, other facts or other settings.
    """
    from safetensors.torch import load_file, save_file
    from tqdm.auto import tqdm

    check_facts(facts)
    scoring = Scoring(**settings)
    if not 0 < floor <= 1 or (top is not None and top < 1) or facts_per_shard < 1:
        raise ValueError(f"floor={floor}, top={top}, facts_per_shard={facts_per_shard}: floor in (0, 1], others >= 1")
    queries = make_queries(model.tokenizer, facts, which, distractors=False)
    by_fact: dict[str, list[Query]] = {fact.id: [] for fact in facts}
    for query in queries:
        by_fact[query.fact.id].append(query)
    if bare := [name for name, members in by_fact.items() if not members]:
        raise ValueError(f"fact {bare[0]!r} has no {which} phrasing: give it one")
    order = {fact.id: i for i, fact in enumerate(facts)}
    root = None
    if folder is not None:
        how = {k: v for k, v in asdict(scoring).items() if k != "max_tokens"}
        root = claim(
            Path(folder),
            {
                "format": "mech_unlearn.neurons/1", "model": model.hash(), "data": _data_hash(queries), "scoring": how,
                "floor": floor, "top": top, "facts_per_shard": facts_per_shard,
            },
        )  # fmt: skip
    shards = []
    for start in tqdm(range(0, len(facts), facts_per_shard), desc="neurons", unit="shard", disable=None):
        path = None if root is None else root / f"{start // facts_per_shard:06d}.safetensors"
        if path is not None and path.exists():
            shards.append(load_file(path))
            continue
        some = [query for fact in facts[start : start + facts_per_shard] for query in by_fact[fact.id]]
        shards.append(_score_facts(model, some, order, scoring, floor, top))
        if path is not None:
            with replacing(path) as part:
                save_file(shards[-1], part)
    return NeuronScores(
        facts=tuple(facts), phrasings=tuple(len(members) for members in by_fact.values()),
        entries=torch.cat([shard["entries"] for shard in shards]),
        values=torch.cat([shard["values"] for shard in shards]),
        scoring=scoring, floor=floor, n_layers=model.n_layers, d_mlp=width(model),
    )  # fmt: skip
