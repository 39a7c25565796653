"""Anonymised steering: does pushing U away from "somebody" towards this very name bring the answer back?

Paper:    Extracting unlearned information from LLMs with activation steering, arXiv 2411.02631.
Changes:  nothing kept; a vector is added at the last prompt token of U while the first answer token is predicted.
Needs:    the questions about N = 8 other names, one pass per strength and layer, and `samples` sampled answers of
          each question with and without steering, in U and in each retrained model.
Differs:  anonymous names are unknown ones, or else other subjects. Strength, layer and local or global vector are
          chosen on TUNE by the margin of the answer, which needs no sampling; recoverability is rho of the margin
          (nats, difference in differences), and the share of samples with the answer (CAF) stands beside it, with 20
          samples instead of 2,000. Sampling stops after as many tokens as the longest answer has and two more, at
          most 10. The answer is matched as text, without a list of stop words.
Fails:    published gains are large for a famous subject and none for narrow facts (TOFU, CounterFact): a negative
          result is no evidence of deletion.

v_l = A_l(Q) - mean_n A_l(Q*_n), A_l the state after layer l at the last prompt token; global: mean of v_l over
questions. `score_raw` is the margin in nats at the chosen point. Columns: caf, caf_plain, caf_R (gain of retrained
models), dcaf_rho = clip(gain - gain of R, 0, 1) in shares; confidence (share of the likeliest first word) and
top_right (whether it is the answer's), from which a ROC curve of confidence follows.
"""

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.model.bridge import Model, require_positions
from mech_unlearn.model.capture import capture
from mech_unlearn.model.forward import last_logits
from mech_unlearn.model.scores import Batch, Scores, score, score_each
from mech_unlearn.model.tokens import Ask, Query, buckets, tokenize
from mech_unlearn.restoration.engine import attack
from mech_unlearn.restoration.engine.attack import Curves, Ready
from mech_unlearn.restoration.engine.case import Case
from mech_unlearn.restoration.engine.levels import Levels, QuerySet
from mech_unlearn.restoration.engine.normalise import mean_by_fact
from mech_unlearn.restoration.states import uds
from mech_unlearn.verdict.result import Result

NAMES, TEMPERATURE, TOP_K, MAX_TOKENS = 8, 2.0, 40, 10
"""Anonymous names; sampling. Source: arXiv 2411.02631 (temperature 2, top-k 40, 10 tokens)."""
STRENGTHS = (1.0, 2.0, 4.0)
SAMPLES = 20


@dataclass(frozen=True)
class Point:
    """One setting of the attack."""

    layer: int
    strength: float
    local: bool


