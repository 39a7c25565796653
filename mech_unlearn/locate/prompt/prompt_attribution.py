"""Prompt attribution: which tokens of the prompt carry the answer.

Paper:    Sundararajan, Taly, Yan 2017, Axiomatic attribution for deep networks, arXiv 1703.01365, equation 1 and
          section 5 (integrated gradients); ablation is the occlusion of Zeiler and Fergus 2014, arXiv 1311.2901.
Needs:    integrated gradients: steps + 1 forward and backward passes per prompt; ablation: one forward pass per token
          or class of tokens.
Differs:  token embeddings are what is changed, positions and the answer's own tokens stay. The integral is a trapezoid
          sum over uneven steps, dense at the baseline: behind a norm nearly all of the way from a zero embedding is
          walked at its very beginning. The note gives the largest gap between the sum of the attributions and the
          change of the answer's log-probability. A leading BOS stays as it is unless asked for: without its attention
          sink many models break down, whatever the prompt says.
Fails:    the answer depends on the baseline: a zero or mean embedding is no token, "resample" says only what is special
          to the subject. Ablations of tokens that carry the same thing hide each other. From a zero baseline (or a zero
          pad embedding) through an RMSNorm the integral converges badly at any number of steps: mind the gap in the
          note, and take "mean" or "resample" there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact
from mech_unlearn.locate.prompt.prompt_baselines import BASELINES, CLASSES, baselines, free_positions, prompt_classes
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import Ask, Query, embeddings, make_queries, tokenize

DENSITY = 3
"""The path is walked in steps that grow with this power, because norms turn small embeddings into large states."""
HOWS = ("integrated_gradients", "ablation")


@dataclass(frozen=True, kw_only=True)
class _Setting:
    how: str
    baseline: str
    steps: int
    samples: int
    keep_bos: bool
    seed: int
    max_tokens: int


def _check(setting: _Setting, facts: Sequence[Fact]) -> None:
    if not facts:
        raise ValueError("no facts to locate: give at least one")
    if setting.how not in HOWS or setting.baseline not in BASELINES:
        raise ValueError(
            f"how={setting.how!r}, baseline={setting.baseline!r}: choose one of {', '.join(HOWS)}, and one of "
            f"{', '.join(BASELINES)}"
        )
    if min(setting.steps, setting.samples, setting.max_tokens) < 1:
        raise ValueError(f"steps={setting.steps}, samples={setting.samples}: all must be positive")


def _logprob(model: Model, query: Query, prompts: Float[Tensor, "row prompt_token d_model"]) -> Float[Tensor, " row"]:
    """Log-probability of the answer (mean over its tokens, nats) when the prompt's embeddings are these."""
    ids = torch.tensor([query.full[:-1]], device=model.device).expand(len(prompts), -1)
    width, answer = len(query.prompt), query.answers[0]

    def write(x: Tensor) -> Tensor:
        return torch.cat([prompts.to(x), x[:, width:]], 1)

    with model.hooks(("hook_embed", write)):
        table = model.logits(ids)[:, width - 1 :].float().log_softmax(-1)
    index = torch.tensor(answer, device=model.device)[None, :, None].expand(len(prompts), -1, 1)
    return table.gather(2, index)[..., 0].mean(1)


def _mixed(clean: Tensor, base: Tensor, free: Sequence[int]) -> Float[Tensor, "sample prompt_token d_model"]:
    """The baseline at the free positions, the clean embeddings elsewhere."""
    out = clean.expand(len(base), *clean.shape).clone()
    out[:, list(free)] = base[:, list(free)].to(out)
    return out


