"""What the outputs say: log-probability, margin, choice and recall of each fact, on seen and held-out phrasings.

The one test that any suppressor passes. `score_raw` is the margin in nats (log p(true) - log mean p(distractor),
mean log-probability per answer token), kappa places it between retrained (0) and full (1).
Also decides which facts can be tested at all; the others carry the flag `not_testable`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.model.asking import shares_templates
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.scores import FactScores, per_fact, score
from mech_unlearn.model.tokens import Query, make_queries
from mech_unlearn.restoration.engine.case import Case, make_result
from mech_unlearn.restoration.engine.levels import Levels
from mech_unlearn.restoration.engine.normalise import is_testable, kappa, relation_mean, sham_facts
from mech_unlearn.verdict.result import Result


def fact_scores(model: Model, queries: tuple[Query, ...], facts: tuple[Fact, ...]) -> FactScores:
    """Scores per fact, the mean over its queries."""
    return per_fact(score(model, queries), queries, facts)


def heldout_scores(model: Model, queries: tuple[Query, ...], facts: tuple[Fact, ...]) -> FactScores | None:
    """Scores per fact over the held-out phrasings, NaN for a fact without any; None if no fact has one."""
    asked = tuple(fact for fact in facts if fact.heldout)
    if not asked:
        return None
    part = fact_scores(model, queries, asked)
    index = torch.tensor([i for i, fact in enumerate(facts) if fact.heldout])

    def spread(values: Float[Tensor, " asked"]) -> Float[Tensor, " fact"]:
        return torch.full((len(facts),), torch.nan).index_copy(0, index, values)

    return FactScores(*(spread(x) for x in (part.logprob, part.margin, part.choice, part.recall)))


@dataclass(frozen=True, eq=False)
class OutputLevels:
    """Output scores of the full and the retrained models (grade B: of sham facts under the full model)."""

    queries: tuple[Query, ...]
    heldout: tuple[Query, ...]
    full: FactScores
    never: tuple[FactScores, ...]
    margins: Float[Tensor, "retrained fact"]
    testable: Bool[Tensor, " fact"]


def prepare(case: Case, _: Levels | None = None) -> OutputLevels:
    """Score the full and the retrained models on all phrasings."""
    tokenizer = case.full.tokenizer
    queries, heldout = (make_queries(tokenizer, case.facts, which) for which in ("templates", "heldout"))
    full = fact_scores(case.full, queries, case.facts)
    if case.retrained:
        never = tuple(fact_scores(model, queries, case.facts) for model in case.retrained)
        margins = torch.stack([scores.margin for scores in never])
    else:
        shams = sham_facts(case.facts, case.seed)
        never = (fact_scores(case.full, make_queries(tokenizer, shams, "templates"), shams),)
        margins = relation_mean(never[0].margin[None], case.facts)
    counts = torch.tensor([1.0 + len(fact.distractors) for fact in case.facts])
    choices = torch.stack([s.choice for s in never]) if case.retrained else (1 / counts)[None]
    testable = is_testable(full.margin, full.choice, margins, choices, counts)
    return OutputLevels(queries, heldout, full, never, margins, testable)


def audit(case: Case, levels: OutputLevels, model: Model, name: str) -> Result:
    """Score the audited model and place it between retrained and full."""
    known = {id(case.full): levels.full, **{id(r): s for r, s in zip(case.retrained, levels.never)}}
    scores = known.get(id(model)) or fact_scores(model, levels.queries, case.facts)
    heldout = heldout_scores(model, levels.heldout, case.facts)
    keep = case.others_than(model)
    never = levels.margins[keep] if keep else levels.margins
    placed = kappa(scores.margin, levels.full.margin, never)
    columns = {
        "logprob": scores.logprob,
        "margin": scores.margin,
        "choice": scores.choice,
        "recall": scores.recall,
        "recall_F": levels.full.recall,
        "testable": levels.testable.float(),
    }
    if case.retrained:
        columns["recall_R"] = torch.stack([levels.never[k].recall for k in keep]).mean(0)
    if heldout is not None:
        columns |= {"heldout_margin": heldout.margin, "heldout_recall": heldout.recall}
    return make_result(
        case,
        "output",
        name,
        score_raw=scores.margin,
        score_full=levels.full.margin,
        score_retrained=never,
        null=torch.zeros(0, len(case.facts)),
        kappa=placed,
        n_paraphrases=max(len(fact.templates) for fact in case.facts),
        cost_fe=sum(len(fact.templates) + len(fact.heldout) for fact in case.facts) / len(case.facts),
        flags=[_flags(fact, bool(ok)) for fact, ok in zip(case.facts, levels.testable, strict=True)],
        columns=columns,
    )


def _flags(fact: Fact, testable: bool) -> tuple[str, ...]:
    return (*(() if testable else ("not_testable",)), *(("shared_templates",) if shares_templates(fact) else ()))
