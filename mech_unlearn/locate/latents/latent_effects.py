"""What single latents do to the answer: their decoder direction read out at once, and the answer without them.

Paper:    ablation as in Marks et al. 2024, Sparse feature circuits, arXiv 2403.19647 (error term kept); direct effect
          as direct logit attribution, Elhage et al. 2021, A mathematical framework for transformer circuits; random
          latents as control after Ferrando et al. 2024, arXiv 2411.14257, section 4.
Needs:    an SAE whose latents have fixed contributions; per fact and active latent one forward pass, and one for each
          control.
Differs:  effects are exact, not linearised by gradients or by a frozen norm: the contribution is added to the final
          residual stream and read out by the model's own code, or subtracted at the site and the rest recomputed. The
          control takes away as long a vector along another latent that is active on the same prompt.
Fails:    several latents may each be dispensable because the others stand in: `ablate` takes out a set at once.
          Removing a latent leaves the error term, which can carry the fact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact, Site
from mech_unlearn.locate.latents.ablate_latents import (
    Removal,
    active_codes,
    check_latents,
    control_of,
    decoder_rows,
    make_removals,
    without,
)
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import capture
from mech_unlearn.model.latents import Sae
from mech_unlearn.model.readout import read_out
from mech_unlearn.model.scores import score
from mech_unlearn.model.tokens import Query, make_queries


@dataclass(frozen=True, kw_only=True)
class LatentEffects:
    """Effects of latents on the answers of facts; means over facts with cluster-robust intervals, axes (latent,)."""

    ablation: Attribution
    """Change of the answer's log-probability when the latent alone is taken out, nats per answer token. Below zero: the
    answer needs it. A fact on which it is not active counts as 0."""
    control: Attribution
    """The same for equally long vectors along random other active latents; NaN if one of its prompts has no other."""
    logit: Attribution | None
    """Change of the logit of the answer's first token when the latent's contribution is added to the final residual
    stream at the last prompt token. None at `mlp_post`, whose decoder does not write into the residual stream."""
    logprob: Attribution | None
    """The same change as log-probability, nats: it leaves out what the latent does to all tokens alike."""
    active: Attribution
    """Share of a fact's prompts on which the latent is active."""
    per_fact: Attribution
    """`ablation` for each fact: axes (fact, latent)."""


@torch.no_grad()
def _direct(
    model: Model, queries: Sequence[Query], pairs: Sequence[Removal], rows: Tensor, where: str
) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """Change of logit and log-probability of the answer's first token when a contribution is added at the very end."""
    ends = [len(query.prompt) - 1 for query in queries]
    final = Site(model.n_layers - 1, "resid_post")
    states = capture(model, [query.prompt for query in queries], [final], ends, dtype=torch.float32)[final]
    token = torch.tensor([query.answers[0][0] for query in queries])
    plain = read_out(model, states).cpu()

    def read(logits: Tensor, tokens: Tensor) -> Tensor:
        both = (logits, logits.log_softmax(-1))
        return torch.stack([x.gather(1, tokens[:, None])[:, 0] for x in both])

    before, changes = read(plain, token), []
    for start in range(0, len(pairs), 512):
        chunk = pairs[start : start + 512]
        q = torch.tensor([pair.query for pair in chunk])
        # At the subject there is one entry; over all positions it is the last prompt token that writes directly.
        value = torch.stack(
            [p.value.sum() if where == "subject" else p.value[p.position == ends[p.query]].sum() for p in chunk]
        )
        added = states[q] + value[:, None] * rows[[pair.latent for pair in chunk]]
        changes.append(read(read_out(model, added).cpu(), token[q]) - before[:, q])
    change = torch.cat(changes, 1)
    return change[0], change[1]