def _gradients(
    model: Model, query: Query, base: Tensor, free: Sequence[int], setting: _Setting
) -> tuple[Float[Tensor, " prompt_token"], float]:
    """Integrated gradients of each token, mean over samples of the baseline, and the largest completeness gap."""
    clean = embeddings(model, [query.prompt])[0]
    start = _mixed(clean, base, free)
    alphas = torch.linspace(0, 1, setting.steps + 1, dtype=torch.float64, device=model.device) ** DENSITY
    width = alphas.diff()
    weights = (torch.cat([width, width[:1] * 0]) + torch.cat([width[:1] * 0, width])) / 2
    path = start[:, None].double() + alphas[:, None, None] * (clean - start)[:, None].double()
    size = max(1, setting.max_tokens // len(query.full))
    values, gradients = [], []
    for part in path.to(clean.dtype).flatten(0, 1).split(size):
        point = part.detach().requires_grad_()
        found = _logprob(model, query, point)
        gradients.append(torch.autograd.grad(found.sum(), point)[0])  # the model's own weights get none
        values.append(found.detach())
    gradient = torch.cat(gradients).unflatten(0, path.shape[:2]).double()
    change = torch.cat(values).unflatten(0, path.shape[:2]).double()
    mean = (gradient * weights[:, None, None]).sum(1)
    each = (mean * (clean - start).double()).sum(-1)
    gap = (each.sum(1) - (change[:, -1] - change[:, 0])).abs().max().item()
    return each.mean(0).cpu(), gap


@torch.no_grad()
def _ablations(
    model: Model, query: Query, base: Tensor, sets: Sequence[Sequence[int]], setting: _Setting
) -> Float[Tensor, " set"]:
    """log p(answer) minus that with a set of tokens replaced, mean over samples; NaN for an empty set."""
    clean = embeddings(model, [query.prompt])[0]
    full = [places for places in sets if places]
    rows = torch.cat([clean[None], *(_mixed(clean, base, places) for places in full)])
    size = max(1, setting.max_tokens // len(query.full))
    values = torch.cat([_logprob(model, query, part).cpu() for part in rows.split(size)])
    change = iter((values[0] - values[1:].unflatten(0, (len(full), len(base))).mean(1)).tolist() if full else [])
    return torch.tensor([next(change) if places else float("nan") for places in sets])


def _note(setting: _Setting, prompts: int, gap: float) -> str:
    samples = f", {setting.samples} samples" if setting.baseline == "resample" else ""
    kept = "BOS kept" if setting.keep_bos else "BOS may change"
    how = "ablation"
    if setting.how == "integrated_gradients":
        how = f"integrated gradients, {setting.steps} steps, largest completeness gap {gap:.1e} nats"
    return f"{how}; baseline {setting.baseline}{samples}; {kept}; {prompts} prompts"


def prompt_attribution_per_fact(
    model: Model,
    facts: Sequence[Fact],
    *,
    how: str = "integrated_gradients",
    baseline: str = "mean",
    steps: int = 64,
    samples: int = 8,
    keep_bos: bool = True,
    seed: int = 0,
    max_tokens: int = 8192,
) -> Attribution:
    """What each class of prompt tokens adds to the answer's log-probability, per fact: axes (fact, token), nats.

    See `prompt_attribution`; NaN where no phrasing of a fact has a token of the class.
    """
    setting = _Setting(
        how=how, baseline=baseline, steps=steps, samples=samples, keep_bos=keep_bos, seed=seed, max_tokens=max_tokens
    )
    _check(setting, facts)
    queries = make_queries(model.tokenizer, facts, distractors=False)
    bases = baselines(model, queries, queries, baseline, samples, seed)
    order = {fact.id: i for i, fact in enumerate(facts)}
    sums, count, gap = torch.zeros(len(facts), len(CLASSES)), torch.zeros(len(facts), len(CLASSES)), 0.0
    for query, base in zip(queries, bases, strict=True):
        free = free_positions(model, query, setting.keep_bos)
        sets = list(prompt_classes(query, free).values())
        if how == "ablation":
            values = _ablations(model, query, base, sets, setting)
        else:
            tokens, worst = _gradients(model, query, base, free, setting)
            values = torch.tensor([tokens[s].sum().item() if s else float("nan") for s in sets])
            gap = max(gap, worst)
        sums[order[query.fact.id]] += values.nan_to_num()
        count[order[query.fact.id]] += ~values.isnan()
    return Attribution(
        name="prompt attribution",
        values=sums / count,
        axes=("fact", "token"),
        labels={"fact": tuple(f.id for f in facts), "token": CLASSES},
        unit="change of the answer's log-probability (nats)",
        n=len(facts),
        note=_note(setting, len(queries), gap),
    )


def prompt_attribution(
    model: Model,
    facts: Sequence[Fact],
    *,
    how: str = "integrated_gradients",
    baseline: str = "mean",
    steps: int = 64,
    samples: int = 8,
    keep_bos: bool = True,
    seed: int = 0,
    max_tokens: int = 8192,
) -> Attribution:
    """What each class of prompt tokens adds to the answer's log-probability: axis (token,), nats, mean over facts.

    The log-probability is the mean over the answer's tokens (teacher-forced). Integrated gradients of a class are
    summed over its tokens, so that all classes together are log p(answer) minus log p(answer) at the baseline
    (arXiv 1703.01365, proposition 1), up to the gap in the note. Ablation replaces all tokens of a class at once:
    log p(answer) minus log p(answer) without them. The mean over the phrasings that a method may see.

    Args:
        how: "integrated_gradients" or "ablation".
        baseline: what stands in for an embedding: "zero", the "mean" over the vocabulary, the "pad" token's, or
            "resample": tokens of the same class of prompts about other subjects, in the same phrasing if there are any.
        steps: intervals of the trapezoid sum; raise it if the note shows a large gap.
        samples: draws of "resample"; the attribution is their mean.
        keep_bos: leave a special token in front as it is.

    Raises:
        ValueError: no facts, settings out of range, no pad token, or "resample" with one subject only.
    """
    each = prompt_attribution_per_fact(
        model, facts, how=how, baseline=baseline, steps=steps, samples=samples, keep_bos=keep_bos, seed=seed,
        max_tokens=max_tokens,
    )  # fmt: skip
    return each.mean(facts)


def prompt_attribution_tokens(
    model: Model,
    fact: Fact,
    *,
    template: str | None = None,
    others: Sequence[Fact] = (),
    how: str = "integrated_gradients",
    baseline: str = "mean",
    steps: int = 64,
    samples: int = 8,
    keep_bos: bool = True,
    seed: int = 0,
    max_tokens: int = 8192,
) -> Attribution:
    """What each token of one prompt adds to the answer's log-probability: axis (token,), nats; labels "position token".

    As `prompt_attribution`, but token by token: an ablation replaces one token. NaN for a BOS that is kept.

    Args:
        template: phrasing of the fact; by default the main one.
        others: facts whose prompts "resample" draws from.

    Raises:
        ValueError: as `prompt_attribution`.
    """
    setting = _Setting(
        how=how, baseline=baseline, steps=steps, samples=samples, keep_bos=keep_bos, seed=seed, max_tokens=max_tokens
    )
    _check(setting, [fact])
    (query,) = tokenize(model.tokenizer, [Ask(fact, template or fact.prompt)], distractors=False)
    strangers = make_queries(model.tokenizer, others, distractors=False) if baseline == "resample" else ()
    (base,) = baselines(model, [query], strangers, baseline, samples, seed)
    free, gap = free_positions(model, query, setting.keep_bos), 0.0
    if how == "ablation":
        sets = [[i] if i in free else [] for i in range(len(query.prompt))]
        values = _ablations(model, query, base, sets, setting)
    else:
        tokens, gap = _gradients(model, query, base, free, setting)
        values = tokens.float()
        values[: free[0]] = float("nan")
    names = model.tokenizer.convert_ids_to_tokens(list(query.prompt))
    return Attribution(
        name=f"prompt attribution of {fact.id}",
        values=values,
        axes=("token",),
        labels={"token": tuple(f"{i} {name}" for i, name in enumerate(names))},
        unit="change of the answer's log-probability (nats)",
        n=1,
        note=_note(setting, 1, gap),
    )
