"""What the locators that patch states share: rows of equal shape, where to patch them, and how answers are scored."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from mech_unlearn.core import Fact, Site
from mech_unlearn.locate.patching.token_classes import token_classes
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.sweep import Recording, record
from mech_unlearn.model.tokens import Ask, Query, make_queries, tokenize

Metric = Literal["logprob", "probability", "exact"]
UNITS: Mapping[str, str] = {
    "logprob": "log-probability of the answer (nats per token)",
    "probability": "P(answer)",
    "exact": "share of prompts answered",
}


def check_metric(metric: str) -> None:
    """Refuse a metric that does not exist."""
    if metric not in get_args(Metric):
        raise ValueError(f"metric {metric!r}: choose {', '.join(get_args(Metric))}")


def class_places(query: Query) -> dict[str, list[int]]:
    """Positions of each class of tokens, and of the whole subject."""
    return {**token_classes(query), "subject": list(range(*query.span))}


@dataclass(frozen=True)
class Pair:
    """One phrasing of a fact, asked about its subject and about somebody else, with every position shared."""

    own: Query
    other: Query
    """The same prompt about the other subject; the candidate answer is still the fact's own object."""


def make_pairs(model: Model, facts: Sequence[Fact], others: Sequence[Fact] = (), seed: int = 0) -> tuple[Pair, ...]:
    """Each fact's main prompt beside the same prompt about another subject of as many tokens.

    The other subject is drawn among the subjects of `facts` and `others` that have another object in the same relation,
    or, where there is none of that length, among all with another name.

    Raises:
        ValueError: no facts, or a fact for which no other subject has as many tokens.
    """
    if not facts:
        raise ValueError("no facts to locate: give at least one")
    own = make_queries(model.tokenizer, facts, "prompt", distractors=False)
    pool = tuple({(f.subject, f.relation): f for f in (*facts, *others)}.values())
    pairs = []
    for query in own:
        fact = query.fact
        rng = random.Random(f"{seed} {fact.id}")
        away = [f for f in pool if f.subject != fact.subject]
        alike = [f for f in away if f.relation == fact.relation and f.object != fact.object]
        names = [name for some in (alike, away) for name in _shuffled_subjects(some, rng)]
        found = (tokenize(model.tokenizer, [Ask(fact, fact.prompt, name)], False)[0] for name in names)
        shape = (len(query.full), len(query.prompt), query.span)
        other = next((o for o in found if (len(o.full), len(o.prompt), o.span) == shape), None)
        if other is None:
            raise ValueError(
                f"fact {fact.id!r}: no other subject has {query.span[1] - query.span[0]} tokens, so that positions "
                "would not match; give more facts"
            )
        pairs.append(Pair(query, other))
    return tuple(pairs)


def _shuffled_subjects(facts: Sequence[Fact], rng: random.Random) -> list[str]:
    names = list(dict.fromkeys(fact.subject for fact in facts))
    return rng.sample(names, len(names))


def record_pairs(
    model: Model, pairs: Sequence[Pair], direction: str, keep: Sequence[Site], cache: bool = True
) -> tuple[Recording, Recording]:
    """(The run that is patched, the run whose states are put in), one row per pair.

    Args:
        direction: "denoise" puts the fact's own states into the prompt about the other subject; "noise" the reverse.
    """
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction {direction!r}: choose denoise or noise")
    own, other = (
        torch.tensor([query.full[:-1] for query in queries], device=model.device)
        for queries in ([p.own for p in pairs], [p.other for p in pairs])
    )
    base, source = (other, own) if direction == "denoise" else (own, other)
    inner = [site for site in keep if site.kind not in ("resid_pre", "resid_post")]
    return record(model, base, keep=inner, cache=cache), record(model, source, keep=inner, cache=False)
