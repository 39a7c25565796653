"""Relearning: after teaching a part of the forget set again, do the untaught facts come back too?

Paper:    Do unlearning methods remove information from language model weights? arXiv 2410.08827 (teach facts T,
          score independent facts V), difference in differences against retrained models as proposed here. Other sets
          to teach: unrelated samples, arXiv 2409.18025; syntax rather than topic, arXiv 2602.03379.
Changes:  float32 clones of the audited and of the retrained models; all weights are trained, or LoRA factors of rank
          16 of the linear layers (`relearn_lora`, see `update`).
Needs:    `folds` short trainings per model: steps x batch x 3 forward passes each.
Differs:  the forget set is cut into folds, by subject or by fact; each fold is scored after all the others were
          taught, so that every fact gets a score. Learning rate scaled with width instead of a grid. Models in half
          precision are trained, and scored before and after, as float32 copies. A fact's score
          is the mean of rho over the later half of the step grid, because single steps are noisy. `teach` names what
          is taught: `rest` (the other folds; the default), `direct` (the fold's own facts: an upper bound that
          injects), `benign` (statements about other subjects, all tokens), `unrelated` (ten running texts that name no
          forgotten subject or answer), `syntax` (the same questions about unknown names with random answers).
Fails:    facts that depend on each other (T implies V) come back in a retrained model too; that is subtracted, but
          it eats the room.
          Without retrained models nothing tells what direct teaching injects: recoverability is NaN there, with the
          flag `needs_retrained`.

`score_raw` is the margin in nats after the last step; recoverability is the mean rho over the later half of steps.
`savings` = 1 - n_U / n_R, n the first step of the grid at which the margin stands half-way between retrained and full;
a model that never gets there counts as the last step (0 = no faster than retrained models, NaN where neither does).
Without retrained models n_R is that of the audited model's sham facts, averaged over the relation.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.model.bridge import Model
from mech_unlearn.model.pieces import token_rows
from mech_unlearn.model.tokens import Ask, pad, tokenize
from mech_unlearn.restoration.engine import attack
from mech_unlearn.restoration.engine.case import Case, irrelevant_texts
from mech_unlearn.restoration.engine.gain import gain_result, margins_after, measure_gain
from mech_unlearn.restoration.engine.lessons import (
    Lesson,
    by_fold,
    fold_lessons,
    fold_of,
    lesson_batches,
    lesson_loss,
    lessons,
    taught_templates,
)
from mech_unlearn.restoration.engine.levels import Levels, QuerySet
from mech_unlearn.restoration.weights.quantize import coverage_flags, linear_weights
from mech_unlearn.restoration.weights.update import every_weight, low_rank
from mech_unlearn.verdict.result import Result

Teach = Literal["rest", "direct", "benign", "unrelated", "syntax"]
UNRELATED = 10
"""Running texts of the set `unrelated`. Source: arXiv 2409.18025 (ten unrelated examples)."""


def unrelated_lessons(case: Case) -> list[Lesson]:
    """Ten of the case's texts that name no forgotten subject and no answer, cut where the model's positions end; the
    loss is over all tokens.

    Raises:
        ValueError: no such text.
    """
    texts = irrelevant_texts(case)
    if not texts:
        raise ValueError("relearning unrelated text needs Case(texts=...) that name no forgotten subject or answer")
    chosen = random.Random(case.seed).sample(texts, min(UNRELATED, len(texts)))
    return [(row, 1) for row in token_rows(case.full, chosen) if len(row) > 1]


def benign_lessons(case: Case) -> list[Lesson]:
    """Statements about other subjects, as many as forgotten ones at the most; the loss is over all tokens.

    Raises:
        ValueError: no facts about other subjects.
    """
    forgotten = {fact.subject for fact in case.facts}
    others = [fact for fact in case.others if fact.subject not in forgotten]
    if not others:
        raise ValueError("relearning benign text needs facts about other subjects: Case(others=...)")
    chosen = random.Random(case.seed).sample(others, min(len(case.facts), len(others)))
    return [(row, 1) for row, _ in lessons(case, chosen)]


def syntax_lessons(case: Case) -> list[Lesson]:
    """The forgotten questions about unknown names, answered by a random object of the relation; answer-only loss.

    Raises:
        ValueError: no unknown names.
    """
    if not case.unknown:
        raise ValueError("relearning by syntax needs names that no model knows: Case(unknown=...)")
    draw, asks = random.Random(case.seed), []
    for fact in case.facts:
        pool = sorted({o.object for o in case.facts if o.relation == fact.relation} | {*fact.distractors})
        told = replace(fact, subject=draw.choice(case.unknown).name, object=draw.choice(pool), distractors=())
        asks += [Ask(told, template) for template in taught_templates(fact)]
    return [(query.full, len(query.prompt)) for query in tokenize(case.full.tokenizer, asks, distractors=False)]


def relearn_curve(
    case: Case, query_set: QuerySet, model: Model, rows: Sequence[Lesson], seed: int, rank: int | None = None
) -> Float[Tensor, "step kind fact"]:
    """Margins of the facts after each number of steps of the grid, from training a clone on the rows: all its
    weights, or with a rank LoRA factors."""
    settings = case.relearn
    generator = torch.Generator().manual_seed(seed)
    curve = []
    with attack.float32_clone(model) as copy:
        lr = settings.lr_times_width / copy.d_model
        descend = every_weight(copy, lr) if rank is None else low_rank(copy, lr, rank, seed)
        for step, batch in enumerate(lesson_batches(rows, settings.batch, settings.steps[-1], generator), 1):
            with torch.enable_grad():
                loss = _batch_loss(copy, batch)
            descend(loss)
            if step in settings.steps:
                curve.append(query_set.margins(copy))
    return torch.stack(curve)


def _batch_loss(model: Model, batch: Sequence[Lesson]) -> Float[Tensor, ""]:
    ids, mask, _ = pad([row for row, _ in batch], model.tokenizer.pad_token_id or 0)
    ids, mask = ids.to(model.device), mask.to(model.device)
    return lesson_loss(model, ids, [start for _, start in batch], [len(row) for row, _ in batch], mask)


@dataclass(frozen=True, eq=False)
class RelearnLevels:
    levels: Levels
    folds: tuple[int, ...]
    lessons: tuple[list[Lesson], ...]
    """For each fold what is taught before it is scored: by default the facts of all other folds."""
    retrained: Float[Tensor, "retrained step fact"]
    teach: Teach = "rest"
    rank: int | None = None
    """Rank of the LoRA factors that are trained; None: all weights."""


def _all_folds(case: Case, ready: RelearnLevels, model: Model) -> Float[Tensor, "step kind fact"]:
    """The curve of each fact from the run in which its own fold was not taught."""

    def score(fold: int, part: QuerySet) -> Float[Tensor, "step kind some"]:
        return relearn_curve(case, part, model, ready.lessons[fold], case.seed + fold, ready.rank)

    return by_fold(ready.levels.query_set, ready.folds, score)


def _curriculum(case: Case, teach: Teach) -> tuple[tuple[int, ...], tuple[list[Lesson], ...]]:
    """The fold of each fact, and what is taught before each fold is scored."""
    if teach in ("rest", "direct"):
        folds = fold_of(case.facts, case.relearn, case.seed)
        return folds, fold_lessons(case, folds, own=teach == "direct")
    make = {"benign": benign_lessons, "unrelated": unrelated_lessons, "syntax": syntax_lessons}[teach]
    return (0,) * len(case.facts), (make(case),)


def prepare(
    case: Case, shared: Levels | None = None, *, teach: Teach = "rest", rank: int | None = None
) -> RelearnLevels:
    """Relearn in each retrained model; what comes back there was injected.

    Raises:
        ValueError: an unknown set to teach, or nothing to make it of.
    """
    if teach not in get_args(Teach):
        raise ValueError(f"unknown set to teach {teach!r}; choose from {', '.join(get_args(Teach))}")
    levels = attack.float32_levels(case, shared)
    folds, taught = _curriculum(case, teach)
    shape = (len(case.relearn.steps), len(case.facts))
    ready = RelearnLevels(levels, folds, taught, torch.zeros(0, *shape), teach, rank)
    return replace(ready, retrained=margins_after(case, lambda model: _all_folds(case, ready, model), shape))


def log_step_area(curve: Float[Tensor, "step fact"], steps: Sequence[int]) -> Float[Tensor, " fact"]:
    """Area under a curve over log steps, divided by the width: a mean in the curve's unit."""
    if len(steps) == 1:
        return curve[0]
    x = torch.tensor([float(step) for step in steps]).log()
    return torch.trapezoid(curve, x, dim=0) / (x[-1] - x[0])


