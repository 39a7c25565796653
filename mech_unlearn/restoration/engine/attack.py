"""What attacks with a choice of settings share: the setting is chosen on TUNE, scores are differences in differences.

An attack is run at every setting (*point*) on the audited and on each retrained model, on TUNE and on TEST phrasings.
The point with the largest mean rho on TUNE is reported on TEST. Held-out retrained models choose their own point in
the same way, so that the null contains what choosing gains.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.edit.attach import attached
from mech_unlearn.edit.edit import clone
from mech_unlearn.model.asking import split_templates
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import score
from mech_unlearn.model.tokens import Ask, Query, tokenize
from mech_unlearn.restoration.engine.case import Case, tune_facts
from mech_unlearn.restoration.engine.gain import gain_result, measure_gain
from mech_unlearn.restoration.engine.levels import Levels, QuerySet, make_levels
from mech_unlearn.restoration.engine.normalise import relation_mean
from mech_unlearn.verdict.result import Result

OTHER_FACTS = 200
"""Other facts on which damage is measured, at the most: enough for `MAX_LOST` to be four of them."""
MAX_LOST = 0.02
"""Share of other facts that an attack on weights may lose. Source: two points, the bound of arXiv 2402.05162. Where a
case has fewer than 50 of them, none."""


@dataclass(frozen=True, eq=False)
class Curves:
    """What one model scores at each setting of an attack."""

    tune: Float[Tensor, "point kind tune_fact"]
    test: Float[Tensor, "point kind fact"]
    lost: Float[Tensor, " point"]
    """Share of other facts that were answered before the attack and no longer are; 0 where it was not measured."""


Operate = Callable[[Model, QuerySet, QuerySet], Curves]
"""(model, TUNE, TEST) -> its curves under the attack."""


@dataclass(frozen=True, eq=False)
class Ready:
    """Levels and the retrained models' curves."""

    points: tuple[str, ...]
    """The settings, in words."""
    tune: Levels
    test: Levels
    retrained: tuple[Curves, ...]


def same(tune: Sequence[Tensor], test: Sequence[Tensor]) -> Curves:
    """Curves of an attack that cannot break other facts."""
    return Curves(torch.stack(list(tune)), torch.stack(list(test)), torch.zeros(len(tune)))


def _is_half(model: Model) -> bool:
    return any(weight.dtype.itemsize < 4 for weight in model.held.values())


@contextmanager
def float32_clone(model: Model) -> Iterator[Model]:
    """A clone to be trained, with the same interventions in force; float32 where the model is in half precision.

    A step of 1e-5 is below the resolution of bfloat16, and float16 turns NaN.
    """
    if not _is_half(model):
        with clone(model) as copy:
            yield copy
        return
    copy = load(model.plain_copy().float(), tokenizer=model.tokenizer)
    with attached(tuple(model.in_force.interventions), copy):
        yield copy


def float32_margins(query_set: QuerySet, model: Model) -> Float[Tensor, "kind fact"]:
    """Margins at the precision in which the model is trained."""
    if not _is_half(model):
        return query_set.margins(model)
    with float32_clone(model) as copy:
        return query_set.margins(copy)


def float32_levels(case: Case, shared: Levels | None) -> Levels:
    """TEST levels at the precision in which models are trained; the shared ones where none is in half precision."""
    levels = shared or make_levels(case, "test")
    if not any(map(_is_half, (case.full, *case.retrained))):
        return levels
    full = float32_margins(levels.query_set, case.full)
    each = [float32_margins(levels.query_set, model)[0] for model in case.retrained]
    return replace(levels, full=full[0], never=torch.stack(each) if each else relation_mean(full[1:], case.facts))


def drawn(case: Case, facts: Sequence[Fact], limit: int) -> tuple[Fact, ...]:
    """At most `limit` of the facts, drawn with the seed, in their order."""
    chosen = random.Random(case.seed).sample(range(len(facts)), min(limit, len(facts)))
    return tuple(facts[i] for i in sorted(chosen))


def other_queries(case: Case) -> tuple[Query, ...]:
    """Prompts about other subjects, on which damage is measured, with the true answer only; none without such facts."""
    facts = drawn(case, case.others, OTHER_FACTS)
    asks = [Ask(fact, split_templates(fact, "tune")[0]) for fact in facts]
    return tokenize(case.full.tokenizer, asks, distractors=False)


def recalled(model: Model, queries: Sequence[Query]) -> Bool[Tensor, " query"]:
    """Which of the queries greedy decoding answers."""
    return score(model, queries).exact


def lost_share(before: Bool[Tensor, " query"], after: Bool[Tensor, " query"]) -> float:
    """Share of the queries that were answered before and are not after; what is newly answered makes up for none."""
    return (before & ~after).float().mean().item() if len(before) else 0.0


