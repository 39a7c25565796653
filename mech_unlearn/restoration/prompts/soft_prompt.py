"""Soft prompt: do a few trained embeddings in front of the question bring back facts that they were not trained on?

Paper:    Soft prompt threats, arXiv 2402.09063; what soft prompts can force out of any model, arXiv 2502.15836.
Changes:  nothing in the weights; n embeddings stand behind the BOS, before the prompt. They are trained on the answers
          of the other folds' facts (SELECT and TUNE phrasings) and scored on this fold's TEST phrasings.
Needs:    `steps` forward and backward passes of a batch per fold, for U, each retrained model and twice for controls.
Differs:  one universal prompt per fold, begun at random rows of the embedding; AdamW 1e-3 times the spread of the
          embedding over 0.02 (its spread in a common model), because a step is measured in embeddings. 100 steps:
          about 30 s per model of 1.3 M parameters on one core, twice that with 200.
Fails:    a fold whose facts share their answers' frequencies with the taught ones; retrained models learn these too and
          they are subtracted. A prompt on the facts themselves can write anything and is no evidence.

`score_raw` is the margin in nats after the last step; recoverability is rho there. Controls: `sham_taught`, the mean
gain in nats on this fold when the prompt was trained on wrong answers (format, not content); `random_string`, log-
probability per character token (nats) of a random 40-character string that a prompt of the same size was trained to
write: near 0 the prompt has room to write anything, and only the gain on untaught facts counts.
"""

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.scores import Batch, score
from mech_unlearn.model.tokens import Query, embeddings, encode, pad
from mech_unlearn.restoration.engine.case import Case
from mech_unlearn.restoration.engine.gain import gain_result, margins_after, measure_gain
from mech_unlearn.restoration.engine.lessons import (
    Lesson,
    by_fold,
    fold_lessons,
    fold_of,
    lesson_batches,
    lesson_loss,
)
from mech_unlearn.restoration.engine.levels import Levels, QuerySet, make_levels
from mech_unlearn.verdict.result import Result

LENGTH = 8
"""Embeddings of the prompt, of {4, 8, 16}."""
STEPS = (50, 100)
"""Steps after which the untaught facts are scored; the last one counts."""
LR = 1e-3
"""AdamW step at an embedding spread of 0.02."""
COMMON_SPREAD = 0.02
BATCH = 16
STRING = 40
"""Characters of the random string. Source: arXiv 2502.15836 (strings of over 400 from 1 to 10 embeddings)."""


def start_of(model: Model, ids: Sequence[int]) -> int:
    """Where a prefix goes: behind a BOS, if there is one."""
    return int(bool(ids) and ids[0] == model.tokenizer.bos_token_id)


def insert(ids: Sequence[int], extra: Sequence[int], at: int) -> tuple[int, ...]:
    """The ids with others put in at a position."""
    return (*ids[:at], *extra, *ids[at:])


def prefixed(model: Model, query: Query, extra: Sequence[int]) -> Query:
    """The query with tokens put in behind its BOS; the subject's span moves along."""
    at = start_of(model, query.prompt)
    moved = (query.span[0] + len(extra), query.span[1] + len(extra))
    return replace(query, prompt=insert(query.prompt, extra, at), span=moved)


def train(
    model: Model, rows: Sequence[Lesson], length: int, steps: Sequence[int], seed: int
) -> list[Float[Tensor, "token d_model"]]:
    """The prompt after each number of steps, trained on the answers of the rows; no weight moves."""
    generator = torch.Generator().manual_seed(seed)
    size = model.hf.get_input_embeddings().weight.shape[0]
    begun = embeddings(model, [torch.randint(size, (length,), generator=generator).tolist()])[0].float()
    prompt = begun.clone().requires_grad_()
    spread = begun.std().item()
    optimiser = torch.optim.AdamW([prompt], lr=LR * max(spread / COMMON_SPREAD, 1e-3), weight_decay=0.0)
    out, at = [], start_of(model, rows[0][0])
    for step, batch in enumerate(lesson_batches(rows, min(BATCH, len(rows)), steps[-1], generator), 1):
        ids, mask, _ = pad([insert(row, [0] * length, at) for row, _ in batch], model.tokenizer.pad_token_id or 0)
        ids, mask = ids.to(model.device), mask.to(model.device)
        with torch.enable_grad(), model.hooks(("hook_embed", lambda x: written(x, prompt, at))):
            starts, ends = [start + length for _, start in batch], [len(row) + length for row, _ in batch]
            (gradient,) = torch.autograd.grad(lesson_loss(model, ids, starts, ends, mask), prompt)
        prompt.grad = gradient
        optimiser.step()
        if step in steps:
            out.append(prompt.detach().clone())
    return out


