"""What 004 and 005 measure: models from scratch with exact references, methods at several sizes, one audit for all.

A `Study` says what is trained, what is forgotten, and by which methods; `compute` gives one cell, a row at a size.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments.ensemble import Mean, join
from experiments.scratch import Plan
from mech_unlearn.commands.row import audit_row
from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.metrics import general_kl, mean_ci, recall
from mech_unlearn.metrics.evaluate import TokenRow, score_tokens
from mech_unlearn.metrics.forms import by_form
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import make_queries
from mech_unlearn.restoration import Case, Reference, core_of, reference
from mech_unlearn.verdict.verdict import Thresholds

TRUTH = {"full": "intact", "retrained": "deleted", "last_layer_ascent": "suppressed"}


@dataclass(frozen=True, kw_only=True)
class Size:
    """One request: what methods are given, and what is audited."""

    forget: ForgetSet
    retain: RetainSet
    audited: tuple[Fact, ...]
    kept: tuple[Fact, ...]
    """Kept facts whose recall is measured, and which tests compare with."""
    texts: tuple[str, ...]
    """Running text on which drift is measured."""
    unseen: tuple[str, ...] = ()
    """Running text that no model was trained on: drift on it is told beside, and decides nothing."""
    asked: Mapping[str, tuple[Fact, ...]] = field(default_factory=dict)
    """Further facts whose answers are scored, by what they are called."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """An experiment, ready to run."""

    name: str
    plan: Plan
    sizes: Mapping[str, Size]
    methods: Callable[[Size], Mapping[str, Any]]
    """Row name -> method."""
    extra: Callable[[Model, str], Mapping[str, Any]] | None = None
    """Further numbers of a model (or of constituents that answer together) at a size."""
    locators: Callable[[Model, Size], Mapping[str, Any]] = lambda model, size: {}
    """(Full model, size) -> attributions as JSON."""
    facts: tuple[Fact, ...] = ()
    """All facts, for the hash in the provenance."""
    counts: Mapping[str, Any] = field(default_factory=dict)
    """What was read and what was left out, for the summary."""


Make = Callable[[Path, bool], Study]


def epochs(at: Size, batch: int = 24, least: int = 5, most: int = 40, steps: int = 60) -> int:
    """Passes over a size's forget rows that make about so many steps: a small request is gone through more often."""
    rows = sum(len(fact.templates) for fact in at.forget.facts)
    return min(most, max(least, math.ceil(steps * batch / rows)))


