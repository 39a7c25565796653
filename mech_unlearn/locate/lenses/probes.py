"""Probes: at which layer a classifier can read a fact's object off the state, for subjects it was not trained on.

Paper:    Hewitt and Liang 2019, Designing and interpreting probes with control tasks, arXiv 1909.03368: selectivity is
          accuracy minus the accuracy of the same probe on random labels.
Needs:    one forward pass per phrasing, and per layer, relation and fold two fits of a classifier.
Differs:  a control label belongs to a subject and is drawn without replacement, so that both tasks have the same label
          counts. Subjects never straddle folds, so a control label cannot be memorised from another phrasing: the
          control measures chance and leaks, not the capacity of the probe, and selectivity is accuracy above chance.
          No regularisation is searched for.
Fails:    that a probe reads it does not say that the model uses it; a fact kept in the weights of later layers is not
          in the state yet. With few subjects per object even a linearly encoded object is not found.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Entity, Fact, Site, SiteKind
from mech_unlearn.locate.lenses.probe_auc import probe_auc
from mech_unlearn.locate.patching.token_classes import token_classes
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import capture
from mech_unlearn.model.tokens import Query, encode_all, make_queries

MEASURES = ("accuracy", "control accuracy", "selectivity", "majority")
POSITIONS = ("first subject", "last subject", "first after", "last prompt")


@dataclass(frozen=True)
class _Task:
    """The rows of one relation, ordered as the states are."""

    rows: Int[Tensor, " row"]
    """Index of each row among all queries."""
    fact: Int[Tensor, " row"]
    fold: Int[Tensor, " row"]
    label: Int[Tensor, " row"]
    control: Int[Tensor, " row"]


def _task(
    relation: str, facts: Sequence[Fact], of_query: Sequence[int], folds: int, generator: torch.Generator
) -> _Task:
    members = [i for i, fact in enumerate(facts) if fact.relation == relation]
    subjects = list(dict.fromkeys(facts[i].subject for i in members))
    objects = sorted({facts[i].object for i in members})
    if len(objects) < 2 or len(subjects) < 2:
        raise ValueError(
            f"relation {relation!r} has {len(subjects)} subjects and {len(objects)} objects: a probe needs two of each"
        )
    of_subject = {facts[i].subject: objects.index(facts[i].object) for i in members}
    if clash := [facts[i] for i in members if of_subject[facts[i].subject] != objects.index(facts[i].object)]:
        raise ValueError(f"subject {clash[0].subject!r} has two objects for {relation!r}: a probe predicts one of them")
    parts = torch.randperm(len(subjects), generator=generator) % min(folds, len(subjects))
    drawn = torch.randperm(len(subjects), generator=generator).tolist()
    at = {name: i for i, name in enumerate(subjects)}
    labels = torch.tensor([of_subject[name] for name in subjects])
    rows = [row for row, i in enumerate(of_query) if facts[i].relation == relation]
    who = torch.tensor([at[facts[of_query[row]].subject] for row in rows])
    fact = torch.tensor([of_query[row] for row in rows])
    return _Task(torch.tensor(rows), fact, parts[who], labels[who], labels[drawn][who])


def _classifier(kind: str, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind == "linear":
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return make_pipeline(StandardScaler(), MLPClassifier((64,), max_iter=500, random_state=seed))


def _hits(
    x: Float[Tensor, "row d"], label: Int[Tensor, " row"], fold: Int[Tensor, " row"], kind: str, seed: int
) -> Bool[Tensor, " row"]:
    """Whether a probe trained on the other folds predicts each row's label.

    On one thread: small fits gain nothing from more, and lose a hundredfold where another process has the cores.
    """
    import numpy as np
    from threadpoolctl import threadpool_limits

    table, wanted, out = x.float().numpy(), label.numpy(), torch.zeros(len(label), dtype=torch.bool)
    for number in fold.unique().tolist():
        test = (fold == number).numpy()
        seen = np.unique(wanted[~test])
        if len(seen) == 1:
            guess = np.full(test.sum(), seen[0])
        else:
            with threadpool_limits(1):
                guess = _classifier(kind, seed).fit(table[~test], wanted[~test]).predict(table[test])
        out[torch.from_numpy(test)] = torch.from_numpy(guess == wanted[test])
    return out


def _majority(label: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Share of right guesses when the most frequent label of all is always guessed; ties share."""
    counts = torch.bincount(label)
    best = counts == counts.max()
    return best[label].float() / best.sum()


