"""Pruning: does taking weights out bring the fact back?

Paper:    Assessing the brittleness of safety alignment via pruning, arXiv 2402.05162 (SNIP set difference); Wanda,
          arXiv 2306.11695, section 3 (|W| ||X||_2 within each output row).
Changes:  a clone of the audited model; some weights of its linear layers become zero.
Needs:    one forward pass over retain text (Wanda), one backward pass over forget and utility prompts each (SNIP), and
          a scoring per setting.
Differs:  what is looked for is what forgetting added, so the forget score is the gradient of the model's *own* greedy
          answers to the forget prompts (never of the true ones) and the utility score that of the right answers about
          other subjects. Fewer grid points than the paper's 45. Output matrix and embeddings stay. Wanda's norms are
          read without interventions of an edit.
Fails:    a suppressor spread over weights that the rest needs too.

`score_raw` is the margin in nats at the setting chosen on TUNE (at most two points of other facts lost, else the flag
`collateral`); recoverability is rho. For `full` nothing is lost: rho 0, kappa 1. `covers:x` flags a model of whose
weights only the share x can be pruned (the experts of a mixture stay).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.edit.edit import clone
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.gradients import gradient_of
from mech_unlearn.model.pieces import token_rows
from mech_unlearn.model.scores import greedy
from mech_unlearn.model.tokens import Query, buckets
from mech_unlearn.restoration.engine import attack
from mech_unlearn.restoration.engine.attack import Curves, Ready
from mech_unlearn.restoration.engine.case import Case, split_queries
from mech_unlearn.restoration.engine.levels import Levels, QuerySet
from mech_unlearn.restoration.weights.quantize import coverage_flags, linear_weights
from mech_unlearn.verdict.result import Result

SPARSITIES = (0.01, 0.05, 0.1, 0.2, 0.3)
"""Shares removed by magnitude and by Wanda."""
SHARES = (0.005, 0.02, 0.1)
"""p and q of the set difference, from the grid {.5, 1, 2, 5, 10} % of arXiv 2402.05162."""
TEXTS = 128
"""Texts that Wanda's norms are read on. Source: arXiv 2306.11695, section 4 (128 sequences)."""
PROMPTS = 64
"""Prompts that a SNIP score is read on, at the most."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One way to choose weights: `magnitude`, `wanda`, or `difference` (top q for forgetting, not top p for use)."""

    how: str
    share: float
    """Share removed; q of the set difference."""
    spared: float = 0.0
    """p of the set difference."""

    def __str__(self) -> str:
        spared = f" not top {100 * self.spared:g} %" if self.how == "difference" else ""
        return f"{self.how} {100 * self.share:g} %{spared}"


GRID = (
    *(Criterion(how=how, share=p) for how in ("magnitude", "wanda") for p in SPARSITIES),
    *(Criterion(how="difference", share=q, spared=p) for q in SHARES for p in SHARES),
)


def lowest(scores: Float[Tensor, "row column"], share: float) -> Bool[Tensor, "row column"]:
    """The round(share x columns) smallest scores of each row."""
    count = round(share * scores.shape[1])
    out = torch.zeros_like(scores, dtype=torch.bool)
    return out.scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], True)


def highest(scores: Float[Tensor, "row column"], share: float) -> Bool[Tensor, "row column"]:
    """The round(share x size) largest scores of a whole matrix, zeros never counted."""
    count = round(share * scores.numel())
    out = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    out[scores.flatten().argsort(descending=True, stable=True)[:count]] = True
    return out.view_as(scores) & (scores > 0)


def set_difference(
    forget: Float[Tensor, "row column"], utility: Float[Tensor, "row column"], q: float, p: float
) -> Bool[Tensor, "row column"]:
    """Weights in the top q for forgetting and not in the top p for utility. Source: arXiv 2402.05162, section 3.3."""
    return highest(forget, q) & ~highest(utility, p)


@torch.no_grad()
def input_norms(model: Model, rows: Sequence[Sequence[int]]) -> dict[str, Float[Tensor, " column"]]:
    """||X_j||_2 over all tokens, per input of each linear layer. Source: arXiv 2306.11695, equation 1."""
    hf, axes = model.plain_copy(), linear_weights(model)
    total: dict[str, Tensor] = {}
    handles = []
    for path, module in hf.named_modules():
        name = f"{path}.weight"
        if name in axes:

            def read(_: object, args: tuple, name: str = name) -> None:
                squares = args[0].float().flatten(0, -2).square().sum(0)
                total[name] = total.get(name, 0) + squares

            handles.append(module.register_forward_pre_hook(read))
    for members in buckets(rows):
        ids = torch.tensor([list(rows[i]) for i in members], device=model.device)
        hf.base_model(ids, use_cache=False)  # without the output matrix, which nobody reads
    for handle in handles:
        handle.remove()
    return {name: squares.sqrt() for name, squares in total.items()}


