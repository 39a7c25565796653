"""The training loop that gradient methods share: a plain float32 copy is trained, and its change is given back.

A method brings an `Objective` and says what may be trained; a wrapper brings an `Around`. Batches, masks, the retain
term, clipping, stopping, checkpoints and undoing are the same for all. Over 300 lines, because one loop is read as one.
"""

import copy
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import reduce
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Delta, Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around, Attack, masked_gradients
from mech_unlearn.training.checkpoint import Progress, Saver, fingerprint
from mech_unlearn.training.feed import Feed, by_entity
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import TrainRow, answer_rows, chunks, text_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.trainee import Trainee, changes, masked, trained_copy


def train(
    model: Model,
    forget: ForgetSet,
    retain: RetainSet,
    objective: Objective,
    schedule: Schedule,
    *,
    trainable: str,
    seed: int,
    around: Around = PLAIN,
    label: str = "",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(Deltas of the tensors that changed, report).

    Args:
        trainable: regular expression that the names of the trained parameters match.
        label: what is trained, for a checkpoint to be recognised by.

    Raises:
        ValueError: no epochs, no retained facts or texts although they have weight, nothing to train, an edit of
            activations in force, masks beside an adapter, a way to draw retained rows where there are none, a loss
            that is not finite, or a checkpoint of another training.
    """
    start = time.perf_counter()
    require_positive(schedule, "epochs")
    if model.in_force.interventions:
        raise ValueError(f"{model.name!r} has an edit of activations in force, which training does not see; leave it")
    if around.adapter and around.masks:
        raise ValueError("masks choose entries of weights, an adapter trains factors in their place: use one of them")
    if around.retain and objective.retain == "nll":
        objective = replace(objective, retain=around.retain)
    if around.noise and objective.retain == "nll":
        raise ValueError("noise on the untrained model has no effect where retained rows are trained by NLL")
    questions = answer_rows(model.tokenizer, forget.facts)
    rows = list(objective.rows) or questions
    kept, owners = _retain_rows(model, retain, bool(objective.retain_weight or around.retained))
    if schedule.retain_sampling != "cyclic" and not kept:
        raise ValueError(f"retain_sampling={schedule.retain_sampling!r} has no effect: no retained rows are trained on")
    order = random.Random(seed)
    if schedule.retain_sampling == "1:1" and len(kept) > len(rows):
        kept = order.sample(kept, len(rows))
    run = _trainee(model, rows, kept, objective, trainable, around)
    marks = fingerprint(model.hash(), label, around, (rows, objective.others, kept)) if around.checkpoint else {}
    saver = Saver(around, marks)
    batches = Feed(order, schedule.batch_size)
    queue = by_entity(owners) if schedule.retain_sampling == "entity" else None
    retained = Feed(order, schedule.batch_size, len(kept), queue)
    run.forget = objective.forget(run.score(run.asked))
    run.questions, run.next_kept = questions, retained.take
    masks = masked(run.weights, [mask(run) for mask in around.masks])
    progress = _loop(run, batches, retained, schedule, around, masks, saver)
    run.hf = hf = around.adapter.merge(run.hf) if around.adapter else run.hf
    report = {
        "steps": progress.step,
        "epochs": progress.epoch,
        "stopped": progress.stopped,
        "forget_recall": run.score(questions).exact.float().mean().item(),
        "final_losses": run.last,
        "n_forward": run.n_forward,
        "n_backward": run.n_backward,
        "trained_parameters": sum(int(masks[k].sum()) if k in masks else w.numel() for k, w in run.weights.items()),
        "memory_mib": _memory(run) / 2**20,
        "seconds": time.perf_counter() - start,
    }
    saver.done()
    return changes(model, hf), report


def trained_edit(
    name: str,
    method: Any,
    model: Model,
    forget: ForgetSet,
    retain: RetainSet,
    objective: Objective,
    trainable: str = "",
    around: Around = PLAIN,
    settings: Mapping[str, Any] | None = None,
) -> Edit:
    """The edit that training makes by the `schedule` and the `seed` of a method.

    Changes are stored as factors where an adapter knows them so. The recipe's settings are the method's fields, nested
    as they are: `recipe["settings"]["schedule"]["lr"]`.

    Args:
        settings: what the recipe records in place of the fields, where one cannot be written out (an SAE).

    Raises:
        ValueError: as `train`.
    """
    given = asdict(method) if settings is None else dict(settings)
    deltas, report = train(
        model,
        forget,
        retain,
        objective,
        method.schedule,
        trainable=trainable,
        seed=method.seed,
        around=around,
        label=f"{name} {given}",
    )
    factors = around.adapter.factors() if around.adapter else {}
    exact: dict[str, Delta] = {key: factors.get(key, delta) for key, delta in deltas.items()}
    recipe = {"method": name, "settings": given, "seed": method.seed, "report": report}
    return Edit(name=name, base=model.hash(), deltas=exact, recipe=recipe)


def reported(edit: Edit, n_forward: int = 0, **more: Any) -> Edit:
    """The edit with more in its report; forward passes made beside the training are added to those of it."""
    report = {**edit.recipe["report"], **more}
    report["n_forward"] += n_forward
    return replace(edit, recipe={**edit.recipe, "report": report})


def require_positive(settings: Any, *names: str) -> None:
    """Check settings of a method.

    Raises:
        ValueError: one that is not above 0.
    """
    for name in names:
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(settings, name)}")


def _retain_rows(model: Model, retain: RetainSet, needed: bool) -> tuple[list[TrainRow], list[str]]:
    """(Retained rows, whose each is)."""
    if not needed:
        return [], []
    facts, texts = answer_rows(model.tokenizer, retain.facts), text_rows(model, retain.texts)
    if not facts and not texts:
        raise ValueError("the retain set holds neither facts nor texts: give some or set retain_weight=0")
    owners = [fact.subject for fact in retain.facts for _ in fact.templates] + [""] * len(texts)
    return facts + texts, owners


def _trainee(
    model: Model,
    rows: Sequence[TrainRow],
    kept: Sequence[TrainRow],
    objective: Objective,
    trainable: str,
    around: Around,
) -> Trainee:
    hf = trained_copy(model, trainable, around.trainable)
    compares = objective.teacher or (objective.retain != "nll" and bool(kept))
    frozen = copy.deepcopy(hf).requires_grad_(False) if compares else None
    if around.adapter:
        hf = around.adapter.attach(hf)
    return Trainee(
        hf=hf,
        frozen=frozen,
        weights={name: w for name, w in hf.named_parameters() if w.requires_grad},
        blocks=[model.block(layer) for layer in range(model.n_layers)],
        objective=objective,
        asked=[*rows, *objective.others],
        n_forget=len(rows),
        kept=kept,
        fill=model.tokenizer.pad_token_id or 0,
        device=model.device,
        noise=around.noise,
    )


def _loop(
    run: Trainee,
    batches: Feed,
    retained: Feed,
    schedule: Schedule,
    around: Around,
    masks: Mapping[str, Tensor],
    saver: Saver,
) -> Progress:
    """Train; how far it came and the rule that ended it."""
    from tqdm import tqdm

    weights = list(run.weights.values())
    optimizer = torch.optim.AdamW(weights, lr=schedule.lr, weight_decay=schedule.weight_decay)
    before = {name: run.weights[name].detach().clone() for name in masks}
    progress = saver.restore(run, optimizer, (batches, retained)) or Progress()
    per_epoch = -(-run.n_forget // schedule.batch_size)
    steps = schedule.epochs * per_epoch
    with tqdm(total=steps, initial=progress.step, desc="training", unit="step", delay=2, leave=False) as bar:
        while progress.epoch < schedule.epochs:
            if not batches.left:
                members = _members(run, schedule)
                if not members:
                    return replace(progress, stopped="forgotten")
                batches.fill(members)
            if around.watch and around.watch(run):
                return replace(progress, stopped=around.watch.reason)
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr * schedule.ramp(progress.step, steps)
            _train_on(run, batches.take(), optimizer, schedule, around, masks, before)
            bar.update()
            progress = replace(progress, step=progress.step + 1, epoch=progress.epoch + (not batches.left))
            if not batches.left and schedule.stop_recall is not None:
                recall = run.score(run.questions).exact.float().mean().item()
                if recall <= schedule.stop_recall:
                    return replace(progress, stopped="stop_recall")
            saver.save(run, optimizer, (batches, retained), progress)
    return progress


def _members(run: Trainee, schedule: Schedule) -> list[int]:
    """The forget rows of the epoch that begins; rows that are no question are never forgotten."""
    if not schedule.skip_forgotten:
        return list(range(run.n_forget))
    left = run.score(run.questions).exact.nonzero()[:, 0].tolist()
    return left + list(range(len(run.questions), run.n_forget)) if left else []


def _train_on(
    run: Trainee,
    members: Sequence[int],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    around: Around,
    masks: Mapping[str, Tensor],
    before: dict[str, Tensor],
) -> None:
    """The optimiser steps on one batch."""
    kept = run.next_kept() if run.kept and run.objective.retain_weight else []
    forgotten = _parts(run, members, run.answer_count(members), schedule.micro_batch)
    retained = _parts(run, kept, [len(run.kept[i][0]) - run.kept[i][1] for i in kept], schedule.micro_batch)
    attacks = [around.adversary.attack(run, part) if around.adversary else nullcontext for part, _ in forgotten]
    for _ in range(around.adversary.repeats if around.adversary else 1):
        ours, theirs = _forget_terms(run, forgotten, attacks, around), _retain_terms(run, retained)
        optimizer.zero_grad(set_to_none=True)
        if around.direct:
            found = around.direct(run, masked_gradients(run.weights, _added(run, ours), masks), optimizer, masks)
            if kept:
                found = [one + more for one, more in zip(found, _added(run, theirs), strict=True)]
            for weight, gradient in zip(run.weights.values(), found, strict=True):
                weight.grad = gradient
        else:
            for pair in zip_longest(ours, theirs):
                terms = [term for term in pair if term is not None]
                _finite(run, sum(terms[1:], terms[0])).backward()
                run.n_backward += len(terms)
        for name, mask in masks.items():
            if (gradient := run.weights[name].grad) is not None:
                gradient.mul_(mask)
        torch.nn.utils.clip_grad_norm_(list(run.weights.values()), schedule.clip)
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                run.weights[name].copy_(torch.where(mask, run.weights[name], before[name]))


def _parts(
    run: Trainee, rows: Sequence[int], tokens: Sequence[int], size: int | None
) -> list[tuple[Sequence[int], float]]:
    """The rows in micro-batches, each with its share of the batch: losses are means over rows."""
    d_vocab = run.hf.config.vocab_size if run.objective.logits else 1
    return [(part, len(part) / len(rows)) for part in chunks(rows, tokens, d_vocab, size or len(rows))]


def _forget_terms(
    run: Trainee, parts: Sequence[tuple[Sequence[int], float]], attacks: Sequence[Attack], around: Around
) -> Iterator[Tensor]:
    """The weighted forget loss of each micro-batch under its attack, the first with the penalty."""
    for i, ((part, share), attack) in enumerate(zip(parts, attacks, strict=True)):
        with attack():
            loss = share * run.objective.forget_weight * run.forget_loss(part)
        yield loss + around.penalty(run) if around.penalty and i == 0 else loss


def _retain_terms(run: Trainee, parts: Sequence[tuple[Sequence[int], float]]) -> Iterator[Tensor]:
    for part, share in parts:
        yield share * run.objective.retain_weight * run.retain_loss(part)


def _added(run: Trainee, terms: Iterable[Tensor]) -> list[Tensor]:
    """The gradient of a sum of losses, one backward pass each."""
    each = (run.gradients(_finite(run, term)) for term in terms)
    return reduce(lambda total, more: [a.add_(b) for a, b in zip(total, more, strict=True)], each)


def _finite(run: Trainee, loss: Tensor) -> Tensor:
    if not torch.isfinite(loss):
        raise ValueError(f"the loss became {loss.item()} (last: {run.last}): lower lr or set a stopping bound")
    return loss


def _memory(run: Trainee) -> int:
    """Bytes of the trained copy, the untrained one, gradients and AdamW's moments; activations are not counted."""
    copies = [p for hf in (run.hf, run.frozen) if hf is not None for p in hf.parameters()]
    return sum(p.numel() * p.element_size() for p in copies) + 3 * sum(
        w.numel() * w.element_size() for w in run.weights.values()
    )