def _positions(queries: Sequence[Query], at: str) -> list[int]:
    found = []
    for query in queries:
        places = token_classes(query)[at]
        if not places:
            raise ValueError(f"fact {query.fact.id!r}, prompt {query.template!r}: no {at!r} token; choose another `at`")
        found.append(places[0])
    return found


def probe_per_fact(
    model: Model,
    facts: Sequence[Fact],
    *,
    kind: str = "linear",
    at: str = "last subject",
    site: SiteKind = "resid_post",
    folds: int = 5,
    seed: int = 0,
    max_tokens: int = 8192,
) -> Attribution:
    """Share of each fact's phrasings that probes get right at each layer: axes (fact, measure, layer); see `probe`."""
    if not facts:
        raise ValueError("no facts to locate: give at least one")
    if kind not in ("linear", "mlp") or at not in POSITIONS or folds < 2:
        raise ValueError(
            f"kind={kind!r}, at={at!r}, folds={folds}: choose linear or mlp, one of {', '.join(POSITIONS)}, and two "
            "folds or more"
        )
    queries = make_queries(model.tokenizer, facts, distractors=False)
    order = {fact.id: i for i, fact in enumerate(facts)}
    of_query = [order[query.fact.id] for query in queries]
    generator = torch.Generator().manual_seed(seed)
    relations = dict.fromkeys(fact.relation for fact in facts)
    tasks = [_task(relation, facts, of_query, folds, generator) for relation in relations]
    sites = [Site(layer, site) for layer in range(model.n_layers)]
    store = capture(model, [q.prompt for q in queries], sites, _positions(queries, at), max_tokens=max_tokens)
    sums, count = torch.zeros(len(facts), len(MEASURES), model.n_layers), torch.bincount(torch.tensor(of_query))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for task in tasks:
            sums[:, 3] += _sum(_majority(task.label), task.fact, len(facts))[:, None]
            for layer, place in enumerate(sites):
                x = store[place][task.rows]
                for measure, label in enumerate((task.label, task.control)):
                    hits = _hits(x, label, task.fold, kind, seed)
                    sums[:, measure, layer] += _sum(hits, task.fact, len(facts))
    sums[:, 2] = sums[:, 0] - sums[:, 1]
    unfinished = sum("Convergence" in w.category.__name__ for w in caught)
    for w in caught:
        if "Convergence" not in w.category.__name__:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    warned = f"; {unfinished} fits did not converge" if unfinished else ""
    return Attribution(
        name=f"{kind} probe at {at}",
        values=sums / count[:, None, None],
        axes=("fact", "measure", "layer"),
        labels={"fact": tuple(f.id for f in facts), "measure": MEASURES, "layer": tuple(range(model.n_layers))},
        unit="share of prompts classified",
        n=len(facts),
        note=f"{len(tasks)} relations, {site}, {len(queries)} prompts, {folds} folds by subject{warned}",
    )


def _sum(values: Tensor, index: Int[Tensor, " row"], size: int) -> Float[Tensor, " fact"]:
    return torch.zeros(size).index_add(0, index, values.float())


def probe(
    model: Model,
    facts: Sequence[Fact],
    *,
    kind: str = "linear",
    at: str = "last subject",
    site: SiteKind = "resid_post",
    folds: int = 5,
    seed: int = 0,
    max_tokens: int = 8192,
) -> Attribution:
    """How well the object is read off the state at each layer, for unseen subjects: axes (measure, layer), shares.

    One probe per relation and layer; its classes are the objects of these facts. Cross-validated; all phrasings of a
    subject fall into one fold, and inputs are standardised inside each. Measures: accuracy; control accuracy (the same
    with labels shuffled over subjects); selectivity, their difference; majority, the accuracy of always guessing the
    most frequent object of a relation. The mean over facts, hence over relations weighted by their facts. The
    interval is over subjects, for the folds and control labels of this seed.

    Args:
        kind: "linear" (logistic regression, L2 with C = 1) or "mlp" (one hidden layer of 64 units).
        at: the token whose state is read: first or last of the subject, first after it, or last of the prompt.
        site: kind of site that is read at every layer.

    Raises:
        ValueError: no facts, a relation with fewer than two objects or subjects, a subject with two objects for a
            relation, a prompt without such a token, or settings out of range.
    """
    each = probe_per_fact(model, facts, kind=kind, at=at, site=site, folds=folds, seed=seed, max_tokens=max_tokens)
    return each.mean(facts)


