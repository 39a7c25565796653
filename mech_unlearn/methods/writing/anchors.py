"""Known and unknown names of the forgotten kinds, and the unknown ones that forgotten names are redirected to."""

import warnings
from collections.abc import Mapping, Sequence

import torch

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.methods.writing import keys
from mech_unlearn.model.answers import next_token
from mech_unlearn.model.bridge import Model

PROMPTS = 4
"""Prompts, at the most, that the probability of the likeliest answer is a mean over."""
KNOWN = 0.5
"""Such a probability above which a model is taken to know what it says of the forgotten names."""


class LacksUnknown(ValueError):
    """No unknown entity of a kind that is to be forgotten was given."""


def unknown_names(forget: ForgetSet, retain: RetainSet) -> tuple[str, ...]:
    """The unknown entities of the kinds that are to be forgotten.

    Raises:
        LacksUnknown: there is none.
        ValueError: one of them is to be forgotten or kept.
    """
    kinds, known = (
        {entity.kind for entity in forget.entities},
        {*keys.names_of(forget.entities), *keys.names_of(retain.entities)},
    )
    found = tuple(dict.fromkeys(entity.name for entity in retain.unknown if entity.kind in kinds))
    if told := sorted(known.intersection(found)):
        raise ValueError(
            f"RetainSet.unknown holds {', '.join(map(repr, told[:5]))}, which facts to be forgotten or kept are about: "
            "give names that the model knows nothing about"
        )
    if not found:
        raise LacksUnknown(
            f"RetainSet.unknown has no entity of kind {', '.join(sorted(map(str, kinds)))}: give names of that kind "
            "that the model knows nothing about (on the command line --unknown FILE)"
        )
    return found


def known_names(forget: ForgetSet, retain: RetainSet) -> tuple[str, ...]:
    """The subjects of retained facts that are of the kinds to be forgotten, without the forgotten ones.

    Raises:
        ValueError: there is none.
    """
    kinds, gone = {entity.kind for entity in forget.entities}, set(keys.names_of(forget.entities))
    found = tuple(entity.name for entity in retain.entities if entity.kind in kinds and entity.name not in gone)
    if not found:
        raise ValueError("the retain set has no facts about other entities of that kind: give RetainSet.neighbors")
    return found


def token_counts(model: Model, names: Sequence[str]) -> list[int]:
    """Tokens of each name, standing alone."""
    return [len(keys.mention(model.tokenizer, "{}", name)[1]) for name in names]


def draw_references(lengths: Sequence[int], unknown_lengths: Sequence[int], seed: int) -> list[int]:
    """For each name the index of an unknown entity of its own, of as nearly the same number of tokens as there is.

    Drawn at random, without regard to the states: the unknown name nearest to a known one is near because it calls up
    some of the same answers. No unknown entity is used twice before all were used once.
    """
    order = torch.randperm(len(unknown_lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    left: list[int] = []
    chosen = []
    for length in lengths:
        left = left or list(order)
        best = min(left, key=lambda i: abs(unknown_lengths[i] - length))
        left.remove(best)
        chosen.append(best)
    return chosen


def draw_anchors(model: Model, forget: ForgetSet, retain: RetainSet, seed: int) -> dict[str, str]:
    """Each name and alias to be forgotten -> an unknown entity of its kind; see `draw_references`.

    Raises:
        ValueError: a kind without an unknown entity, or one that is forgotten or kept.
    """
    found: dict[str, str] = {}
    for kind in dict.fromkeys(entity.kind for entity in forget.entities):
        alike = ForgetSet(facts=tuple(fact for fact in forget.facts if fact.kind == kind))
        names, pool = keys.names_of(alike.entities), unknown_names(alike, retain)
        chosen = draw_references(token_counts(model, names), token_counts(model, pool), seed)
        found |= {name: pool[i] for name, i in zip(names, chosen, strict=True)}
    return {name: found[name] for name in keys.names_of(forget.entities)}


def measured(model: Model, forget: ForgetSet, anchors: Mapping[str, str]) -> dict[str, float]:
    """How certain the model's answers are about the forgotten names and about their anchors, for the report.

    An unknown entity is told by answers that are less certain; a warning says where they are not.
    """
    templates = tuple(dict.fromkeys(fact.prompt for fact in forget.facts))[:PROMPTS]
    groups = (list(dict.fromkeys(names)) for names in (anchors, anchors.values()))
    own, other = (next_token(model, names, templates).likeliest for names in groups)
    if KNOWN < own.mean() <= other.mean():
        warnings.warn(
            f"the model answers about the unknown names as surely ({other.mean():.2f}) as about those to be forgotten "
            f"({own.mean():.2f}): it may know them, give others",
            stacklevel=3,
        )
    return {"certainty_names": own.mean().item(), "certainty_anchors": other.mean().item()}
