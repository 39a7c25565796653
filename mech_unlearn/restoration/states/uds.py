"""UDS: is the fact still written in U's states, in a form that the full model's own later layers can read?

Paper:    Unlearning Depth Score, arXiv 2605.24614: two-stage activation patching into the full model.
Changes:  nothing; the residual stream of F is written over with that of R (stage 1) or U (stage 2).
Needs:    per phrasing one forward of F and of each source, and per source one suffix sweep over F's layers.
Differs:  (a) true resid_post is patched at the last layer too; the reference patches HF hidden_states, whose last
          entry already went through the final norm, so that their F -> F is not exactly 0. (b) D^S1 is the mean over
          retrained models, its spread is kept. (c) the raw ratio is kept beside the clipped one and flagged above 3.
          (d) the span is the whole answer. (e) variant `uds_subject` patches the subject's last token only, so that
          no answer text is in context. (f) recoverability = 1 - UDS / (mean UDS of held-out retrained models),
          because clipping makes even a retrained model score below 1 against the mean of the others. (g) without a
          retrained model the S1 source is F itself reading the prompt about an unknown subject (or, with none
          given, the mean state of up to eight other subjects): grade B.
Fails:    blind to a block before the patched layer, for example in the embedding (U's states really lack the fact
          there): such a model looks deleted here, and the restoration tests must speak.

UDS_i = sum_{l in KE} D1_l clip(D2_l / D1_l, 0, 1) / sum_{l in KE} D1_l, KE = {l: D1_l > tau}, D_l = drop of the mean
log-probability per answer token (nats) when layer l of F is patched. 1 = erased to the level of R, 0 = intact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.model.answers import answer_rows, answer_score, equal_shape
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import capture
from mech_unlearn.model.sweep import Patch, put, record, sweep
from mech_unlearn.model.tokens import Ask, Query, tokenize
from mech_unlearn.restoration.engine.case import Case, make_result
from mech_unlearn.restoration.engine.levels import Levels, make_query_set
from mech_unlearn.restoration.engine.normalise import mean_by_fact
from mech_unlearn.verdict.result import Result

TAU = 0.05
"""Nats below which a layer of R does not count as lacking the fact. Source: arXiv 2605.24614, default tau."""
RAW_RATIO_FLAG = 3.0
"""Raw D2 / D1 above which the states are broken rather than erased (RMU reaches 57 in the paper's guide)."""
STAND_INS = 8
"""Other subjects whose mean state stands for ignorance when neither retrained models nor unknown names are given."""
RowKind = Literal["answer", "subject"]


@dataclass(frozen=True)
class UdsScore:
    """UDS per fact with what it is made of."""

    uds: Float[Tensor, " fact"]
    """NaN where no layer of R lacks the fact."""
    raw: Float[Tensor, " fact"]
    """The same weighted mean without clipping."""
    layers: Bool[Tensor, "layer fact"]
    """KE: the layers that count."""


def uds_score(
    drop_retrained: Float[Tensor, "layer fact"], drop_unlearned: Float[Tensor, "layer fact"], tau: float = TAU
) -> UdsScore:
    """UDS from the drops D^S1 and D^S2 in nats. Source: arXiv 2605.24614."""
    layers = drop_retrained > tau
    weight = torch.where(layers, drop_retrained, torch.zeros_like(drop_retrained))
    ratio = drop_unlearned / torch.where(layers, drop_retrained, torch.ones_like(drop_retrained))
    total = weight.sum(0)

    def mean(x: Tensor) -> Tensor:
        return torch.where(total > 0, (weight * x).sum(0) / total.clamp(min=1e-30), torch.nan)

    return UdsScore(mean(ratio.clamp(0, 1)), mean(ratio), layers)


@dataclass(frozen=True)
class Rowset:
    """Which positions of each query are read and written, counted from the last prompt token or the subject's end."""

    rows: RowKind
    count: Int[Tensor, " query"]

    def places(self, queries: Sequence[Query]) -> list[range]:
        """The patched positions of each query."""
        first = [len(q.prompt) - 1 if self.rows == "answer" else q.span[1] - 1 for q in queries]
        return [range(a, a + n) for a, n in zip(first, self.count.tolist(), strict=True)]


def rowset(queries: Sequence[Query], rows: RowKind) -> Rowset:
    """The rows that predict the answer's tokens, or the one row of the subject's last token."""
    return Rowset(rows, torch.tensor([len(q.answers[0]) if rows == "answer" else 1 for q in queries]))


def read_rows(model: Model, queries: Sequence[Query], rows: Rowset) -> Float[Tensor, "layer query row d_model"]:
    """resid_post of every layer at the rows of each query, zero behind a shorter query's last; from one pass through
    the layers, without the unembedding and what follows the rows."""
    places = rows.places(queries)
    sites = [Site(layer, "resid_post") for layer in range(model.n_layers)]
    inputs = [query.full[: where[-1] + 1] for query, where in zip(queries, places, strict=True)]
    store = capture(model, inputs, sites, places, dtype=torch.float32)
    out = torch.zeros(model.n_layers, len(queries), int(rows.count.max()), model.d_model)
    out[:, torch.arange(out.shape[2]) < rows.count[:, None]] = torch.stack([store[site] for site in sites])
    return out


@torch.no_grad()
def drops(
    full: Model,
    queries: Sequence[Query],
    rows: Rowset,
    states: Float[Tensor, "source layer query row d_model"],
    max_tokens: int = 32_768,
) -> Float[Tensor, "source layer query"]:
    """D: how many nats per answer token F loses when one layer's rows are replaced by a source's states.

    F runs once on each query. All layers and sources share one suffix sweep from the first replaced row on.
    """
    sources, layers = states.shape[:2]
    out = torch.zeros(sources, layers, len(queries))
    for members in equal_shape(queries, max(1, max_tokens // (sources * layers))):
        part = [queries[i] for i in members]
        answers = [query.answers[0] for query in part]
        read = answer_rows(part)
        where = read if rows.rows == "answer" else [part[0].span[1] - 1]
        at = torch.tensor(where, device=full.device).expand(len(part), -1)
        theirs = states[:, :, members, : len(where)]
        every = torch.arange(len(part), device=full.device)
        patches = [
            Patch(every, ((Site(layer, "resid_post"), put(at, theirs[source, layer])),), where[0])
            for source in range(sources)
            for layer in range(layers)
        ]
        run = record(full, torch.tensor([query.full[:-1] for query in part], device=full.device))
        baseline = answer_score(full, run.resid[-1][:, read], answers, "logprob")
        final = torch.cat(sweep(run, patches, read, max_tokens=max_tokens))
        patched = answer_score(full, final, answers * len(patches), "logprob")
        out[:, :, members] = (baseline - patched.unflatten(0, (sources, layers, -1))).cpu()
    return out


@dataclass(frozen=True, eq=False)
class UdsLevels:
    """Stage 1, shared by all audited models."""

    queries: tuple[Query, ...]
    rows: Rowset
    drops: Float[Tensor, "retrained layer fact"]
    heldout: Float[Tensor, "heldout fact"]
    """UDS of each retrained model against the mean of the others; no rows with fewer than two of them."""


def ceiling(heldout: Float[Tensor, "heldout fact"]) -> float:
    """Mean erasure of a held-out retrained model; 1 where that is not known."""
    return heldout.nanmean().item() if len(heldout) else 1.0


def _true_only(queries: Sequence[Query]) -> tuple[Query, ...]:
    return tuple(replace(query, answers=query.answers[:1]) for query in queries)


def _drops_of(case: Case, levels: UdsLevels, states: Sequence[Tensor]) -> Float[Tensor, "source layer fact"]:
    """D per source, layer and fact for the states of some sources, the mean over phrasings."""
    per_query = drops(case.full, levels.queries, levels.rows, torch.stack(list(states)))
    return torch.stack([mean_by_fact(some, levels.queries, case.facts) for some in per_query])


def source_drop(case: Case, levels: UdsLevels, source: Model) -> Float[Tensor, "layer fact"]:
    """D per layer and fact for one source model that reads the same prompts."""
    return _drops_of(case, levels, [read_rows(source, levels.queries, levels.rows)])[0]


def prepare(case: Case, shared: Levels | None = None, *, rows: RowKind = "answer") -> UdsLevels:
    """Stage 1: the drops caused by the states of each retrained model."""
    queries = _true_only((shared or make_query_set(case, "test")).true)
    chosen = rowset(queries, rows)
    empty = torch.zeros(0, case.full.n_layers, len(case.facts))
    levels = UdsLevels(queries, chosen, empty, empty[:, 0])
    if case.retrained:
        states = [read_rows(model, queries, chosen) for model in case.retrained]
    else:
        states = [ignorant_states(case, queries, chosen)]
    stacked = _drops_of(case, levels, states)
    rest = [torch.cat([stacked[:k], stacked[k + 1 :]]).mean(0) for k in range(len(stacked))]
    several = len(stacked) > 1
    heldout = [uds_score(other, own).uds for other, own in zip(rest, stacked)] if several else []
    return replace(levels, drops=stacked, heldout=torch.stack(heldout) if heldout else levels.heldout)


def ignorant_states(case: Case, queries: Sequence[Query], rows: Rowset) -> Tensor:
    """F's states on the same prompts about subjects it can say nothing definite of; stands in for a retrained model.

    One unknown subject per fact, or the mean state of up to eight other subjects (mean ablation): a single known
    subject would bring its own answer along, which is more wrong than ignorance.
    """
    names = [_stand_ins(case, i) for i in range(len(case.facts))]
    index = {fact.id: i for i, fact in enumerate(case.facts)}
    total = torch.zeros(0)
    draws = max(map(len, names))
    for draw in range(draws):
        asks = []
        for query in queries:
            mine = names[index[query.fact.id]]
            asks.append(Ask(query.fact, query.template, mine[draw % len(mine)]))
        asked = tokenize(case.full.tokenizer, asks, distractors=False)
        states = read_rows(case.full, asked, rows) / draws
        total = states if draw == 0 else total + states
    return total


def _stand_ins(case: Case, i: int) -> tuple[str, ...]:
    if case.unknown:
        return (case.unknown[i % len(case.unknown)].name,)
    fact, known = case.facts[i], (*case.facts, *case.others)
    away = [other for other in known if other.subject != fact.subject and other.object != fact.object]
    alike = [other for other in away if other.relation == fact.relation] or away
    if not alike:
        raise ValueError(f"fact {fact.id!r}: without retrained models UDS needs other subjects (Case(unknown=...))")
    return tuple(dict.fromkeys(other.subject for other in alike))[:STAND_INS]


def audit(case: Case, levels: UdsLevels, model: Model, name: str) -> Result:
    """Stage 2: the drops caused by the audited model's states, set against those of the retrained models."""
    keep = case.others_than(model)
    index = case.index_of(model)
    found = levels.drops[index] if index is not None else source_drop(case, levels, model)
    never = levels.drops[keep] if keep else levels.drops
    got = uds_score(never.mean(0), found)
    single = torch.stack([uds_score(d, found).uds for d in never])
    spread = never.std(0) if len(never) > 1 else torch.full_like(found, torch.nan)
    return erasure_result(
        case,
        got,
        levels.heldout,
        keep,
        test="uds" if levels.rows.rows == "answer" else "uds_subject",
        name=name,
        cost_fe=float((1 + case.full.n_layers) * len(levels.queries) / len(case.facts)),
        columns={"uds_sd": _sd(single)},
        curves={"drop": found, "drop_R": never.mean(0), "drop_R_sd": spread},
    )


def erasure_result(
    case: Case,
    got: UdsScore,
    heldout: Float[Tensor, "heldout fact"],
    keep: Sequence[int],
    *,
    test: str,
    name: str,
    cost_fe: float,
    columns: Mapping[str, Float[Tensor, " fact"]],
    curves: Mapping[str, Float[Tensor, "layer fact"]],
) -> Result:
    """The result of an erasure score over layers: recoverability = 1 - erasure / (mean erasure of held-out retrained
    models), within [0, 1].

    Args:
        heldout: erasure of each retrained model against the mean of the others.
        keep: the retrained models that the audited one is compared with.
    """
    top, facts = ceiling(heldout), len(case.facts)
    flags = [
        (*(("no_KE_layer",) if x != x else ()), *(("raw_ratio_above_3",) if r > RAW_RATIO_FLAG else ()))
        for x, r in zip(got.uds.tolist(), got.raw.tolist(), strict=True)
    ]
    return make_result(
        case,
        test,
        name,
        score_raw=got.uds,
        score_full=0.0,
        score_retrained=heldout[list(keep)] if len(heldout) else torch.ones(max(1, len(keep)), facts),
        null=(1 - heldout / top).clamp(0, 1),
        kappa=1 - got.uds / top,
        cost_fe=cost_fe,
        flags=flags,
        columns={"raw_ratio": got.raw, "ke_layers": got.layers.sum(0).float(), **columns},
        curves=curves,
    )


def _sd(x: Float[Tensor, "retrained fact"]) -> Float[Tensor, " fact"]:
    return x.std(0) if len(x) > 1 else torch.full(x.shape[1:], torch.nan)