def every(items: Sequence[Any], most: int) -> tuple[Any, ...]:
    """At most so many, evenly spaced."""
    return tuple(items[i * len(items) // most] for i in range(most)) if len(items) > most else tuple(items)


def answered(model: Model, facts: Sequence[Fact]) -> dict[str, Any]:
    """Share of prompts answered in full, share of answer tokens predicted and their probability, teacher-forced."""
    queries = make_queries(model.tokenizer, facts, "templates", distractors=False)
    found = score_tokens(model, [TokenRow(query.full, len(query.answers[0])) for query in queries])
    clusters = [query.fact.group or query.fact.subject for query in queries]
    return {
        "recall": mean_ci(
            (found.exact_memorization == 1).float(), "share of prompts answered in full", clusters
        ).to_json(),
        "tokens": mean_ci(found.exact_memorization, "share of answer tokens predicted", clusters).to_json(),
        "probability": mean_ci(found.probability, "geometric mean probability per answer token", clusters).to_json(),
    }


@dataclass(frozen=True, eq=False)
class Audit:
    """A size in one process: its models, and the restoration tests made ready once."""

    study: Study
    folder: Path
    size: str

    @property
    def at(self) -> Size:
        return self.study.sizes[self.size]

    def open(self, name: str) -> Model:
        return load(str(self.folder / name))

    def retrained_names(self) -> list[str]:
        return [f"retrained-{self.size}-{k}" for k in range(self.study.plan.retrained.get(self.size, 1))]

    def ensemble(self, request: str | None, mean: Mean = "logprob") -> Model:
        return join([self.open(name) for name in self.study.plan.constituents(request)], mean)

    def reference(self) -> Reference:
        case = Case(
            full=self.open("full"), facts=self.at.audited, retrained=tuple(map(self.open, self.retrained_names())),
            others=self.at.kept, texts=self.at.texts, unknown=self.at.retain.unknown, seed=0, log=lambda _: None,
        )  # fmt: skip
        return reference(case, core_of(case))

    @contextmanager
    def subject(self, row: str, ref: Reference) -> Iterator[tuple[Model, str | None, dict[str, Any]]]:
        """(The audited model with its edit in force, the method's class, what fitting cost)."""
        if row in ("full", "retrained"):
            yield (ref.case.full if row == "full" else ref.case.retrained[-1]), None, {}
            return
        method = self.study.methods(self.at)[row]
        model = self.open("full")
        start = time.perf_counter()
        edit = method.fit(model, self.at.forget, self.at.retain)
        fitted = {"fit_seconds": round(time.perf_counter() - start, 1)}
        with edit.on(model):
            yield model, type(method).__name__, fitted


@lru_cache(maxsize=1)
def _ready(make: Make, data: Path, quick: bool, folder: Path, size: str) -> tuple[Audit, Reference, Any]:
    audit = Audit(make(data, quick), folder, size)
    ref = audit.reference()
    return audit, ref, recall(ref.case.full, audit.at.kept, "prompt", 0)


def compute(make: Make, data: Path, quick: bool, folder: Path, size: str, row: str) -> dict[str, Any]:
    """One cell: a row at a size."""
    if row == "locate":
        audit = Audit(make(data, quick), folder, size)
        return {"located": dict(audit.study.locators(audit.open("full"), audit.at))}
    if row == "sisa":
        return _sisa(Audit(make(data, quick), folder, size))
    audit, ref, kept = _ready(make, data, quick, folder, size)
    start, at = time.perf_counter(), audit.at
    with audit.subject(row, ref) as (model, method, fitted):
        cell = audit_row(
            ref, model, name=row, method=method, truth=TRUTH.get(row), neighbors=at.kept, texts=at.texts,
            full_neighbor_recall=kept, thresholds=Thresholds(), seed=0,
        )  # fmt: skip
        if at.unseen:
            cell["row"]["unseen_kl"] = general_kl(ref.case.full, model, at.unseen, 0).to_json()
        forms = by_form(model, at.audited, at.kept)
        cell |= {"asked": {name: answered(model, facts) for name, facts in at.asked.items()}}
        cell |= {"extra": dict(audit.study.extra(model, size)) if audit.study.extra else {}}
    cell["forms"] = {
        name: {
            "recall": scores.recall.mean().to_json(), "probability": scores.probability.mean().to_json(),
            "chance": scores.chance,
        }
        for name, scores in forms.forms.items()
    }  # fmt: skip
    return cell | fitted | {"seconds": round(time.perf_counter() - start, 1), "size": size}


def _sisa(audit: Audit) -> dict[str, Any]:
    """Outputs of the constituents together, before and after the request, and of the unsharded models beside them."""
    at, plan = audit.at, audit.study.plan
    models = {
        "full": audit.open("full"), "retrained": audit.open(audit.retrained_names()[0]),
        "sisa before": audit.ensemble(None), "sisa": audit.ensemble(audit.size),
        "sisa before, mean of probabilities": audit.ensemble(None, "probability"),
        "sisa, mean of probabilities": audit.ensemble(audit.size, "probability"),
    }  # fmt: skip
    found = {
        name: {"forget": answered(model, at.audited), "kept": answered(model, at.kept)}
        | {kind: answered(model, facts) for kind, facts in at.asked.items()}
        for name, model in models.items()
    }
    more = audit.study.extra
    extra, never = ({} if more is None else dict(more(models[name], audit.size)) for name in ("sisa", "retrained"))
    return {
        "outputs": found, "shards": max(plan.shards.values()) + 1, "hit": len(plan.hit(audit.size)),
        "extra": extra, "reference_extra": never, "size": audit.size,
    }  # fmt: skip
