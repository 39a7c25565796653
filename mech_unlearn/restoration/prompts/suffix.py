"""Suffix: do a few tokens behind the question, searched on other facts, bring these facts back?

Paper:    greedy coordinate gradient, arXiv 2307.15043, section 2.2; against unlearning, arXiv 2408.10682.
Changes:  nothing in the model; a universal suffix stands between the prompt and the answer.
Needs:    per search step one backward pass over a few taught prompts and `candidates` forward passes over them.
Differs:  the suffix is searched on the other folds' facts (true answers) and scored on this fold's TEST phrasings; a
          suffix for one question is no evidence. Many fewer steps and candidates than the papers' 500 x 512, so that
          it runs on a CPU: a weak attack, whose silence says little. Special tokens are never tried.
Fails:    prompts whose answer must follow the name directly are spoilt by any suffix; retrained models are, too.

`score_raw` is the margin in nats behind the suffix; recoverability is rho. Controls: `random_suffix`, the gain in nats
of a random suffix of the same length; `wrong_suffix`, that of one searched for wrong answers (format, not content).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.model.bridge import Model
from mech_unlearn.model.forward import last_logits
from mech_unlearn.model.tokens import embeddings
from mech_unlearn.restoration.engine.case import Case
from mech_unlearn.restoration.engine.gain import gain_result, margins_after, measure_gain
from mech_unlearn.restoration.engine.lessons import Lesson, by_fold, fold_lessons, fold_of, lesson_loss
from mech_unlearn.restoration.engine.levels import Levels, QuerySet, make_levels
from mech_unlearn.verdict.result import Result


@dataclass(frozen=True, kw_only=True)
class Search:
    """Settings of the search. Defaults run in seconds; arXiv 2307.15043 has length 20, 500 steps, 512 candidates."""

    length: int = 8
    steps: int = 12
    candidates: int = 16
    """Replacements tried per step."""
    top: int = 64
    """Tokens per place among which they are drawn; 256 in arXiv 2307.15043."""
    prompts: int = 12
    """Taught prompts that the loss is the mean of."""

    def __post_init__(self) -> None:
        if min(self.length, self.steps, self.candidates, self.top, self.prompts) < 1:
            raise ValueError(f"a suffix search needs positive settings, got {self}")


def suffixed(row: Lesson, suffix: Sequence[int]) -> Lesson:
    """The lesson with the suffix between prompt and answer."""
    ids, start = row
    return (*ids[:start], *suffix, *ids[start:]), start + len(suffix)


def _batches(rows: Sequence[Lesson]) -> list[list[Lesson]]:
    """Rows whose prompts and whole lengths are equal, so that a suffix has one place in them."""
    shapes: dict[tuple[int, int], list[Lesson]] = {}
    for row in rows:
        shapes.setdefault((len(row[0]), row[1]), []).append(row)
    return list(shapes.values())


@torch.no_grad()
def suffix_losses(
    model: Model, rows: Sequence[Lesson], suffixes: Sequence[Sequence[int]], *, max_tokens: int = 8192
) -> Float[Tensor, " suffix"]:
    """Mean over the rows of the NLL per answer token behind each suffix, in nats.

    Args:
        max_tokens: tokens of one batch at the most.
    """
    total = torch.zeros(len(suffixes))
    for part in _batches(rows):
        every = torch.tensor([suffixed(row, s)[0] for s in suffixes for row in part])
        start, width = part[0][1] + len(suffixes[0]), every.shape[1]
        nll = []
        for ids in every.split(max(1, max_tokens // width)):
            ids = ids.to(model.device)
            table = last_logits(model, ids, width - start + 1)[:, :-1].float().log_softmax(-1)
            nll.append(-table.gather(2, ids[:, start:, None])[..., 0].mean(1).cpu())
        total += torch.cat(nll).view(len(suffixes), len(part)).sum(1)
    return total / len(rows)


def gradient(
    model: Model, rows: Sequence[Lesson], suffix: Sequence[int], vocabulary: Float[Tensor, "token d_model"]
) -> Float[Tensor, "place token"]:
    """First-order change of the loss when a place of the suffix takes each token: the one-hot gradient of GCG."""
    total = torch.zeros(len(suffix), len(vocabulary))
    for part in _batches(rows):
        made = [suffixed(row, suffix) for row in part]
        ids = torch.tensor([row for row, _ in made], device=model.device)
        first, seen = part[0][1], []

        def write(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x.detach().requires_grad_())
            return seen[-1]

        with torch.enable_grad(), model.hooks(("hook_embed", write)):
            loss = lesson_loss(model, ids, [s for _, s in made], [len(row) for row, _ in made])
            (found,) = torch.autograd.grad(loss, seen[0])
        place = found[:, first : first + len(suffix)].sum(0).float()
        total += (place @ vocabulary.T).cpu() * (len(part) / len(rows))
    return total


def allowed_tokens(model: Model, size: int) -> Tensor:
    """Tokens that a suffix may hold: all but special ones."""
    special = set(model.tokenizer.all_special_ids)
    return torch.tensor([i for i in range(min(size, len(model.tokenizer))) if i not in special])


def search(model: Model, rows: Sequence[Lesson], how: Search, seed: int) -> tuple[int, ...]:
    """A suffix that lowers the loss on the rows; it begins at a random one and never gets worse."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = vocabulary_embeddings(model)
    tokens = allowed_tokens(model, len(vocabulary))
    chosen = [rows[i] for i in torch.randperm(len(rows), generator=generator)[: how.prompts].tolist()]
    suffix = random_suffix(model, how, seed)
    best = suffix_losses(model, chosen, [suffix])[0]
    for _ in range(how.steps):
        falling = gradient(model, chosen, suffix, vocabulary)[:, tokens]
        near = tokens[falling.topk(min(how.top, len(tokens)), dim=1, largest=False).indices]
        places = torch.randint(how.length, (how.candidates,), generator=generator).tolist()
        picks = torch.randint(near.shape[1], (how.candidates,), generator=generator).tolist()
        tried = [(*suffix[:p], int(near[p, k]), *suffix[p + 1 :]) for p, k in zip(places, picks, strict=True)]
        found = suffix_losses(model, chosen, tried)
        if found.min() < best:
            best, suffix = found.min(), tried[int(found.argmin())]
    return suffix