def written(
    x: Float[Tensor, "batch pos d_model"], prompt: Float[Tensor, "token d_model"], at: int
) -> Float[Tensor, "batch pos d_model"]:
    """The embeddings with the prompt written over its places."""
    middle = prompt.to(x).expand(len(x), -1, -1)
    return torch.cat([x[:, :at], middle, x[:, at + prompt.shape[0] :]], 1)


def margins(model: Model, query_set: QuerySet, prompt: Float[Tensor, "token d_model"]) -> Float[Tensor, "kind fact"]:
    """Margins per fact in nats behind the prompt."""
    at = start_of(model, query_set.queries[0].prompt)
    queries = tuple(prefixed(model, query, [0] * len(prompt)) for query in query_set.queries)

    def write(x: Tensor, _: Batch) -> Tensor:
        return written(x, prompt, at)

    return query_set.asked_as(queries).margins(model, {"hook_embed": write})


def random_string(model: Model, length: int, steps: int, seed: int) -> float:
    """Log-probability per token in nats of a random string that a prompt of this length was trained to write."""
    draw = random.Random(seed)
    known = encode(model.tokenizer, string.ascii_lowercase).ids
    text = "".join(draw.choice(string.ascii_lowercase) for _ in range(STRING))
    ids = encode(model.tokenizer, text).ids
    at = start_of(model, known)
    room = len(ids) if model.n_ctx is None else model.n_ctx - length
    row = (ids[:room], at) if at else ((ids[0], *ids[:room]), 1)
    prompt = train(model, [row], length, (steps,), seed)[-1]
    fact = Fact(id="string", subject="string", relation="string", object="none", prompt="{}")
    query = Query(row[0][: row[1]], (0, 1), (row[0][row[1] :],), fact, "{}")

    def write(x: Tensor, _: Batch) -> Tensor:
        return written(x, prompt, at)

    return score(model, [prefixed(model, query, [0] * length)], {"hook_embed": write}).logprob[0, 0].item()


@dataclass(frozen=True, eq=False)
class SoftLevels:
    levels: Levels
    folds: tuple[int, ...]
    lessons: tuple[list[Lesson], ...]
    """For each fold what the prompt is trained on: the other folds' facts."""
    wrong: tuple[list[Lesson], ...]
    """The same with wrong answers."""
    length: int
    steps: tuple[int, ...]
    retrained: Float[Tensor, "retrained step fact"]


def _all_folds(
    case: Case, ready: SoftLevels, model: Model, taught: Sequence[Sequence[Lesson]], steps: tuple[int, ...]
) -> Float[Tensor, "step kind fact"]:
    def score(fold: int, part: QuerySet) -> Float[Tensor, "step kind some"]:
        prompts = train(model, taught[fold], ready.length, steps, case.seed + fold)
        return torch.stack([margins(model, part, prompt) for prompt in prompts])

    return by_fold(ready.levels.query_set, ready.folds, score)


def prepare(
    case: Case, shared: Levels | None = None, *, length: int = LENGTH, steps: tuple[int, ...] = STEPS
) -> SoftLevels:
    """Train prompts for each retrained model.

    Raises:
        ValueError: no length or steps, too few subjects for the folds, or fewer than two distractors for a fact.
    """
    if length < 1 or not steps or list(steps) != sorted(set(steps)) or steps[0] < 1:
        raise ValueError(f"a soft prompt needs length >= 1 and increasing steps, got {length} and {steps}")
    levels = shared or make_levels(case, "test")
    folds = fold_of(case.facts, case.relearn, case.seed)
    taught, wrong = fold_lessons(case, folds), fold_lessons(case, folds, sham=True)
    shape = (len(steps), len(case.facts))
    ready = SoftLevels(levels, folds, taught, wrong, length, steps, torch.zeros(0, *shape))
    return replace(
        ready, retrained=margins_after(case, lambda model: _all_folds(case, ready, model, taught, steps), shape)
    )


def audit(case: Case, ready: SoftLevels, model: Model, name: str) -> Result:
    """Train prompts for the audited model, and the controls."""
    levels, steps = ready.levels, ready.steps
    found = measure_gain(
        case, levels, ready.retrained, model, lambda m: _all_folds(case, ready, m, ready.lessons, steps)
    )
    wrong = _all_folds(case, ready, model, ready.wrong, steps[-1:])[0, 0]
    trained = 2 * case.relearn.folds * steps[-1] * BATCH * 3 / len(case.facts)
    return gain_result(
        case,
        found.at(-1),
        test="soft_prompt",
        name=name,
        cost_fe=trained + (len(steps) + 2) * len(levels.query_set.queries) / len(case.facts),
        columns={
            "sham_taught": wrong - found.before,
            "random_string": random_string(model, ready.length, steps[-1], case.seed),
        },
        curves=found.curves(),
        axis=steps,
    )
