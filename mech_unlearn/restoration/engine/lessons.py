"""What is taught in tests that train on some facts and score the others: folds of the forget set, and their lessons."""

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.model.asking import split_templates
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.forward import logits_at
from mech_unlearn.model.tokens import Ask, tokenize
from mech_unlearn.restoration.engine.case import Case, Relearn
from mech_unlearn.restoration.engine.levels import QuerySet
from mech_unlearn.restoration.engine.normalise import sham_facts

Lesson = tuple[tuple[int, ...], int]
"""Token ids of a prompt with its answer, and the length of the prompt."""


def fold_of(facts: Sequence[Fact], settings: Relearn, seed: int) -> tuple[int, ...]:
    """The fold that each fact belongs to, of equal size as far as can be.

    By subject all facts of a subject share a fold; by fact the facts of each subject are dealt out.

    Raises:
        ValueError: fewer subjects (or facts per subject) than folds, so that nothing could be taught.
    """
    draw = random.Random(seed)
    subjects = sorted({fact.subject for fact in facts})
    draw.shuffle(subjects)
    if settings.split == "entity":
        if len(subjects) < settings.folds:
            raise ValueError(
                f"relearning by entity in {settings.folds} folds needs as many subjects, got {len(subjects)}; "
                "use split='fact'"
            )
        return tuple(subjects.index(fact.subject) % settings.folds for fact in facts)
    order = sorted(range(len(facts)), key=lambda i: (facts[i].subject, draw.random()))
    if len(order) < settings.folds:
        raise ValueError(f"relearning in {settings.folds} folds needs as many facts, got {len(order)}")
    dealt = {i: k % settings.folds for k, i in enumerate(order)}
    return tuple(dealt[i] for i in range(len(facts)))


def by_fold(
    query_set: QuerySet, folds: Sequence[int], score: Callable[[int, QuerySet], Float[Tensor, "*point kind some"]]
) -> Float[Tensor, "*point kind fact"]:
    """The scores of each fold's facts, fold by fold, in the order of all facts."""
    found = [score(fold, query_set.part([f == fold for f in folds])) for fold in sorted(set(folds))]
    order = torch.tensor(sorted(range(len(folds)), key=folds.__getitem__))
    return torch.cat(found, -1).index_select(-1, order.argsort())


def lessons(case: Case, facts: Sequence[Fact]) -> list[Lesson]:
    """(token ids of prompt and answer, length of the prompt) for each SELECT and TUNE phrasing."""
    asks = [Ask(fact, template) for fact in facts for template in taught_templates(fact)]
    queries = tokenize(case.full.tokenizer, asks, distractors=False)
    return [(query.full, len(query.prompt)) for query in queries]


def taught_templates(fact: Fact) -> tuple[str, ...]:
    """The SELECT and TUNE phrasings."""
    return tuple(dict.fromkeys((*split_templates(fact, "select"), *split_templates(fact, "tune"))))


def fold_lessons(
    case: Case, folds: Sequence[int], *, own: bool = False, sham: bool = False
) -> tuple[list[Lesson], ...]:
    """What is taught before each fold is scored: the facts of all other folds, or its own.

    Args:
        sham: with wrong answers.

    Raises:
        ValueError: a fact with fewer than two distractors, for wrong answers.
    """
    taught = []
    for fold in range(case.relearn.folds):
        facts = [fact for fact, f in zip(case.facts, folds, strict=True) if (f == fold) == own]
        taught.append(lessons(case, sham_facts(facts, case.seed) if sham else facts))
    return tuple(taught)


def lesson_batches(rows: Sequence[Lesson], size: int, steps: int, generator: torch.Generator) -> Iterator[list[Lesson]]:
    """A batch per step; the rows are dealt out in a new order whenever they run short."""
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[i] for i in order[:size]]
        order = order[size:]


def lesson_loss(
    model: Model,
    ids: Int[Tensor, "batch pos"],
    start: Sequence[int],
    end: Sequence[int],
    mask: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over the answer tokens [start, end) of all rows; only they are unembedded."""
    at = torch.arange(1, ids.shape[1], device=ids.device)[None]
    low, high = (torch.tensor(x, device=ids.device)[:, None] for x in (start, end))
    rows, before = ((at >= low) & (at < high)).nonzero(as_tuple=True)
    logits = logits_at(model, ids, mask, (rows, before))
    return torch.nn.functional.cross_entropy(logits.float(), ids[rows, before + 1])