def snip_scores(
    model: Model, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> dict[str, Float[Tensor, "..."]]:
    """Mean over (prompt, answer) rows of |W . dL/dW|, L the NLL per answer token. Source: arXiv 2402.05162, equation 1.

    Weights that get no gradient score 0.
    """
    axes = linear_weights(model)
    scores = {name: torch.zeros_like(model.held[name], dtype=torch.float32) for name in axes}
    with clone(model) as copy:
        gradients = gradient_of(copy, axes)
        for prompt, answer in rows:
            ids = torch.tensor([prompt + answer], device=model.device)
            with torch.enable_grad():
                table = copy.logits(ids)[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                loss = -table[torch.arange(len(answer)), list(answer)].mean()
            for name, gradient in gradients(loss).items():
                scores[name] += (copy.held[name].detach() * gradient).float().abs() / len(rows)
    return scores


@dataclass(frozen=True, eq=False)
class Material:
    """What weights are scored on."""

    texts: tuple[tuple[int, ...], ...]
    forget: tuple[Query, ...]
    utility: tuple[Query, ...]


def material(case: Case) -> Material:
    """Retain texts, forget prompts of the SELECT split without their answers, and prompts about other subjects.

    Raises:
        ValueError: neither texts nor other facts.
    """
    others = attack.drawn(case, case.others, PROMPTS)
    utility = split_queries(case, "select", others, limit=1) if others else ()
    texts = tuple(token_rows(case.full, case.texts[:TEXTS]))
    if not utility:
        raise ValueError("pruning needs facts about other subjects, to see what must stay: Case(others=...)")
    chosen = attack.drawn(case, case.facts, PROMPTS)
    return Material(texts or tuple(q.full for q in utility), split_queries(case, "select", chosen, limit=1), utility)


def _masks(
    model: Model,
    setting: Criterion,
    norms: Mapping[str, Tensor],
    forget: Mapping[str, Tensor],
    use: Mapping[str, Tensor],
) -> dict[str, Bool[Tensor, "..."]]:
    """Held name -> which weights are removed."""
    out = {}
    for name, axis in linear_weights(model).items():
        weight = model.held[name].detach().float()
        if setting.how == "difference":
            out[name] = set_difference(forget[name], use[name], setting.share, setting.spared)
            continue
        rows = weight.abs() if axis == 0 else weight.abs().T
        if setting.how == "wanda":
            rows = rows * norms[name]
        mask = lowest(rows, setting.share)
        out[name] = mask if axis == 0 else mask.T
    return out


def prune_(model: Model, masks: Mapping[str, Tensor]) -> None:
    """Set the weights under the masks to zero, in place."""
    with torch.no_grad():
        for name, mask in masks.items():
            model.held[name].masked_fill_(mask, 0)
    model.require_live(masks)


def _operate(
    case: Case, grid: Sequence[Criterion], on: Material, model: Model, tune: QuerySet, test: QuerySet
) -> Curves:
    """Margins and lost other facts at each setting."""
    norms = input_norms(model, on.texts)
    own = greedy(model, [q.prompt for q in on.forget], max(len(q.answers[0]) for q in on.forget))
    forget = snip_scores(model, [(q.prompt, answer) for q, answer in zip(on.forget, own, strict=True) if answer])
    use = snip_scores(model, [(q.prompt, q.answers[0]) for q in on.utility])
    others = attack.other_queries(case)
    plain = attack.recalled(model, others)
    on_tune, on_test, lost = [], [], []
    with clone(model) as copy:
        intact = {name: copy.held[name].detach().clone() for name in linear_weights(copy)}
        for setting in grid:
            prune_(copy, _masks(model, setting, norms, forget, use))
            on_tune.append(tune.margins(copy))
            on_test.append(test.margins(copy))
            lost.append(attack.lost_share(plain, attack.recalled(copy, others)))
            with torch.no_grad():
                for name, weight in intact.items():
                    copy.held[name].copy_(weight)
    return Curves(torch.stack(on_tune), torch.stack(on_test), torch.tensor(lost))


@dataclass(frozen=True, eq=False)
class PruningReady:
    ready: Ready
    grid: tuple[Criterion, ...]
    material: Material


def prepare(case: Case, shared: Levels | None = None, *, grid: tuple[Criterion, ...] = GRID) -> PruningReady:
    """Prune the retrained models at every setting.

    Raises:
        ValueError: a share outside of [0, 1), or nothing to measure damage on.
    """
    for setting in grid:
        if not (0 <= setting.share < 1 and 0 <= setting.spared <= 1):
            raise ValueError(f"pruning setting {setting}: shares lie in [0, 1)")
        if setting.how not in ("magnitude", "wanda", "difference"):
            raise ValueError(f"unknown way to prune {setting.how!r}; choose from magnitude, wanda, difference")
    on = material(case)
    ready = attack.prepare(
        case, shared, [str(setting) for setting in grid], lambda *args: _operate(case, grid, on, *args)
    )
    return PruningReady(ready, grid, on)


def audit(case: Case, pruning: PruningReady, model: Model, name: str) -> Result:
    """Prune clones of the audited model and report the setting chosen on TUNE."""
    ready = pruning.ready
    curves = attack.curves_of(case, ready, model, lambda *args: _operate(case, pruning.grid, pruning.material, *args))
    scored = (len(pruning.material.forget) + len(pruning.material.utility)) * 3 / len(case.facts)
    return attack.attack_result(
        case,
        ready,
        model,
        curves,
        test="pruning",
        name=name,
        cost_fe=attack.fe_per_fact(ready, len(pruning.grid)) + scored,
        flags=[coverage_flags(model, linear_weights(model))] * len(case.facts),
    )
