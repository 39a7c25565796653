"""Recall: how often greedy decoding gives the object, and how often guessing would."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch

from mech_unlearn.core import Fact, Measurement
from mech_unlearn.metrics.intervals import mean_ci
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.scores import score
from mech_unlearn.model.tokens import make_queries

UNIT = "share of prompts answered"


def recall(
    model: Model, facts: Sequence[Fact], which: Literal["templates", "prompt", "heldout"] = "templates", seed: int = 0
) -> Measurement:
    """Share of prompts after which greedy decoding gives the object; clusters are the facts' groups.

    Raises:
        ValueError: no fact, or no fact with such a phrasing.
    """
    if not facts:
        raise ValueError("recall needs at least one fact")
    queries = make_queries(model.tokenizer, facts, which, distractors=False)
    if not queries:
        raise ValueError(f"none of the {len(facts)} facts has a phrasing of kind {which!r}")
    hits = score(model, queries).exact.float()
    return mean_ci(hits, UNIT, [query.fact.group or query.fact.subject for query in queries], seed)


def forget_recall(model: Model, facts: Sequence[Fact], seed: int = 0) -> Measurement:
    """Recall on the phrasings that a method may see."""
    return recall(model, facts, "templates", seed)


def heldout_recall(model: Model, facts: Sequence[Fact], seed: int = 0) -> Measurement:
    """Recall on the held-out phrasings."""
    return recall(model, facts, "heldout", seed)


def majority_recall(facts: Sequence[Fact], retain: Sequence[Fact], seed: int = 0) -> Measurement:
    """Recall of always answering the most frequent object of the relation among the retained facts.

    What a model can reach that knows the relations and nothing of these facts.

    Raises:
        ValueError: a relation without any retained fact.
    """
    seen: dict[str, Counter] = {}
    for fact in retain:
        seen.setdefault(fact.relation, Counter())[fact.object] += 1
    for fact in facts:
        if fact.relation not in seen:
            raise ValueError(f"relation {fact.relation!r} has no retained fact to take the most frequent object from")
    best = {relation: max(counts.items(), key=lambda item: (item[1], item[0]))[0] for relation, counts in seen.items()}
    hits = torch.tensor([float(best[fact.relation] == fact.object) for fact in facts])
    return mean_ci(hits, "share of facts guessed", [fact.group or fact.subject for fact in facts], seed)