def random_suffix(model: Model, how: Search, seed: int) -> tuple[int, ...]:
    """Tokens drawn at random, without special ones."""
    generator = torch.Generator().manual_seed(seed)
    tokens = allowed_tokens(model, len(model.tokenizer))
    return tuple(tokens[torch.randint(len(tokens), (how.length,), generator=generator)].tolist())


def vocabulary_embeddings(model: Model) -> Float[Tensor, "token d_model"]:
    """Every token's embedding as the first layer gets it (before positions)."""
    size = model.hf.get_input_embeddings().weight.shape[0]
    return torch.cat([embeddings(model, [part.tolist()])[0].float() for part in torch.arange(size).split(8192)])


def margins(query_set: QuerySet, model: Model, suffix: Sequence[int]) -> Float[Tensor, "kind fact"]:
    """Margins per fact in nats behind the suffix."""
    queries = tuple(replace(query, prompt=(*query.prompt, *suffix)) for query in query_set.queries)
    return query_set.asked_as(queries).margins(model)


@dataclass(frozen=True, eq=False)
class SuffixLevels:
    levels: Levels
    folds: tuple[int, ...]
    lessons: tuple[list[Lesson], ...]
    wrong: tuple[list[Lesson], ...]
    how: Search
    retrained: Float[Tensor, "retrained fact"]


def _all_folds(
    case: Case, ready: SuffixLevels, model: Model, taught: Sequence[Sequence[Lesson]]
) -> Float[Tensor, "kind fact"]:
    """Margins of each fold behind the suffix searched on its lessons; a random suffix where there are none."""

    def score(fold: int, part: QuerySet) -> Float[Tensor, "kind some"]:
        rows, seed = taught[fold], case.seed + fold
        return margins(
            part, model, search(model, rows, ready.how, seed) if rows else random_suffix(model, ready.how, seed)
        )

    return by_fold(ready.levels.query_set, ready.folds, score)


def prepare(case: Case, shared: Levels | None = None, *, how: Search | None = None) -> SuffixLevels:
    """Search suffixes for each retrained model.

    Raises:
        ValueError: too few subjects for the folds, or fewer than two distractors for a fact.
    """
    levels = shared or make_levels(case, "test")
    folds = fold_of(case.facts, case.relearn, case.seed)
    taught, wrong = fold_lessons(case, folds), fold_lessons(case, folds, sham=True)
    ready = SuffixLevels(levels, folds, taught, wrong, how or Search(), torch.zeros(0, len(case.facts)))
    return replace(ready, retrained=margins_after(case, lambda model: _all_folds(case, ready, model, taught)))


def audit(case: Case, ready: SuffixLevels, model: Model, name: str) -> Result:
    """Search suffixes for the audited model, and the controls."""
    levels, how = ready.levels, ready.how
    found = measure_gain(case, levels, ready.retrained, model, lambda m: _all_folds(case, ready, m, ready.lessons))
    wrong = _all_folds(case, ready, model, ready.wrong)[0]
    chance = _all_folds(case, ready, model, [[] for _ in ready.lessons])[0]
    searched = 2 * case.relearn.folds * how.steps * how.prompts * (3 + how.candidates) / len(case.facts)
    return gain_result(
        case,
        found,
        test="suffix",
        name=name,
        cost_fe=searched + 4 * len(levels.query_set.queries) / len(case.facts),
        columns={"random_suffix": chance - found.before, "wrong_suffix": wrong - found.before},
    )
