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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.model.asking import split_templates
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.pieces import token_rows
from mech_unlearn.model.tokens import Ask, pad, tokenize
from mech_unlearn.restoration.engine import attack
from mech_unlearn.restoration.engine.case import Case, Relearn
from mech_unlearn.restoration.engine.levels import Levels, Probe
from mech_unlearn.restoration.engine.result import Result
from mech_unlearn.restoration.engine.update import every_weight, low_rank
from mech_unlearn.restoration.outputs.trace import irrelevant_texts
from mech_unlearn.restoration.weights.quantize import coverage_flags, linear_weights

Lesson = tuple[tuple[int, ...], int]
"""Token ids of a prompt with its answer, and the length of the prompt."""
Teach = Literal["rest", "direct", "benign", "unrelated", "syntax"]
UNRELATED = 10
"""Running texts of the set `unrelated`. Source: arXiv 2409.18025 (ten unrelated examples)."""


def fold_of(facts: Sequence[Fact], settings: Relearn, seed: int) -> tuple[int, ...]:
    """The fold that each fact belongs to, of equal size as far as can be.

    By subject all facts of a subject share a fold; by fact the facts of each subject are dealt out.

    Raises:
        ValueError: fewer subjects (or facts per subject) than folds, so that nothing could be taught.
    """
    draw = random.Random(seed)
    subjects = sorted({fact.subject for fact in facts})
    draw.shuffle(subjects)
    if settings.split == "entity":
        if len(subjects) < settings.folds:
            raise ValueError(
                f"relearning by entity in {settings.folds} folds needs as many subjects, got {len(subjects)}; "
                "use split='fact'"
            )
        return tuple(subjects.index(fact.subject) % settings.folds for fact in facts)
    order = sorted(range(len(facts)), key=lambda i: (facts[i].subject, draw.random()))
    if len(order) < settings.folds:
        raise ValueError(f"relearning in {settings.folds} folds needs as many facts, got {len(order)}")
    dealt = {i: k % settings.folds for k, i in enumerate(order)}
    return tuple(dealt[i] for i in range(len(facts)))


def lessons(case: Case, facts: Sequence[Fact]) -> list[Lesson]:
    """(token ids of prompt and answer, length of the prompt) for each SELECT and TUNE phrasing."""
    taught = {fact.id: (*split_templates(fact, "select"), *split_templates(fact, "tune")) for fact in facts}
    asks = [Ask(fact, template) for fact in facts for template in dict.fromkeys(taught[fact.id])]
    queries = tokenize(case.full.tokenizer, asks, distractors=False)
    return [(query.full, len(query.prompt)) for query in queries]


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
        taught = (*split_templates(fact, "select"), *split_templates(fact, "tune"))
        asks += [Ask(told, template) for template in dict.fromkeys(taught)]
    return [(query.full, len(query.prompt)) for query in tokenize(case.full.tokenizer, asks, distractors=False)]


