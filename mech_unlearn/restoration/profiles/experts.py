"""What makes an entity recognisable inside the full model: expert latents, or a direction where there are none.

A *unit* is an SAE latent or, for each entity, one unit direction (mean state of the entity minus mean state of the
others). A *profile* is the mean value of each unit at each token of the name, counted from its last token, over the
SELECT prompts. The profile for a fact leaves out the prompts that ask for its relation, wherever the entity has
other relations, so that no state that was on its way to the answer is in it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.core import Fact, Site
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import stream
from mech_unlearn.model.latents import Sae
from mech_unlearn.model.pieces import token_rows
from mech_unlearn.model.scores import Batch, score
from mech_unlearn.model.tokens import Query
from mech_unlearn.restoration.engine.case import Case, split_queries

EXPERTS_PER_L0 = 1.25
"""Experts per entity over the mean number of active latents. Source: release of arXiv 2602.18505, round(1.25 k)."""
MIN_F1 = 0.5
"""Best F1 of an entity's latents below which its direction is used instead."""
MOST_OTHERS = 60
"""Other subjects used as contrast, at the most; the others are left out for cost."""


@dataclass(frozen=True, eq=False)
class Units:
    """The directions that can be written along, and how their present values are read."""

    sae: Sae | None
    directions: Float[Tensor, "entity d_model"]
    rows: Float[Tensor, "unit d_model"]
    """Decoder rows of the latents, then the directions."""

    def read(self, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch unit"]:
        """Latent activations and projections on the directions."""
        along = h.float() @ self.directions.T
        return along if self.sae is None else torch.cat([self.sae.encode(h), along], -1)


@dataclass(frozen=True, eq=False)
class Profiles:
    """The units and profile of each fact's entity."""

    units: Units
    facts: tuple[Fact, ...]
    chosen: Bool[Tensor, "fact unit"]
    target: Float[Tensor, "fact offset unit"]
    known: Bool[Tensor, "fact offset"]
    """Whether any SELECT prompt names the entity with so many tokens."""
    rate: Float[Tensor, " unit"]
    """Share of SELECT prompts on which a latent fires; 1 for a direction."""
    flags: dict[str, tuple[str, ...]]
    """Subject -> flags."""


@torch.no_grad()
def read_span(
    model: Model, queries: Sequence[Query], site: Site
) -> tuple[Float[Tensor, "query offset d_model"], Bool[Tensor, "query offset"]]:
    """Activations at the subject's tokens, last token first, and which of them exist."""
    short = [replace(query, answers=query.answers[:1]) for query in queries]
    widths = torch.tensor([query.span[1] - query.span[0] for query in queries])
    valid = torch.arange(int(widths.max()))[None] < widths[:, None]
    kept: dict[int, Tensor] = {}

    def read(x: Tensor, batch: Batch) -> None:
        for row, query in enumerate(batch.query.tolist()):
            start, end = batch.span[row].tolist()
            kept[query] = x[row, start:end].flip(0).float()

    score(model, short, {site: read})
    out = torch.zeros(*valid.shape, next(iter(kept.values())).shape[-1], device=model.device)
    for query, rows in kept.items():
        out[query, : len(rows)] = rows
    return out, valid.to(model.device)


def contrast_facts(case: Case) -> tuple[Fact, ...]:
    """The facts about up to `MOST_OTHERS` other subjects, drawn with the case's seed."""
    mine = {fact.subject for fact in case.facts}
    subjects = sorted({fact.subject for fact in case.others} - mine)
    random.Random(case.seed).shuffle(subjects)
    taken = set(subjects[:MOST_OTHERS])
    return tuple(fact for fact in case.others if fact.subject in taken)


def expert_scores(
    fires: Bool[Tensor, "prompt latent"], entity: Int[Tensor, " prompt"], entities: int
) -> tuple[Float[Tensor, "entity latent"], Float[Tensor, "entity latent"]]:
    """F1 of "latent fires" as a test for "prompt names the entity", and the number of true positives.

    Source: the released code of arXiv 2602.18505 (precision and recall of active against class).
    """
    member = torch.nn.functional.one_hot(entity, entities).float()
    hits = member.T @ fires.float()
    positives, fired = member.sum(0)[:, None], fires.float().sum(0)[None]
    return 2 * hits / (positives + fired).clamp(min=1), hits


def unspecific(
    fires: Bool[Tensor, "prompt latent"], entity: Int[Tensor, " prompt"], entities: int
) -> Bool[Tensor, " latent"]:
    """Latents that fire on at least 10 % of the prompts of at least 70 % of the entities."""
    member = torch.nn.functional.one_hot(entity, entities).float()
    share = (member.T @ fires.float()) / member.sum(0)[:, None]
    return (share >= 0.1).float().mean(0) >= 0.7


@torch.no_grad()
def generic(model: Model, sae: Sae, texts: Sequence[str], l0: float) -> Bool[Tensor, " latent"]:
    """Latents that fire on more than 1 % of the tokens of generic text, or more than the mean latent does where that is
    more (a small SAE: L0 / d_sae); none without texts. Long texts are read in pieces, see `pieces.pieces`.

    Args:
        l0: latents active per token.
    """
    count, total = torch.zeros(sae.d_sae, device=model.device), 0
    for part in stream(model, token_rows(model, texts[:200]), [sae.site], max_tokens=1):  # one row at a time
        fires = sae.encode(part.at[sae.site].to(model.device)) > 0
        count += fires.float().sum(0)
        total += len(fires)
    return count / max(total, 1) > max(0.01, l0 / sae.d_sae)


@torch.no_grad()
def direct_effect(
    model: Model, rows: Float[Tensor, "unit d_model"], state: Float[Tensor, " d_model"], tokens: Int[Tensor, " token"]
) -> Float[Tensor, "unit token"]:
    """First-order change of these tokens' logits per unit length of each row, added to the residual stream before the
    final norm.

    The final norm is differentiated at `state` by central differences in the model's own code, so that each
    architecture's norm (and its scale) is the true one; with its weights in float32, as the steps are too small for
    fewer digits.
    """
    size = 1e-2 * state.norm()
    steps = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12) * size
    norm = model.component("ln_final")
    weights = {name: weight.float() for name, weight in norm.named_parameters()}
    above, below = (torch.func.functional_call(norm, weights, (x[None],))[0] for x in (state + steps, state - steps))
    change = (above - below) / (2 * size)
    return change @ model.hf.get_output_embeddings().weight[tokens].float().T