def both_levels(case: Case, shared: Levels | None) -> tuple[Levels, Levels]:
    """TUNE levels of at most `TUNE_FACTS` facts, and TEST levels of all."""
    tune = make_levels(case, "tune", [case.facts[i] for i in tune_facts(case)])
    return tune, shared or make_levels(case, "test")


def prepare(
    case: Case,
    shared: Levels | None,
    points: Sequence[str],
    operate: Operate,
    levels: tuple[Levels, Levels] | None = None,
) -> Ready:
    """Run the attack on the retrained models.

    Raises:
        ValueError: no settings.
    """
    if not points:
        raise ValueError("an attack needs at least one setting")
    tune, test = levels or both_levels(case, shared)
    return Ready(
        tuple(points), tune, test, tuple(operate(model, tune.query_set, test.query_set) for model in case.retrained)
    )


def curves_of(case: Case, ready: Ready, model: Model, operate: Operate) -> Curves:
    """The audited model's curves; those of a retrained model of the case are known."""
    index = case.index_of(model)
    return operate(model, ready.tune.query_set, ready.test.query_set) if index is None else ready.retrained[index]


def choose_setting(mean_rho: Float[Tensor, " point"], lost: Float[Tensor, " point"]) -> tuple[int, tuple[str, ...]]:
    """The point of the largest mean rho among those that break no more than `MAX_LOST`; where all break more, the one
    that breaks least, with the flag `collateral`."""
    fine = (lost <= MAX_LOST + 1e-6).nonzero()[:, 0].tolist()
    if not fine:
        return int(lost.argmin()), ("collateral",)
    return max(fine, key=lambda i: mean_rho.nan_to_num(nan=0.0)[i].item()), ()


def _stacked(ready: Ready, which: Literal["tune", "test"]) -> Float[Tensor, "retrained point fact"]:
    found: list[Tensor] = [getattr(c, which)[..., 0, :] for c in ready.retrained]
    return torch.stack(found) if found else torch.zeros(0, len(ready.points), len(getattr(ready, which).full))


def setting_null(ready: Ready) -> Float[Tensor, "heldout fact"]:
    """rho on TEST of each retrained model against the others, each at the point that it chooses on TUNE itself."""
    on_tune, on_test = ready.tune.null(_stacked(ready, "tune")), ready.test.null(_stacked(ready, "test"))
    if not len(on_test):
        return torch.zeros(0, len(ready.test.full))
    picked = [choose_setting(on_tune[k].nanmean(1), c.lost)[0] for k, c in enumerate(ready.retrained)]
    return torch.stack([on_test[k, point] for k, point in enumerate(picked)])


def attack_result(
    case: Case,
    ready: Ready,
    model: Model,
    curves: Curves,
    *,
    test: str,
    name: str,
    cost_fe: float,
    alphas: Sequence[float] | None = None,
    columns: Mapping[str, Float[Tensor, " fact"]] | None = None,
    flags: Sequence[tuple[str, ...]] | None = None,
) -> Result:
    """Choose the setting on TUNE and report it on TEST.

    `kappa` is where the attacked model stands between the attacked retrained models (0) and full (1): what is there
    after the attack, lost before or not. rho, the recoverability, counts only what the attack brought back.

    Args:
        alphas: the settings as numbers, for the axis of the curves; their order otherwise.
    """
    gain = measure_gain(case, ready.test, _stacked(ready, "test"), model, lambda _: curves.test)
    tune, levels = ready.tune, ready.test
    tuned = tune.rho(tune.query_set.margins(model), curves.tune, _stacked(ready, "tune"), gain.keep).nanmean(1)
    best, warning = choose_setting(tuned, curves.lost)
    chosen, room = gain.at(best), levels.full - levels.base(gain.keep)
    axis = tuple(float(a) for a in (alphas or range(len(ready.points))))
    found = gain_result(
        case,
        replace(chosen, null=setting_null(ready), ignorant=chosen.ignorant.contiguous()),
        test=test,
        name=name,
        cost_fe=cost_fe,
        flags=[(*flag, *warning, f"setting:{ready.points[best]}") for flag in flags or [()] * len(case.facts)],
        columns={"lost_others": curves.lost[best].item(), **(columns or {})},
        curves={"rho": gain.rho, "margin": gain.after, "tune_mean_rho": tuned[:, None].expand_as(gain.rho)},
        axis=axis,
    )
    kappa = torch.where(room > 1e-6, (chosen.after - chosen.ignorant.mean(0)) / room, torch.nan)
    return replace(found, alpha=axis[best], kappa=kappa)


def fe_per_fact(ready: Ready, passes: int) -> float:
    """Forward passes per fact when TUNE and TEST are both scored `passes` times, and once more before the attack."""
    queries = len(ready.tune.query_set.queries) + len(ready.test.query_set.queries)
    return float((passes + 1) * queries / len(ready.test.full))