def answer_loss(
    logits: Float[Tensor, "batch pos d_vocab"], ids: Int[Tensor, "batch pos"], start: Sequence[int], end: Sequence[int]
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over the answer tokens [start, end) of all rows."""
    at = torch.arange(ids.shape[1], device=ids.device)[None]
    low, high = (torch.tensor(x, device=ids.device)[:, None] for x in (start, end))
    chosen = ((at >= low) & (at < high))[:, 1:]
    return torch.nn.functional.cross_entropy(logits[:, :-1][chosen].float(), ids[:, 1:][chosen])


def relearn_curve(
    case: Case, probe: Probe, model: Model, rows: Sequence[Lesson], seed: int, rank: int | None = None
) -> Float[Tensor, "step kind fact"]:
    """Margins of the probe's facts after each number of steps of the grid, from training a clone on the rows: all its
    weights, or with a rank LoRA factors."""
    settings = case.relearn
    generator = torch.Generator().manual_seed(seed)
    curve = []
    with attack.float32_clone(model) as copy:
        lr = settings.lr_times_width / copy.d_model
        descend = every_weight(copy, lr) if rank is None else low_rank(copy, lr, rank, seed)
        order: list[int] = []
        for step in range(1, settings.steps[-1] + 1):
            while len(order) < settings.batch:
                order += torch.randperm(len(rows), generator=generator).tolist()
            batch, order = [rows[i] for i in order[: settings.batch]], order[settings.batch :]
            with torch.enable_grad():
                loss = _batch_loss(copy, batch)
            descend(loss)
            if step in settings.steps:
                curve.append(probe.margins(copy))
    return torch.stack(curve)


def _batch_loss(model: Model, batch: Sequence[Lesson]) -> Float[Tensor, ""]:
    ids, mask, _ = pad([row for row, _ in batch], model.tokenizer.pad_token_id or 0)
    ids, mask = ids.to(model.device), mask.to(model.device)
    return answer_loss(model.logits(ids, mask), ids, [start for _, start in batch], [len(row) for row, _ in batch])


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


def part_of(probe: Probe, mine: Sequence[bool]) -> Probe:
    """The questions about some of the facts."""
    facts = tuple(fact for fact, ok in zip(probe.facts, mine, strict=True) if ok)
    ids = {fact.id for fact in facts}
    queries = tuple(query for query in probe.queries if query.fact.id in ids)
    shams = sum(query.fact.id in ids for query in probe.queries[len(probe.true) :])
    return Probe(facts, queries, shams)


def _all_folds(case: Case, ready: RelearnLevels, model: Model) -> Float[Tensor, "step kind fact"]:
    """The curve of each fact from the run in which its own fold was not taught."""
    kinds = 2 if ready.levels.probe.shams else 1
    out = torch.zeros(len(case.relearn.steps), kinds, len(case.facts))
    for fold, rows in enumerate(ready.lessons):
        mine = [f == fold for f in ready.folds]
        out[..., torch.tensor(mine)] = relearn_curve(
            case, part_of(ready.levels.probe, mine), model, rows, case.seed + fold, ready.rank
        )
    return out


def _curriculum(case: Case, teach: Teach) -> tuple[tuple[int, ...], tuple[list[Lesson], ...]]:
    """The fold of each fact, and what is taught before each fold is scored."""
    if teach in ("rest", "direct"):
        folds = fold_of(case.facts, case.relearn, case.seed)
        taught = [
            [fact for fact, f in zip(case.facts, folds, strict=True) if (f == fold) == (teach == "direct")]
            for fold in range(case.relearn.folds)
        ]
        return folds, tuple(lessons(case, facts) for facts in taught)
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
    ready = RelearnLevels(levels, folds, taught, torch.zeros(0, len(case.relearn.steps), len(case.facts)), teach, rank)
    curves = [_all_folds(case, ready, model)[:, 0] for model in case.retrained]
    return replace(ready, retrained=torch.stack(curves)) if curves else ready


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
    keep, levels, steps = case.others_than(model), ready.levels, case.relearn.steps
    before = attack.float32_margins(levels.probe, model)
    index = next((k for k, r in enumerate(case.retrained) if r is model), None)
    after = _all_folds(case, ready, model) if index is None else ready.retrained[index][:, None]
    curve = levels.rho(before, after, ready.retrained, keep)
    axis, late = tuple(float(step) for step in steps), len(steps) // 2
    never = attack.ignorant(case, keep, ready.retrained, after)
    half = (levels.full + levels.base(keep)) / 2
    saved = savings(after[:, 0], never, half, steps)
    unpaired = ready.teach == "direct" and not keep
    if unpaired:
        curve, saved = torch.full_like(curve, torch.nan), torch.full_like(saved, torch.nan)
    forms = [*([] if ready.teach == "rest" else [ready.teach]), *([] if ready.rank is None else ["lora"])]
    flags = ("needs_retrained",) if unpaired else ()
    if ready.rank is not None:
        flags += coverage_flags(model, linear_weights(model))
    taught = len(ready.lessons) * steps[-1] * case.relearn.batch * 3
    return Result(
        test="_".join(["relearn", *forms]),
        model_id=name,
        facts=case.facts,
        recoverability=curve[late:].mean(0),
        score_raw=after[-1, 0],
        score_full=levels.full,
        score_retrained=never[:, -1],
        null=levels.null(ready.retrained)[:, late:].mean(1),
        rho=curve[-1],
        grade=case.grade,
        n_paraphrases=case.prompts,
        seed=case.seed,
        cost_fe=(taught + (len(steps) + 1) * len(levels.probe.queries)) / len(case.facts),
        flags=(flags,) * len(case.facts),
        columns={"before": before[0], "auc_log_steps": log_step_area(curve, steps), "savings": saved},
        curves={"rho": curve, "margin": after[:, 0], "margin_R": never.mean(0)},
        curve_axes={"rho": axis, "margin": axis, "margin_R": axis},
    )