def first_step(reached: Bool[Tensor, "step fact"], steps: Sequence[int]) -> Float[Tensor, " fact"]:
    """The first step at which each fact was reached; infinity for never."""
    at = torch.tensor([float(step) for step in steps])[:, None]
    return torch.where(reached, at, torch.inf).amin(0)


def savings(
    curve: Float[Tensor, "step fact"], never: Float[Tensor, "retrained step fact"], half: Tensor, steps: Sequence[int]
) -> Float[Tensor, " fact"]:
    """1 - n_U / n_R, n the first step with a margin of at least `half`; a model that never gets there counts as the
    last step, NaN where neither gets there. n_R is the mean over retrained models."""
    ours = first_step(curve >= half, steps)
    theirs = torch.stack([first_step(one >= half, steps) for one in never])
    last = float(steps[-1])
    found = 1 - ours.clamp(max=last) / theirs.clamp(max=last).mean(0)
    return torch.where(ours.isinf() & theirs.isinf().all(0), torch.nan, found)


def audit(case: Case, ready: RelearnLevels, model: Model, name: str) -> Result:
    """Relearn in a clone of the audited model and compare what comes back with the retrained models."""
    levels, steps = ready.levels, case.relearn.steps
    before = attack.float32_margins(levels.query_set, model)
    found = measure_gain(case, levels, ready.retrained, model, lambda m: _all_folds(case, ready, m), before)
    half = (levels.full + levels.base(found.keep)) / 2
    saved, late = savings(found.after, found.ignorant, half, steps), len(steps) // 2
    unpaired = ready.teach == "direct" and not found.keep
    if unpaired:
        found, saved = replace(found, rho=torch.full_like(found.rho, torch.nan)), torch.full_like(saved, torch.nan)
    forms = [*([] if ready.teach == "rest" else [ready.teach]), *([] if ready.rank is None else ["lora"])]
    flags = ("needs_retrained",) if unpaired else ()
    if ready.rank is not None:
        flags += coverage_flags(model, linear_weights(model))
    taught = len(ready.lessons) * steps[-1] * case.relearn.batch * 3
    last = gain_result(
        case,
        found.at(-1),
        test="_".join(["relearn", *forms]),
        name=name,
        cost_fe=(taught + (len(steps) + 1) * len(levels.query_set.queries)) / len(case.facts),
        flags=[flags] * len(case.facts),
        columns={"auc_log_steps": log_step_area(found.rho, steps), "savings": saved},
        curves=found.curves(),
        axis=steps,
    )
    return replace(last, recoverability=found.rho[late:].mean(0), null=found.null[:, late:].mean(1))
