"""Statements of facts with right and wrong answers: how they are ranked, and a classifier of true ones.

Paper:    K and the classifier: arXiv 2503.15299.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.metrics.intervals import pairs_won
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.forward import last_logits
from mech_unlearn.model.tokens import Query
from mech_unlearn.restoration.engine.case import Case
from mech_unlearn.restoration.states.probe_fit import standardised

STRENGTH = 0.1
"""C of the classifier."""


def ranked(right: Float[Tensor, " right"], wrong: Float[Tensor, " wrong"]) -> float:
    """K: share of the pairs in which the right answer has the higher score, ties 1/2; NaN without a pair."""
    if not len(right) or not len(wrong):
        return float("nan")
    return pairs_won(right, wrong).mean().item()


@dataclass(frozen=True, eq=False)
class Statements:
    """Questions with all their candidates, each as one row of token ids."""

    queries: tuple[Query, ...]
    rows: tuple[tuple[int, ...], ...]
    owner: Int[Tensor, " row"]
    """The query of each row."""
    right: Int[Tensor, " row"]
    """1 for the true answer."""


def statements(queries: Sequence[Query]) -> Statements:
    """One row per question and candidate."""
    rows = [(q, i, c) for q, query in enumerate(queries) for i, c in enumerate(query.answers)]
    return Statements(
        tuple(queries),
        tuple(queries[q].prompt + candidate for q, _, candidate in rows),
        torch.tensor([q for q, _, _ in rows]),
        torch.tensor([int(i == 0) for _, i, _ in rows]),
    )


def k_of(told: Statements, values: Float[Tensor, " row"]) -> Float[Tensor, " query"]:
    """K of each question from the scores of its candidates."""
    out = []
    for q in range(len(told.queries)):
        mine = told.owner == q
        right = mine & (told.right == 1)
        out.append(ranked(values[right], values[mine & (told.right == 0)]))
    return torch.tensor(out)


def even_weights(told: Statements, chosen: Bool[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Weights of the chosen rows under which each answer is as often true as wrong; 0 for one that is only either."""
    names = [row[len(told.queries[q].prompt) :] for row, q in zip(told.rows, told.owner.tolist(), strict=True)]
    count = Counter((name, r) for name, r, ok in zip(names, told.right.tolist(), chosen.tolist(), strict=True) if ok)
    return torch.tensor(
        [
            1 / count[name, r] if ok and count[name, 0] and count[name, 1] else 0.0
            for name, r, ok in zip(names, told.right.tolist(), chosen.tolist(), strict=True)
        ]
    )


def classify(
    train: Float[Tensor, "row d"],
    right: Int[Tensor, " row"],
    weight: Float[Tensor, " row"],
    test: Float[Tensor, "other d"],
) -> Float[Tensor, " other"]:
    """w . h + b of a weighted logistic regression of true and false statements; 0 if only one kind is left."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    used = weight > 0
    if len(right[used].unique()) < 2:
        return torch.zeros(len(test))
    x, y = standardised(train[used][None], test[None])
    scaled = (weight[used] * used.sum() / weight.sum()).numpy()
    with threadpool_limits(1):
        fitted = LogisticRegression(C=STRENGTH, max_iter=1000).fit(x[0].numpy(), right[used].numpy(), scaled)
        return torch.from_numpy(fitted.decision_function(y[0].numpy())).float()


@torch.no_grad()
def sampled(case: Case, model: Model, queries: Sequence[Query], count: int) -> tuple[Query, ...]:
    """The questions with further wrong answers: what the model says at temperature 1, in as many tokens as the true
    answer, unless it is a candidate already."""
    generator, out = torch.Generator().manual_seed(case.seed), []
    for query in queries:
        ids = torch.tensor([query.prompt], device=model.device).expand(count, -1)
        for _ in range(len(query.answers[0])):
            table = last_logits(model, ids, 1)[:, -1].float().softmax(-1).cpu()
            ids = torch.cat([ids, torch.multinomial(table, 1, generator=generator).to(ids.device)], 1)
        said = dict.fromkeys(tuple(row[len(query.prompt) :]) for row in ids.tolist())
        out.append(replace(query, answers=(*query.answers, *(a for a in said if a not in query.answers))))
    return tuple(out)
