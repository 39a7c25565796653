"""What the probe test asks: kept facts to train on, forgotten ones to read, and where in the model they are read."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Fact, Site
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import capture
from mech_unlearn.model.tokens import Query
from mech_unlearn.restoration.engine.case import Case, split_queries, tune_facts

MAX_OBJECTS, MAX_KEPT = 50, 400
"""Objects of a relation; kept facts of a relation that train."""
PLACES = ("last subject", "last prompt")


@dataclass(frozen=True, eq=False)
class Task:
    """One relation: kept rows to train on, and the forgotten questions to be answered."""

    objects: tuple[str, ...]
    kept: Int[Tensor, " row"]
    """Index among the questions of each training row, and below its label and its subject."""
    label: Int[Tensor, " row"]
    subject: Int[Tensor, " row"]
    asked: Int[Tensor, " test"]
    true: Int[Tensor, " test"]
    """The label of each forgotten question."""
    owner: Int[Tensor, " test"]
    """The subject of each forgotten question."""


@dataclass(frozen=True, eq=False)
class Setup:
    """Questions and tasks, the same for every model."""

    queries: tuple[Query, ...]
    """TUNE and TEST questions about forgotten facts, then those about kept facts."""
    tune: int
    """How many of them are TUNE questions; the TEST questions follow."""
    forgotten: int
    tasks: tuple[Task, ...]
    facts: tuple[Fact, ...]
    chosen: tuple[int, ...]
    """Indices of the facts that choose the place."""

    @property
    def tune_facts(self) -> tuple[Fact, ...]:
        return tuple(self.facts[i] for i in self.chosen)


def kept_facts(case: Case) -> list[Fact]:
    """Facts about other subjects that a probe can be trained on: of the forgotten relations, if those have between two
    and `MAX_OBJECTS` objects; at most `MAX_KEPT` of each, taken at even distances."""
    gone, kept = {fact.subject for fact in case.facts}, []
    for relation in dict.fromkeys(fact.relation for fact in case.facts):
        alike = [f for f in case.others if f.relation == relation and f.subject not in gone]
        if len({f.object for f in alike}) > 1 and len({f.object for f in alike}) <= MAX_OBJECTS:
            most = min(len(alike), MAX_KEPT)
            kept += [alike[i * len(alike) // most] for i in range(most)]
    return kept


def make_setup(case: Case) -> Setup:
    """The questions of the probe test, and one task per relation.

    Raises:
        ValueError: no kept facts of the forgotten relations.
    """
    chosen = tune_facts(case)
    tune = split_queries(case, "tune", [case.facts[i] for i in chosen])
    test = split_queries(case, "test")
    kept = kept_facts(case)
    if not kept:
        raise ValueError(
            "a probe is trained on kept facts of the forgotten relations: give Case(others=...) facts about other "
            f"subjects with 2 to {MAX_OBJECTS} objects per relation"
        )
    told = (*split_queries(case, "tune", kept), *split_queries(case, "test", kept))
    queries = (*tune, *test, *{(query.fact.id, query.template): query for query in told}.values())
    subjects = {name: i for i, name in enumerate(dict.fromkeys(query.fact.subject for query in queries))}
    forgotten, tasks = len(tune) + len(test), []
    for relation in dict.fromkeys(fact.relation for fact in kept):
        rows = [i for i in range(forgotten, len(queries)) if queries[i].fact.relation == relation]
        objects = sorted({queries[i].fact.object for i in rows})
        asked = [
            i for i in range(forgotten) if queries[i].fact.relation == relation and queries[i].fact.object in objects
        ]
        index = {name: i for i, name in enumerate(objects)}
        whose = [torch.tensor([subjects[queries[i].fact.subject] for i in some]) for some in (rows, asked)]
        labels = [torch.tensor([index[queries[i].fact.object] for i in some]) for some in (rows, asked)]
        tasks.append(
            Task(
                tuple(objects), torch.tensor(rows), labels[0], whose[0],
                torch.tensor(asked, dtype=torch.long), labels[1].long(), whose[1].long(),
            )
        )  # fmt: skip
    return Setup(queries, len(tune), forgotten, tuple(tasks), case.facts, chosen)


def features(model: Model, setup: Setup) -> Float[Tensor, "point query d_model"]:
    """resid_post at the subject's and at the prompt's last token; a point is a place and a layer, place by place."""
    sites = [Site(layer, "resid_post") for layer in range(model.n_layers)]
    at = [(query.span[1] - 1, len(query.prompt) - 1) for query in setup.queries]
    store = capture(model, [query.prompt for query in setup.queries], sites, at, dtype=torch.float32)
    return torch.stack([store[site].unflatten(0, (-1, 2)) for site in sites]).permute(2, 0, 1, 3).flatten(0, 1)
