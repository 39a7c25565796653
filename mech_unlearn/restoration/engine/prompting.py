"""What attacks on the prompt share: rewrite the queries, score them, choose the rewriting on TUNE.

A rewriting turns one query into an `Ask` (or None where it does not apply: the fact keeps its plain question, which
counts as nothing gained). Punctuation that the tokenizer has no token for is left away; rewritings whose words it
cannot write are left out, with a line in the log and a flag.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mech_unlearn.model.asking import Rewrite, rewritten
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import Query
from mech_unlearn.restoration.engine import attack
from mech_unlearn.restoration.engine.attack import Curves, Ready
from mech_unlearn.restoration.engine.case import Case
from mech_unlearn.restoration.engine.levels import Levels, QuerySet
from mech_unlearn.verdict.result import Result


@dataclass(frozen=True, eq=False)
class PromptReady:
    """A prepared attack on the prompt."""

    ready: Ready
    rewrites: Mapping[str, Rewrite]
    left_out: tuple[str, ...]
    """Rewritings that the tokenizer cannot write."""


def _writable(case: Case, queries: Sequence[Query], rewrite: Rewrite) -> str | None:
    """Why the rewriting cannot be used, or None."""
    try:
        made = rewritten(case.full, queries, rewrite)
    except ValueError as error:
        return str(error)
    if all(new is old for new, old in zip(made, queries, strict=True)):
        return "it applies to none of the facts"
    return None


def margins(case: Case, query_set: QuerySet, model: Model, rewrite: Rewrite) -> Float[Tensor, "kind fact"]:
    """Margins per fact in nats when the queries are rewritten."""
    return query_set.asked_as(rewritten(case.full, query_set.queries, rewrite)).margins(model)


def _operate(case: Case, rewrites: Sequence[Rewrite], model: Model, tune: QuerySet, test: QuerySet) -> Curves:
    on_tune, on_test = (
        [margins(case, query_set, model, rewrite) for rewrite in rewrites] for query_set in (tune, test)
    )
    return attack.same(on_tune, on_test)


def prepare(case: Case, shared: Levels | None, rewrites: Mapping[str, Rewrite]) -> PromptReady:
    """Drop the rewritings that cannot be written or apply nowhere, and ask the retrained models all others.

    Raises:
        ValueError: no rewriting is left.
    """
    levels = attack.both_levels(case, shared)
    queries = (*levels[0].query_set.queries, *levels[1].query_set.queries)
    reasons = {name: _writable(case, queries, rewrite) for name, rewrite in rewrites.items()}
    for name, reason in reasons.items():
        if reason is not None:
            case.log(f"{name} is left out: {reason}")
    kept = {name: rewrite for name, rewrite in rewrites.items() if reasons[name] is None}
    if not kept:
        raise ValueError(f"no rewriting of the prompts can be used: {next(iter(reasons.values()), 'none was given')}")
    ready = attack.prepare(case, shared, tuple(kept), lambda *args: _operate(case, tuple(kept.values()), *args), levels)
    return PromptReady(ready, kept, tuple(name for name in rewrites if name not in kept))


def audit(
    case: Case,
    prompts: PromptReady,
    model: Model,
    name: str,
    *,
    test: str,
    columns: Callable[[Curves], Mapping[str, Float[Tensor, " fact"]]] = lambda _: {},
    alphas: Sequence[float] | None = None,
    flags: Sequence[tuple[str, ...]] | None = None,
) -> Result:
    """Ask the audited model every rewriting and report the one chosen on TUNE; all of them in the curves."""
    ready, rewrites = prompts.ready, tuple(prompts.rewrites.values())
    curves = attack.curves_of(case, ready, model, lambda *args: _operate(case, rewrites, *args))
    missing = tuple(f"left_out:{name}" for name in prompts.left_out)
    marks = [(*flag, *missing) for flag in (flags or [()] * len(case.facts))]
    return attack.attack_result(
        case,
        ready,
        model,
        curves,
        test=test,
        name=name,
        cost_fe=attack.fe_per_fact(ready, len(rewrites)),
        alphas=alphas,
        columns=columns(curves),
        flags=marks,
    )
