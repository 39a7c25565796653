"""The three levels that every attack is measured between: full, never trained on it, and the audited model as it is.

With retrained models (grade A) "never trained on it" is their mean score. Without (grade B) it is the score that the
full model gives to sham facts, and what an attack injects is the gain of sham facts in the audited model, both
averaged over the facts of a relation, because one sham is one draw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Fact, Site
from mech_unlearn.model.asking import Split
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.scores import RowWrite, Scores, score, score_each
from mech_unlearn.model.tokens import Query
from mech_unlearn.restoration.engine.case import Case, split_queries
from mech_unlearn.restoration.engine.normalise import gains, mean_by_fact, relation_mean, rho, sham_facts


@dataclass(frozen=True)
class QuerySet:
    """The queries of one split, with those about sham facts behind them in grade B."""

    facts: tuple[Fact, ...]
    queries: tuple[Query, ...]
    shams: int
    """How many of the queries, at the end, are about sham facts."""

    @property
    def true(self) -> tuple[Query, ...]:
        """The queries about the facts themselves."""
        return self.queries[: len(self.queries) - self.shams]

    def part(self, mine: Sequence[bool]) -> "QuerySet":
        """The queries about some of the facts."""
        facts = tuple(fact for fact, ok in zip(self.facts, mine, strict=True) if ok)
        ids = {fact.id for fact in facts}
        queries = tuple(query for query in self.queries if query.fact.id in ids)
        return QuerySet(facts, queries, sum(query.fact.id in ids for query in self.queries[len(self.true) :]))

    def asked_as(self, queries: Sequence[Query]) -> "QuerySet":
        """The same facts asked by other queries, one for each."""
        return replace(self, queries=tuple(queries))

    def margins(self, model: Model, writes: Mapping[Site | str, RowWrite] | None = None) -> Float[Tensor, "kind fact"]:
        """Mean margin per fact in nats; row 0 the facts, row 1 (grade B only) their shams."""
        return self.by_fact(score(model, self.queries, writes))

    def margins_each(self, model: Model, arms: Sequence[Mapping[Site, RowWrite]]) -> Float[Tensor, "arm kind fact"]:
        """`margins` under each of several sets of writes."""
        return torch.stack([self.by_fact(scores) for scores in score_each(model, self.queries, arms)])

    def by_fact(self, scores: Scores) -> Float[Tensor, "kind fact"]:
        """`margins` from the scores of the queries."""
        margin, true = scores.margin, len(self.true)
        rows = [mean_by_fact(margin[:true], self.true, self.facts)]
        if self.shams:
            rows.append(mean_by_fact(margin[true:], self.queries[true:], self.facts))
        return torch.stack(rows)


def make_query_set(case: Case, split: Split, facts: Sequence[Fact] | None = None) -> QuerySet:
    """The queries about some facts (default: all of the case), at most `case.prompts` phrasings each."""
    chosen = tuple(case.facts if facts is None else facts)
    shams = () if case.retrained else split_queries(case, split, sham_facts(chosen, case.seed))
    return QuerySet(chosen, split_queries(case, split, chosen) + shams, len(shams))


@dataclass(frozen=True, eq=False)
class Levels:
    """What full and retrained models score on a set of queries, before any attack."""

    query_set: QuerySet
    full: Float[Tensor, " fact"]
    never: Float[Tensor, "retrained fact"]
    """Per retrained model; in grade B one row, the relation's mean margin of sham facts under the full model."""

    @property
    def true(self) -> tuple[Query, ...]:
        """The queries about the facts themselves."""
        return self.query_set.true

    def base(self, keep: Sequence[int]) -> Float[Tensor, " fact"]:
        """The level of a model that never saw the facts, over the retrained models kept."""
        return (self.never[list(keep)] if keep else self.never).mean(0)

    def rho(
        self,
        before: Float[Tensor, "kind fact"],
        after: Float[Tensor, "*point kind fact"],
        after_retrained: Float[Tensor, "retrained *point fact"],
        keep: Sequence[int],
    ) -> Float[Tensor, "*point fact"]:
        """The recoverability of each fact by an attack; see `normalise.rho`.

        Args:
            after_retrained: the retrained models' scores after the same attack; unused in grade B.
            keep: which retrained models to compare with; empty in grade B.
        """
        base = self.base(keep)
        if keep:
            shape = [len(keep), *[1] * (after_retrained.ndim - 2), -1]
            injected = gains(self.never[list(keep)].reshape(shape), after_retrained[list(keep)], base).mean(0)
        else:
            injected = relation_mean(gains(before[1], after[..., 1, :], base), self.query_set.facts)
        return rho(gains(before[0], after[..., 0, :], base), injected, self.full, base)

    def null(self, after_retrained: Float[Tensor, "retrained *point fact"]) -> Float[Tensor, "heldout *point fact"]:
        """rho of each retrained model against the others; no rows with fewer than two of them."""
        models = range(len(after_retrained))
        if len(models) < 2:
            return after_retrained[:0]
        rows = [
            self.rho(
                self.never[k][None],
                after_retrained[k].unsqueeze(-2),
                after_retrained,
                [other for other in models if other != k],
            )
            for k in models
        ]
        return torch.stack(rows)


def make_levels(case: Case, split: Split, facts: Sequence[Fact] | None = None) -> Levels:
    """Score full and retrained models on one split."""
    query_set = make_query_set(case, split, facts)
    full = query_set.margins(case.full)
    if case.retrained:
        never = torch.stack([query_set.margins(model)[0] for model in case.retrained])
    else:
        never = relation_mean(full[1:], query_set.facts)
    return Levels(query_set, full[0], never)
