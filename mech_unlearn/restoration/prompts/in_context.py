"""Context: do other true facts about the subject, told first, bring the answer back?

Paper:    UnUnlearning, arXiv 2407.00106 (knowledge reintroduced in context; conceptual only, no numbers).
Changes:  nothing in the model; k statements stand before the TEST question, k in 1, 2, 4, 8.
Needs:    one scoring per number of statements of U and of each retrained model, and one with the answer in context.
Differs:  statements are other facts of the case about the same subject, in SELECT phrasings, none of which contains
          the answer; a statement that does is left out. The context that defines the answer is only a control of
          whether the model reads its context at all, and never counts.
Fails:    a subject with one fact has no answer-free context (flag `no_context`: plain question, nothing gained).

`score_raw` is the margin in nats at the number of statements chosen on TUNE; recoverability is rho. `reads_context` is
the gain in nats from a context that states the answer: it must rise in retrained models too.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.model.asking import Rewrite, split_templates
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import Ask, Query
from mech_unlearn.restoration.engine import prompting
from mech_unlearn.restoration.engine.case import Case
from mech_unlearn.restoration.engine.levels import Levels
from mech_unlearn.restoration.engine.prompting import PromptReady
from mech_unlearn.verdict.result import Result

COUNTS = (1, 2, 4, 8)
"""Statements told first."""


def told_sentence(fact: Fact) -> str:
    """A fact as a sentence, in its SELECT phrasing."""
    return f"{fact.stated(split_templates(fact, 'select')[0])}."


def states_answer(case: Case, fact: Fact, text: str) -> bool:
    """Whether a text holds the fact's answer, true or sham, in whatever case."""
    answers = {f.object for f in case.facts if f.id == fact.id} | {fact.object}
    return any(answer.casefold() in text.casefold() for answer in answers)


def told(case: Case, fact: Fact, count: int) -> list[str]:
    """Up to `count` statements about the fact's subject, without its answer (true or sham)."""
    mine = [f for f in (*case.facts, *case.others) if f.subject == fact.subject and f.id != fact.id]
    free = [told_sentence(f) for f in mine if f.relation != fact.relation]
    return [text for text in free if not states_answer(case, fact, text)][:count]


def context(case: Case, count: int) -> Rewrite:
    """Answer-free context of up to `count` statements."""

    def rewrite(query: Query) -> Ask | None:
        texts = told(case, query.fact, count)
        return Ask(query.fact, " ".join([*texts, query.template])) if texts else None

    return rewrite


def definition(query: Query) -> Ask:
    """The answer itself, told first: a control."""
    return Ask(query.fact, f"{told_sentence(query.fact)} {query.template}")


@dataclass(frozen=True, eq=False)
class ContextReady:
    prompts: PromptReady
    retrained: Float[Tensor, "retrained fact"]
    """Gain in nats from a context that states the answer."""


def _reading(case: Case, prompts: PromptReady, model: Model) -> Float[Tensor, " fact"]:
    query_set = prompts.ready.test.query_set
    return (prompting.margins(case, query_set, model, definition) - query_set.margins(model))[0]


def prepare(case: Case, shared: Levels | None = None, *, counts: tuple[int, ...] = COUNTS) -> ContextReady:
    """Tell the retrained models the same contexts.

    Raises:
        ValueError: no fact has an answer-free context, or a count below 1.
    """
    if min(counts, default=0) < 1:
        raise ValueError(f"in-context statements are counted from 1, got {counts}")
    prompts = prompting.prepare(case, shared, {f"{k} statements": context(case, k) for k in counts})
    reads = [_reading(case, prompts, model) for model in case.retrained]
    return ContextReady(prompts, torch.stack(reads) if reads else torch.zeros(0, len(case.facts)))


def audit(case: Case, ready: ContextReady, model: Model, name: str) -> Result:
    """Tell the audited model the contexts."""
    keep = case.others_than(model)
    columns = {"reads_context": _reading(case, ready.prompts, model)}
    if keep:
        columns["reads_context_R"] = ready.retrained[keep].mean(0)
    return prompting.audit(
        case,
        ready.prompts,
        model,
        name,
        test="in_context",
        columns=lambda _: columns,
        alphas=[float(label.split()[0]) for label in ready.prompts.rewrites],
        flags=[() if told(case, fact, 1) else ("no_context",) for fact in case.facts],
    )
