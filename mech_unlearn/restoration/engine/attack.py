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
from mech_unlearn.restoration.engine.case import Case
from mech_unlearn.restoration.engine.levels import Levels, Probe, make_levels
from mech_unlearn.restoration.engine.normalise import relation_mean
from mech_unlearn.restoration.engine.result import Result

TUNE_FACTS = 40
"""Facts on which the setting is chosen, at the most; drawn with the seed."""
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


Operate = Callable[[Model, Probe, Probe], Curves]
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


def float32_margins(probe: Probe, model: Model) -> Float[Tensor, "kind fact"]:
    """Margins at the precision in which the model is trained."""
    if not _is_half(model):
        return probe.margins(model)
    with float32_clone(model) as copy:
        return probe.margins(copy)


def float32_levels(case: Case, shared: Levels | None) -> Levels:
    """TEST levels at the precision in which models are trained; the shared ones where none is in half precision."""
    levels = shared or make_levels(case, "test")
    if not any(map(_is_half, (case.full, *case.retrained))):
        return levels
    full = float32_margins(levels.probe, case.full)
    each = [float32_margins(levels.probe, model)[0] for model in case.retrained]
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
    order = torch.randperm(len(case.facts), generator=torch.Generator().manual_seed(case.seed)).tolist()
    tune = make_levels(case, "tune", [case.facts[i] for i in sorted(order[:TUNE_FACTS])])
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
    return Ready(tuple(points), tune, test, tuple(operate(model, tune.probe, test.probe) for model in case.retrained))


def curves_of(case: Case, ready: Ready, model: Model, operate: Operate) -> Curves:
    """The audited model's curves; those of a retrained model of the case are known."""
    known = next((c for c, r in zip(ready.retrained, case.retrained) if r is model), None)
    return known or operate(model, ready.tune.probe, ready.test.probe)


def choose(mean_rho: Float[Tensor, " point"], lost: Float[Tensor, " point"]) -> tuple[int, tuple[str, ...]]:
    """The point of the largest mean rho among those that break no more than `MAX_LOST`; where all break more, the one
    that breaks least, with the flag `collateral`."""
    fine = (lost <= MAX_LOST + 1e-6).nonzero()[:, 0].tolist()
    if not fine:
        return int(lost.argmin()), ("collateral",)
    return max(fine, key=lambda i: mean_rho.nan_to_num(nan=0.0)[i].item()), ()


def _stacked(ready: Ready, which: Literal["tune", "test"]) -> Float[Tensor, "retrained point fact"]:
    found: list[Tensor] = [getattr(c, which)[..., 0, :] for c in ready.retrained]
    return torch.stack(found) if found else torch.zeros(0, len(ready.points), len(getattr(ready, which).full))


def null(ready: Ready) -> Float[Tensor, "heldout fact"]:
    """rho on TEST of each retrained model against the others, each at the point that it chooses on TUNE itself."""
    tune, test = _stacked(ready, "tune"), _stacked(ready, "test")
    if len(test) < 2:
        return torch.zeros(0, len(ready.test.full))
    on_tune, on_test = ready.tune.null(tune), ready.test.null(test)
    picked = [choose(on_tune[k].nanmean(1), c.lost)[0] for k, c in enumerate(ready.retrained)]
    return torch.stack([on_test[k, point] for k, point in enumerate(picked)])


def ignorant(
    case: Case,
    keep: Sequence[int],
    retrained: Float[Tensor, "retrained *point fact"],
    after: Float[Tensor, "*point kind fact"],
) -> Float[Tensor, "never *point fact"]:
    """What an attack makes of models that never knew: the retrained ones, or in grade B one row, the relation's mean
    of the audited model's sham facts under the same attack."""
    return retrained[list(keep)] if keep else relation_mean(after[..., 1, :], case.facts)[None]


def result(
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
    keep, levels = case.others_than(model), ready.test
    tune, after = _stacked(ready, "tune"), _stacked(ready, "test")
    before = levels.probe.margins(model)
    on_tune = ready.tune.rho(ready.tune.probe.margins(model), curves.tune, tune, keep)
    best, warning = choose(on_tune.nanmean(1), curves.lost)
    found = levels.rho(before, curves.test, after, keep)
    never = ignorant(case, keep, after[:, best], curves.test[best])
    base, facts = never.mean(0), len(case.facts)
    gap = levels.full - levels.base(keep)
    axis = tuple(float(a) for a in (alphas or range(len(ready.points))))
    each = flags or [()] * facts
    return Result(
        test=test,
        model_id=name,
        facts=case.facts,
        recoverability=found[best],
        score_raw=curves.test[best, 0],
        score_full=levels.full,
        score_retrained=never,
        null=null(ready),
        grade=case.grade,
        n_paraphrases=case.prompts,
        seed=case.seed,
        cost_fe=cost_fe,
        alpha=axis[best],
        kappa=torch.where(gap > 1e-6, (curves.test[best, 0] - base) / gap, torch.nan),
        rho=found[best],
        flags=tuple((*flag, *warning, f"setting:{ready.points[best]}") for flag in each),
        columns={"before": before[0], "lost_others": curves.lost[best].expand(facts).clone(), **(columns or {})},
        curves={
            "rho": found,
            "margin": curves.test[:, 0],
            "tune_mean_rho": on_tune.nanmean(1)[:, None].expand_as(found),
        },
        curve_axes={name: axis for name in ("rho", "margin", "tune_mean_rho")},
    )


def fe_per_fact(ready: Ready, passes: int) -> float:
    """Forward passes per fact when TUNE and TEST are both scored `passes` times, and once more before the attack."""
    queries = len(ready.tune.probe.queries) + len(ready.test.probe.queries)
    return float((passes + 1) * queries / len(ready.test.full))