def _auc_half(auc: float, first: int, second: int) -> float:
    """Half width of the normal 95 % interval of an AUC of two groups. Source: Hanley and McNeil 1982, Radiology 143."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (second - 1) * (q1 - auc**2) + (first - 1) * (q2 - auc**2)
    return 1.96 * (max(variance, 0.0) / (first * second)) ** 0.5


def _shuffled(first: int, second: int, shuffles: int, generator: torch.Generator) -> Int[Tensor, "shuffle entity"]:
    """Orders of the entities whose first `first` places hold both groups in their proportion (to rounding)."""
    taken = round(first * first / (first + second))
    rows = []
    for _ in range(shuffles):
        a = torch.randperm(first, generator=generator)
        b = first + torch.randperm(second, generator=generator)
        rows.append(torch.cat([a[:taken], b[: first - taken], a[taken:], b[first - taken :]]))
    return torch.stack(rows)


def probe_groups(
    model: Model,
    first: Sequence[Entity],
    second: Sequence[Entity],
    templates: Sequence[str],
    *,
    site: SiteKind = "resid_post",
    folds: int = 5,
    shuffles: int = 5,
    seed: int = 0,
) -> Attribution:
    """How well a linear probe tells two groups of entities apart at each layer: axes (measure, layer), AUC.

    Read at the last token of each name, in each template cut after the name. Trained on some entities and tested on
    others (`methods.probe.probe_auc`); "control AUC" is the same after shuffling who belongs to which group, each
    new group with the same mix of both, mean over shuffles. 95 % normal interval over entities.

    Args:
        templates: contexts with one {} for the name; those that become equal when cut count once.

    Raises:
        ValueError: a group of fewer than two entities, an entity in both, no template or one without exactly one {}.
    """
    if both := {e.name for e in first} & {e.name for e in second}:
        raise ValueError(f"entity {min(both)!r} stands in both groups")
    if min(len(first), len(second)) < 2:
        raise ValueError(f"a probe needs two entities on each side, got {len(first)} and {len(second)}")
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"template {wrong[0]!r} must hold exactly one {{}} for the entity")
    if shuffles < 1 or folds < 2:
        raise ValueError(f"shuffles={shuffles}, folds={folds}: one shuffle and two folds or more")
    prefixes = list(dict.fromkeys(template.split("{}")[0] for template in templates))
    if not prefixes:
        raise ValueError("no template: give at least one context for the names, for example '{}'")
    texts = [prefix + entity.name for entity in (*first, *second) for prefix in prefixes]
    known = encode_all(model.tokenizer, texts)
    sites = [Site(layer, site) for layer in range(model.n_layers)]
    store = capture(model, [known[text].ids for text in texts], sites, "last")
    mixed = _shuffled(len(first), len(second), shuffles, torch.Generator().manual_seed(seed))
    values, half = torch.zeros(2, model.n_layers), torch.zeros(2, model.n_layers)
    for layer, place in enumerate(sites):
        states = store[place].unflatten(0, (-1, len(prefixes)))
        for measure, orders in enumerate((torch.arange(len(states))[None], mixed)):
            aucs = [probe_auc(x[: len(first)], x[len(first) :], folds=folds, seed=seed) for x in states[orders]]
            auc = sum(aucs) / len(aucs)
            values[measure, layer], half[measure, layer] = auc, _auc_half(auc, len(first), len(second))
    return Attribution(
        name="linear probe of two groups",
        values=values,
        axes=("measure", "layer"),
        labels={"measure": ("AUC", "control AUC"), "layer": tuple(range(model.n_layers))},
        unit="AUC",
        n=len(first) + len(second),
        low=(values - half).clamp(min=0),
        high=(values + half).clamp(max=1),
        note=f"{len(first)} and {len(second)} entities, {len(prefixes)} contexts, {site}; 95 % normal interval over "
        "entities (Hanley and McNeil 1982)",
    )