def _table(
    site: Site,
    facts: Sequence[Fact],
    queries: Sequence[Query],
    labels: Sequence[int],
    pairs: Sequence[Removal],
    values: Float[Tensor, " pair"],
    name: str,
    unit: str,
    note: str,
) -> Attribution:
    """Mean over a fact's phrasings, 0 where the latent is not active; a latent with a NaN has NaN throughout."""
    column, order = {j: i for i, j in enumerate(labels)}, {fact.id: i for i, fact in enumerate(facts)}
    fact = torch.tensor([order[query.fact.id] for query in queries])
    per_query = torch.zeros(len(queries), len(labels))
    at = torch.tensor([(p.query, column[p.latent]) for p in pairs], dtype=torch.long).view(-1, 2)
    per_query[at[:, 0], at[:, 1]] = values
    per_query[:, per_query.isnan().any(0)] = torch.nan
    total = torch.zeros(len(facts), len(labels)).index_add(0, fact, per_query)
    return Attribution(
        name=f"{name} of latents at {site}",
        values=total / torch.bincount(fact, minlength=len(facts))[:, None],
        axes=("fact", "latent"),
        labels={"fact": tuple(order), "latent": tuple(labels)},
        unit=unit,
        n=len(facts),
        note=note,
    )


@torch.no_grad()
def direct_effect(
    model: Model,
    sae: Sae,
    facts: Sequence[Fact],
    latents: Sequence[int] | None = None,
    *,
    where: str = "subject",
    which: Literal["prompt", "templates"] = "prompt",
    draws: int = 3,
    seed: int = 0,
) -> LatentEffects:
    """Direct effect of latents on the answers, and total effect of taking each out alone, per fact and on average.

    Args:
        latents: by default all that are active at the chosen place of any prompt.
        where: take it out at the subject's last token, or at "all" tokens of prompt and answer but special ones. The
            direct effect adds the activation of the subject's last token, or that of the last prompt token for "all".
        which: the main prompt, or all phrasings that a method may see; a fact's effect is the mean over them.
        draws: random controls for each latent and prompt; never one of the given `latents`.

    Raises:
        ValueError: no facts, latents that do not exist, none active, or an SAE that does not fit or that scales each
            activation.
    """
    check_latents(model, sae, latents or (), where)
    decoder_rows(sae, [0])
    if not facts:
        raise ValueError("no facts to measure latents on: give at least one")
    queries = make_queries(model.tokenizer, facts, which, distractors=False)
    codes = active_codes(model, sae, queries, where)
    firing = torch.cat([code.latent for code in codes]).unique().tolist()
    labels = tuple(firing if latents is None else latents)
    if not labels:
        raise ValueError(f"no latent is active at {sae.site} on these prompts (where={where!r})")
    pairs = make_removals(codes, labels, () if latents is None else labels)
    rows = decoder_rows(sae, range(sae.d_sae)).cpu()
    clean = score(model, queries).logprob[:, 0]
    table = partial(_table, sae.site, facts, queries, labels, pairs)
    own = other = torch.zeros(0)
    if pairs:
        before = clean[[p.query for p in pairs]]
        own = without(model, sae.site, queries, pairs, rows[[p.latent for p in pairs]]) - before
        other = control_of(model, sae.site, queries, pairs, rows, draws, seed) - before
    spot = "at the subject's last token" if where == "subject" else "at all ordinary tokens"
    nats = "change of the answer's log-probability (nats per token)"
    taken = f"taken out {spot}, {len(queries)} prompts"
    ablation = table(own, "ablation", nats, taken)
    control = table(
        other, "ablation control", nats, f"random other active latents, equally long, {draws} draws; {taken}"
    )
    active = table(torch.ones(len(pairs)), "activity", "share of the fact's prompts", f"active {spot}")
    direct: list[Attribution | None] = [None, None]
    if rows.shape[1] == model.d_model:
        changes = _direct(model, queries, pairs, rows, where) if pairs else (torch.zeros(0), torch.zeros(0))
        units = ("change of the logit of the answer's first token", "change of its log-probability (nats)")
        note = "contribution added to the final residual stream at the last prompt token"
        direct = [table(x, "direct effect", unit, note).mean(facts) for x, unit in zip(changes, units, strict=True)]
    return LatentEffects(
        ablation=ablation.mean(facts),
        control=control.mean(facts),
        logit=direct[0],
        logprob=direct[1],
        active=active.mean(facts),
        per_fact=ablation,
    )


@takes_settings_of(direct_effect)
def latent_ablation(model: Model, facts: Sequence[Fact], *, sae: Sae, **settings: Any) -> Attribution:
    """What the answer loses when one latent alone is taken out: axes (latent,), nats per answer token.

    See `direct_effect`, whose settings it takes.
    """
    found = direct_effect(model, sae, facts, **settings)
    note = f"{found.ablation.note}; random control {found.control.values.nanmean():.3f} on average"
    return replace(found.ablation, note=note)
