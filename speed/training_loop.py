"""Thirty-two steps of GradDiff and of NPO with a retain term, four forget and four retained rows of 14 tokens per step.

On four layers of the shape with a vocabulary of at most 8,192, so that a run takes seconds. Reference: a bare torch
loop on a copy of the Hugging Face model: the same batches, losses, AdamW, weight decay and clipping, written out. Both
give the change of every weight. Ours is `training.train`, with its scores before and after training and its report.
"""

import copy
import random
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.methods import GradDiff, Npo
from mech_unlearn.training.feed import Feed
from mech_unlearn.training.losses import ascent
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import answer_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import train
from speed.shapes import Shape, Way

Loss = Literal["grad_diff", "npo"]
FACTS, BATCH, EPOCHS, LR, DECAY, CLIP, BETA = 8, 4, 16, 1e-5, 0.01, 1.0, 0.1


def _small(shape: Shape) -> Shape:
    return replace(shape, layers=min(4, shape.layers), vocabulary=min(8192, shape.vocabulary))


def _facts(first: int) -> tuple[Fact, ...]:
    return tuple(
        Fact(
            id=f"fact {i}",
            subject=f"w{40 + i} w{60 + i} w{80 + i}",
            relation="r",
            object=f"w{120 + i}",
            prompt="w10 w11 {} w15 w16 w17 w18 w19 w20 w21",
        )
        for i in range(first, first + FACTS)
    )


def _batches() -> list[tuple[list[int], list[int]]]:
    """The rows of each step, as the loop draws them."""
    order = random.Random(0)
    ours, theirs = Feed(order, BATCH), Feed(order, BATCH, FACTS)
    steps = []
    for _ in range(EPOCHS):
        ours.fill(range(FACTS))
        while ours.left:
            members = ours.take()
            steps.append((members, theirs.take()))
    return steps


def plain(shape: Shape, loss: Loss) -> Way:
    """Change of every weight, one after another."""
    small = _small(shape)
    hf, tokenizer = small.bare(), small.model().tokenizer
    hf.set_attn_implementation("eager")
    asked, kept = (answer_rows(tokenizer, _facts(first)) for first in (0, FACTS))

    def answers(trained: Any, rows: list, members: list[int]) -> Tensor:
        """Log-probability of the one-token answers."""
        ids = torch.tensor([rows[i][0] for i in members])
        logits = trained(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -2]
        return logits.gather(1, ids[:, -1:])[:, 0] - logits.logsumexp(1)

    def run() -> Tensor:
        trained = copy.deepcopy(hf)
        weights = list(trained.parameters())
        optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=DECAY)
        with torch.no_grad():
            before = answers(trained, asked, list(range(FACTS)))
        for members, others in _batches():
            now = answers(trained, asked, members)
            forget = (
                now.mean() if loss == "grad_diff" else -2 / BETA * logsigmoid(-BETA * (now - before[members])).mean()
            )
            total = forget - answers(trained, kept, others).mean()
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
        with torch.no_grad():
            return torch.cat([(a - b).flatten() for a, b in zip(weights, hf.parameters(), strict=True)])

    return run


def ours(shape: Shape, loss: Loss) -> Way:
    """The same from the package's loop."""
    model = _small(shape).model()
    sets = ForgetSet(facts=_facts(0)), RetainSet(neighbors=_facts(FACTS))
    schedule = Schedule(lr=LR, epochs=EPOCHS, batch_size=BATCH, weight_decay=DECAY, clip=CLIP)
    made = GradDiff() if loss == "grad_diff" else Npo(beta=BETA)
    objective = _objective(made)

    def run() -> Tensor:
        deltas, report = train(model, *sets, objective, schedule, trainable="", seed=0)
        assert report["steps"] == EPOCHS * FACTS // BATCH and deltas.keys() == model.held.keys()
        return torch.cat([deltas[name].flatten() for name in model.held])

    return run


def _objective(method: GradDiff | Npo) -> Objective:
    forget = method._loss if isinstance(method, Npo) else lambda _: ascent
    return Objective(forget, method.retain_weight, method.forget_weight)