def leaking_units(
    model: Model, rows: Float[Tensor, "unit d_model"], queries: Sequence[Query], state: Float[Tensor, " d_model"]
) -> dict[str, Bool[Tensor, " unit"]]:
    """Subject -> units in the top 1 % of |direct effect| on an answer of the subject against its distractors."""
    tokens = sorted({answer[0] for query in queries for answer in query.answers})
    effect = direct_effect(model, rows, state, torch.tensor(tokens, device=rows.device))
    column = {token: i for i, token in enumerate(tokens)}
    out: dict[str, Tensor] = {}
    for query in queries:
        first = [column[answer[0]] for answer in query.answers]
        toward = effect[:, first[0]] - (effect[:, first[1:]].mean(1) if len(first) > 1 else 0.0)
        top = toward.abs().topk(max(1, len(rows) // 100)).indices
        mask = out.setdefault(query.fact.subject, torch.zeros(len(rows), dtype=torch.bool, device=effect.device))
        mask[top] = True
    return out


def make_profiles(case: Case) -> Profiles:
    """Expert units and profiles of every entity of the case and of the contrast, from the full model alone."""
    site, facts = case.write_site, (*case.facts, *contrast_facts(case))
    queries = split_queries(case, "select", facts, limit=10**6)
    h, valid = read_span(case.full, queries, site)
    subjects = list(dict.fromkeys(fact.subject for fact in facts))
    if len(subjects) < 2:
        raise ValueError("profiles need at least two subjects: give facts about others (Case(others=...))")
    entity = torch.tensor([subjects.index(query.fact.subject) for query in queries], device=h.device)
    directions = _directions(h[:, 0], entity, len(subjects))
    rows = directions if case.sae is None else torch.cat([case.sae.w_dec.detach().float(), directions])
    units = Units(case.sae, directions, rows)
    values = units.read(h) * valid[..., None]
    by_entity, flags = _choose(case, units, values, valid, entity, subjects)
    target, known = _targets(values, valid, queries, facts)
    of_fact = torch.tensor([subjects.index(fact.subject) for fact in facts], device=h.device)
    rate = (values.amax(1) > 0).float().mean(0)
    rate[len(rows) - len(subjects) :] = 1.0
    return Profiles(units, facts, by_entity[of_fact], target, known, rate, flags)


def _directions(last: Float[Tensor, "prompt d_model"], entity: Tensor, entities: int) -> Tensor:
    """Unit directions from the mean state of all other entities to that of each entity."""
    member = torch.nn.functional.one_hot(entity, entities).float()
    means = (member.T @ last) / member.sum(0)[:, None]
    away = means - (means.sum(0, keepdim=True) - means) / (entities - 1)
    return away / away.norm(dim=1, keepdim=True).clamp(min=1e-12)


def active_latents(sae: Sae, values: Float[Tensor, "*place latent"], valid: Bool[Tensor, "*place"]) -> float:
    """Latents active per token: what the SAE says of itself, else the mean over these tokens."""
    known = sae.mean_l0
    return (values[valid] > 0).float().sum(-1).mean().item() if known is None else known


def _choose(
    case: Case, units: Units, values: Tensor, valid: Tensor, entity: Tensor, subjects: Sequence[str]
) -> tuple[Bool[Tensor, "entity unit"], dict[str, tuple[str, ...]]]:
    n, latents = len(subjects), len(units.rows) - len(subjects)
    chosen = torch.zeros(n, len(units.rows), dtype=torch.bool, device=values.device)
    if case.sae is None:
        chosen[torch.arange(n), torch.arange(n)] = True
        return chosen, {subject: ("direction",) for subject in subjects}
    l0 = active_latents(case.sae, values[..., :latents], valid)
    fires = values[..., :latents].amax(1) > 0
    f1, hits = expert_scores(fires, entity, n)
    positives = torch.bincount(entity, minlength=n).to(hits)
    barred = unspecific(fires, entity, n) | generic(case.full, case.sae, case.texts, l0)
    f1 = f1.masked_fill(barred[None] | (hits < positives.clamp(max=5)[:, None] * 0.5), 0.0)
    for subject, mask in _leaks(case, units.rows[:latents]).items():
        f1[subjects.index(subject), mask] = 0.0
    most = min(max(1, round(EXPERTS_PER_L0 * l0)), latents)
    flags: dict[str, tuple[str, ...]] = {}
    for e, subject in enumerate(subjects):
        if f1[e].max() < MIN_F1:
            chosen[e, latents + e] = True
            flags[subject] = ("no_expert", "direction")
        else:
            best = f1[e].topk(most)
            chosen[e, best.indices[best.values > 0]] = True
            flags[subject] = ()
    return chosen, flags


def _leaks(case: Case, rows: Tensor) -> dict[str, Tensor]:
    queries = split_queries(case, "test")
    site, states = Site(case.full.n_layers - 1, "resid_post"), []

    def read(x: Tensor, batch: Batch) -> None:
        states.append(x[torch.arange(len(x), device=x.device), batch.end].float())

    score(case.full, queries, {site: read})
    return leaking_units(case.full, rows, queries, torch.cat(states).mean(0))


def _targets(
    values: Float[Tensor, "prompt offset unit"], valid: Tensor, queries: Sequence[Query], facts: Sequence[Fact]
) -> tuple[Float[Tensor, "fact offset unit"], Bool[Tensor, "fact offset"]]:
    target = torch.zeros(len(facts), *values.shape[1:], device=values.device)
    known = torch.zeros(len(facts), values.shape[1], dtype=torch.bool, device=values.device)
    by_subject: dict[str, list[int]] = {}
    for q, query in enumerate(queries):
        by_subject.setdefault(query.fact.subject, []).append(q)
    for i, fact in enumerate(facts):
        mine = by_subject[fact.subject]
        away = [q for q in mine if queries[q].fact.relation != fact.relation] or mine
        count = valid[away].sum(0)
        target[i] = values[away].sum(0) / count.clamp(min=1)[:, None]
        known[i] = count > 0
    return target, known