@dataclass(frozen=True, eq=False)
class Push:
    """Adds one vector per query at the last prompt token."""

    vectors: Float[Tensor, "query d_model"]
    strength: float

    def __call__(self, x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Tensor:
        out, row = x.clone(), torch.arange(len(x), device=x.device)
        add = self.strength * self.vectors.to(x.device)[batch.query]
        out[row, batch.end] = (x[row, batch.end].float() + add).to(x)
        return out


@dataclass(frozen=True, eq=False)
class SteerReady:
    ready: Ready
    points: tuple[Point, ...]
    samples: int
    caf: dict[tuple[int, int], Float[Tensor, "two fact"]] = field(default_factory=dict)
    """(Retrained model, point) -> its CAF plain and steered; filled when first needed."""


def anonymous(case: Case, query: Query, number: int = NAMES) -> tuple[str, ...]:
    """Names that say nothing of the subject: unknown ones, else other subjects."""
    if case.unknown:
        return tuple(entity.name for entity in case.unknown[:number])
    order = {fact.id: i for i, fact in enumerate(case.facts)}
    return uds._stand_ins(case, order[query.fact.id])[:number]


def vectors(case: Case, model: Model, queries: Sequence[Query], layers: Sequence[int]) -> dict[int, Tensor]:
    """Layer -> v_l [query, d_model]."""
    sites = [Site(layer, "resid_post") for layer in layers]
    names = [anonymous(case, query) for query in queries]
    asks = [Ask(q.fact, q.template, name) for q, some in zip(queries, names, strict=True) for name in some]
    others = tokenize(model.tokenizer, asks, distractors=False)
    own, theirs = (
        capture(model, [q.prompt for q in some], sites, "last", dtype=torch.float32) for some in (queries, others)
    )
    owner = torch.arange(len(queries)).repeat_interleave(torch.tensor([len(some) for some in names]))
    count = torch.bincount(owner, minlength=len(queries))[:, None]
    out = {}
    for layer, site in zip(layers, sites, strict=True):
        mean = torch.zeros(own[site].shape).index_add(0, owner, theirs[site]) / count
        out[layer] = own[site] - mean
    return out


def _first(queries: Sequence[Query]) -> tuple[Query, ...]:
    return tuple(replace(query, answers=tuple(answer[:1] for answer in query.answers)) for query in queries)


def steered_scores(model: Model, queries: Sequence[Query], pushes: Sequence[tuple[int, Push]]) -> list[Scores]:
    """Scores of the candidates when only the first token is predicted under the push, for each (layer, push)."""
    plain, first = score(model, queries), score(model, _first(queries))
    length = torch.full_like(plain.logprob, torch.nan)
    for q, query in enumerate(queries):
        length[q, : len(query.answers)] = torch.tensor([float(len(a)) for a in query.answers])
    arms = [{Site(layer, "resid_post"): push} for layer, push in pushes]
    return [
        Scores(plain.logprob + (pushed.logprob - first.logprob) / length, plain.exact)
        for pushed in score_each(model, _first(queries), arms)
    ]


def _pushes(found: dict[int, Tensor], points: Sequence[Point]) -> list[tuple[int, Push]]:
    out = []
    for point in points:
        v = found[point.layer]
        out.append((point.layer, Push(v if point.local else v.mean(0).expand_as(v), point.strength)))
    return out


def _margins(
    case: Case, model: Model, query_set: QuerySet, points: Sequence[Point]
) -> Float[Tensor, "point kind fact"]:
    pushes = _pushes(vectors(case, model, query_set.queries, sorted({p.layer for p in points})), points)
    return torch.stack([query_set.by_fact(scores) for scores in steered_scores(model, query_set.queries, pushes)])


def _operate(case: Case, points: Sequence[Point], model: Model, tune: QuerySet, test: QuerySet) -> Curves:
    require_positions(model)
    on_tune, on_test = (_margins(case, model, query_set, points) for query_set in (tune, test))
    return attack.same(on_tune.unbind(), on_test.unbind())


@torch.no_grad()
def sample(
    model: Model, queries: Sequence[Query], push: tuple[int, Push] | None, count: int, seed: int,
    *, max_tokens: int = 8192,
) -> list[list[str]]:  # fmt: skip
    """`count` sampled continuations of each question as text, up to the tokenizer's end-of-text token; the push acts
    on the first token only. Each question has its own random numbers, so that batches do not decide.

    Args:
        max_tokens: tokens of one batch at the most, those to come included.
    """
    longest = min(MAX_TOKENS, 2 + max(len(query.answers[0]) for query in queries))
    out: list[list[str]] = [[] for _ in queries]
    wide = [range(len(query.prompt) + longest) for query in queries]
    for members in buckets(wide, max_tokens=max_tokens // count):
        generators = [torch.Generator().manual_seed(seed + i) for i in members]
        ids = torch.tensor([queries[i].prompt for i in members], device=model.device)
        ids = ids.repeat_interleave(count, 0)
        index = torch.tensor(members, device=model.device).repeat_interleave(count)
        start = ids.shape[1]
        for step in range(longest):
            writes = []
            if step == 0 and push is not None:
                ends = torch.full_like(index, start - 1)
                batch = Batch(ids, index, torch.stack([ends, ends + 1], 1), ends)
                writes = [(Site(push[0], "resid_post"), partial(push[1], batch=batch))]
            with model.hooks(*writes):
                logits = last_logits(model, ids, 1)[:, -1].float().cpu() / TEMPERATURE
            top = logits.topk(min(TOP_K, logits.shape[1]), 1)
            shares = top.values.softmax(1).split(count)
            pick = torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(shares, generators, strict=True)])
            ids = torch.cat([ids, top.indices.gather(1, pick).to(ids.device)], 1)
        for i, row in zip(index.tolist(), ids[:, start:].tolist(), strict=True):
            out[i].append(text_of(model.tokenizer, row))
    return out


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of some tokens, up to the end-of-text token."""
    end = tokenizer.eos_token_id
    return tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens, skip_special_tokens=True)


def first_word(text: str) -> str:
    """The first word of a text without the punctuation around it; empty where there is none."""
    return (text.split() or [""])[0].strip(string.punctuation)


def _caf(case: Case, said: Sequence[Sequence[str]], queries: Sequence[Query]) -> Float[Tensor, " fact"]:
    share = [sum(q.fact.object in text for text in texts) / len(texts) for q, texts in zip(queries, said, strict=True)]
    return mean_by_fact(torch.tensor(share)[None], queries, case.facts)[0]


def _both(case: Case, steer: SteerReady, model: Model, point: Point) -> tuple[Tensor, list[list[str]]]:
    """(CAF plain and steered [2, fact], the steered samples) on TEST."""
    queries = steer.ready.test.true
    (push,) = _pushes(vectors(case, model, queries, [point.layer]), [point])
    plain, steered = (sample(model, queries, p, steer.samples, case.seed) for p in (None, push))
    return torch.stack([_caf(case, plain, queries), _caf(case, steered, queries)]), steered


def prepare(
    case: Case,
    shared: Levels | None = None,
    *,
    strengths: Sequence[float] = STRENGTHS,
    layers: Sequence[int] | None = None,
    samples: int = SAMPLES,
) -> SteerReady:
    """Steer the retrained models at every setting.

    Args:
        layers: by default the middle, three quarters up, and the last but one.
        samples: answers sampled per question with and without steering.

    Raises:
        ValueError: no strengths, no samples, or a layer that the model lacks.
    """
    depth = case.full.n_layers
    chosen = sorted({depth // 2, 3 * depth // 4, max(0, depth - 2)}) if layers is None else list(layers)
    if not strengths or samples < 1 or not chosen or not all(0 <= layer < depth for layer in chosen):
        raise ValueError(
            f"strengths={tuple(strengths)}, samples={samples}, layers={chosen}: give strengths, one sample at least, "
            f"and layers in 0..{depth - 1}"
        )
    points = tuple(Point(layer, c, local) for local in (True, False) for layer in chosen for c in strengths)
    words = [f"{'local' if p.local else 'global'} x{p.strength:g} layer {p.layer}" for p in points]
    ready = attack.prepare(case, shared, words, partial(_operate, case, points))
    return SteerReady(ready, points, samples)


def audit(case: Case, steer: SteerReady, model: Model, name: str) -> Result:
    """Steer the audited model, choose the setting on TUNE, then sample."""
    ready, keep = steer.ready, case.others_than(model)
    curves = attack.curves_of(case, ready, model, partial(_operate, case, steer.points))
    longest = min(MAX_TOKENS, 2 + max(len(query.answers[0]) for query in ready.test.true))
    fe = attack.fe_per_fact(ready, len(steer.points) + NAMES + 1) + 2 * steer.samples * longest
    found = attack.attack_result(case, ready, model, curves, test="steering_anonymised", name=name, cost_fe=fe)
    best = int(found.alpha or 0)
    caf, samples = _both(case, steer, model, steer.points[best])
    for k in keep:
        if (k, best) not in steer.caf:
            steer.caf[k, best] = _both(case, steer, case.retrained[k], steer.points[best])[0]
    injected = [steer.caf[k, best][1] - steer.caf[k, best][0] for k in keep]
    gain = caf[1] - caf[0]
    words = [Counter(map(first_word, texts)).most_common(1)[0] for texts in samples]
    first = [first_word(q.fact.object) for q in ready.test.true]
    confidence = torch.tensor([count / steer.samples for _, count in words])
    right = torch.tensor([float(word == own) for (word, _), own in zip(words, first, strict=True)])
    columns = {
        **found.columns,
        "caf": caf[1],
        "caf_plain": caf[0],
        "confidence": mean_by_fact(confidence[None], ready.test.true, case.facts)[0],
        "top_right": mean_by_fact(right[None], ready.test.true, case.facts)[0],
    }
    if injected:
        columns["caf_R"] = torch.stack(injected).mean(0)
        columns["dcaf_rho"] = (gain - columns["caf_R"]).clamp(0, 1)
    point = steer.points[best]
    return replace(found, columns=columns, layer=point.layer, alpha=point.strength)
