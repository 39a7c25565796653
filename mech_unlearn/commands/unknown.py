"""Names that a model knows nothing about, made up where none are given: chosen by how open its answers are.

About a known name the next token behind a prompt is a matter of few candidates, about an unknown one of many. A made-up
name is taken where the entropy of the next token, mean over half of the prompts, is above that of nearly all names that
the model answers right about and of half of the made-up ones; the other half of the prompts then tells the two apart,
or shows that they cannot be.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from mech_unlearn.core import Entity, Fact, Measurement
from mech_unlearn.data.made_up import Manner, made_up

COUNT, LEAST = 32, 4
"""Names of a kind, at the most and at the least, that are taken when no number is asked for."""
CANDIDATES = 6
"""Made-up names that are measured for each that is wanted."""
PROMPTS = 4
"""Prompts, at the most, on which names are chosen, and as many on which they are measured."""
KNOWN = 64
"""Known names, at the most, that they are compared with."""
ABOVE = 0.95
"""Share of the known names whose answers have to be less open."""
APART = 0.8
"""AUC, known against made-up names, below which the model's answers do not tell the two apart."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Unknown:
    """Made-up names of one kind, and what shows that the model does not know them."""

    kind: str | None
    entities: tuple[Entity, ...]
    entropy: Measurement
    """Of the next token about these names, mean over prompts that did not choose them."""
    known: Measurement
    """The same about names that the model answers right about."""
    auc: float
    """Known against made-up names by that entropy."""
    in_sample: bool
    """Whether there was one prompt only, which chose the names as well."""

    def __str__(self) -> str:
        return told(self.to_json())

    def to_json(self) -> dict[str, Any]:
        measured = {"entropy": self.entropy.to_json(), "known": self.known.to_json(), "auc": self.auc}
        names = [entity.name for entity in self.entities]
        return {"kind": self.kind, "names": names, "in_sample": self.in_sample} | measured


def told(found: Mapping[str, Any]) -> str:
    """What was taken, in a line; from `Unknown.to_json`."""
    entropy, known = (f"{found[key]['value']:.2f}" for key in ("entropy", "known"))
    same = " (in-sample: one prompt chose and measured them)" if found["in_sample"] else ""
    names, known_names = found["names"], found["known"]["n"]
    return (
        f"{len(names)} made-up names of kind {found['kind']} taken as unknown ({', '.join(names[:5])}, ...): entropy "
        f"of the next token {entropy} nats, of {known_names} known names {known}, AUC {found['auc']:.2f}{same}"
    )


def find_unknown(
    model: Any, facts: Sequence[Fact], kept: Sequence[Fact] = (), *, count: int | None = None, seed: int = 0
) -> tuple[Unknown, ...]:
    """Names that the model knows nothing about, of each kind that the facts are about.

    Args:
        facts: about the names in whose manner they are made up; taken names are of like numbers of tokens.
        kept: further facts, for names that the model knows.
        count: names of each kind; None takes up to `COUNT`.

    Raises:
        ValueError: a kind of which the model answers no fact right, whose names it cannot be told from made-up ones by
            its answers, or of which too few can be made up.
    """
    found = []
    for kind in dict.fromkeys(fact.kind for fact in facts):
        own, others = ([fact for fact in some if fact.kind == kind] for some in (facts, kept))
        found.append(_of_kind(model, kind, own, others, count, seed))
    return tuple(found)


def _of_kind(
    model: Any, kind: str | None, facts: Sequence[Fact], kept: Sequence[Fact], count: int | None, seed: int
) -> Unknown:
    from mech_unlearn.methods.writing.anchors import draw_references, token_counts
    from mech_unlearn.metrics import mean_ci
    from mech_unlearn.model.answers import next_token
    from mech_unlearn.verdict.evaluation import auc

    mend = "give names that it does not know (on the command line --unknown FILE)"
    if not (known := _known(model, (*facts, *kept), seed)):
        raise ValueError(
            f"the model answers no fact of kind {kind} right, so nothing is known of what it knows: {mend}"
        )
    prompts = _prompts((*facts, *kept))
    choosing, measuring = prompts[::2][:PROMPTS], (prompts[1::2] or prompts)[:PROMPTS]
    own = list(dict.fromkeys(fact.subject for fact in facts))
    names = [*own, *known, *(name for fact in (*facts, *kept) for name in (fact.subject, *fact.aliases))]
    made = _writable(model, list(dict.fromkeys(names)), CANDIDATES * (count or COUNT), seed)
    bound = next_token(model, known, choosing).entropy.mean(1).quantile(ABOVE)
    openness = next_token(model, made, choosing).entropy.mean(1)
    chosen = (openness > bound) & (openness >= openness.median())
    found = [name for name, good in zip(made, chosen.tolist(), strict=True) if good]
    if len(found) < (least := count or LEAST):
        raise ValueError(
            f"{least} unknown names of kind {kind} are wanted, but of {len(made)} made-up ones {len(found)} have "
            f"answers more open than those about the {len(known)} that the model knows: {mend}"
        )
    lengths = token_counts(model, own)
    wanted = [lengths[i % len(own)] for i in range(count or min(COUNT, len(found)))]
    drawn = draw_references(wanted, token_counts(model, found), seed)
    taken = [found[i] for i in drawn]
    there, here = (next_token(model, some, measuring).entropy.mean(1) for some in (known, taken))
    apart = auc(here.numpy(), there.numpy())
    if apart < APART:
        raise ValueError(
            f"made-up names of kind {kind} cannot be told from known ones by its answers (AUC {apart:.2f}): {mend}"
        )
    unit = f"nats, entropy of the next token, mean over {len(measuring)} prompts"
    return Unknown(
        kind=kind,
        entities=tuple(Entity(name=name, kind=kind) for name in taken),
        entropy=mean_ci(here, unit, seed=seed),
        known=mean_ci(there, unit, seed=seed),
        auc=apart,
        in_sample=len(prompts) == 1,
    )


def _known(model: Any, facts: Sequence[Fact], seed: int) -> list[str]:
    """Subjects of which the model answers a fact right by its main prompt, `KNOWN` at the most."""
    from mech_unlearn.model.scores import score
    from mech_unlearn.model.tokens import make_queries

    right = score(model, make_queries(model.tokenizer, facts, "prompt", False)).exact.tolist()
    names = list(dict.fromkeys(fact.subject for fact, is_right in zip(facts, right, strict=True) if is_right))
    return random.Random(seed).sample(names, min(KNOWN, len(names)))


def _prompts(facts: Sequence[Fact]) -> list[str]:
    """Prompts that methods may see, each once: those of all relations in turn."""
    by_relation: dict[str, dict[str, None]] = {}
    for fact in facts:
        by_relation.setdefault(fact.relation, {}).update(dict.fromkeys(fact.templates))
    return [prompt for row in zip_longest(*by_relation.values()) for prompt in row if prompt is not None]


def _writable(model: Any, names: Sequence[str], count: int, seed: int) -> list[str]:
    """Made-up names that the tokenizer has tokens for: of new words, or of the names' words where it has none."""
    from mech_unlearn.model.tokens import encode_all, has_unknown

    manners: tuple[Manner, ...] = ("spelled", "combined")
    for manner in manners:
        if manner == "combined" and max(len(name.split()) for name in names) < 2:
            break
        made = made_up(names, count, seed, manner)
        known = encode_all(model.tokenizer, made)
        if found := [name for name in made if not has_unknown(model.tokenizer, known[name])]:
            return found
    return []
