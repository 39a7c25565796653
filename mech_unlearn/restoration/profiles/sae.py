"""Restoration by profile: write "this is e" back into U and see whether U's own later layers still give the answers.

Paper:    Suppression or deletion? arXiv 2602.18505 (vision transformers; expert features of a TopK SAE injected
          from the full model on the same image).
Changes:  nothing; on the subject's tokens of U, at one site, the values of the entity's expert units are moved.
Needs:    an SAE of the full model (or none: one direction per entity), SELECT prompts of the entities and of others.
Differs:  the edit is a delta (Z' - Z) @ W_dec on the experts only, so SAE error cannot act, and no read-out state is
          copied (in the paper the class token is, which restores retrained models too). The main arm writes the mean
          profile from other prompts instead of the values on the same prompt. Answers leaking through an expert's
          direct effect are barred. Latents need half of the entity's (at most five) prompts as true positives.
          Arm A amplifies by 1 + alpha, so that alpha = 0 changes nothing in any arm. Collateral damage is measured by
          writing other entities' own profiles into their own prompts. Null N1 writes the same coefficients along the
          decoder rows of random latents that fire as often (+-20 %).
Fails:    blind to a block after the site (U's states there equal F's: nothing to write); UDS sees that one.

Arms: A amplify (1 + alpha) z(U); B profile z(U) + alpha (mu_e - z(U)); C oracle, F's values on the same prompt;
D full, h(F) in place of h(U) on the subject; N1 random units; N2 another entity's profile.
`score_raw` is the margin under arm B in nats; recoverability is rho_SAE = difference in differences of arm B.
RR_arm = clip((s(arm) - s(U)) / (s(F) - s(U)), 0, 1), undefined where s(F) - s(U) < 0.5 nat ("not lost in output").
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.latents import TRANSFER_BOUND
from mech_unlearn.model.scores import Batch, RowWrite, score
from mech_unlearn.restoration.engine.attack import both_levels
from mech_unlearn.restoration.engine.case import TUNE_FACTS, Case, split_queries
from mech_unlearn.restoration.engine.gain import gain_result, margins_after, measure_gain
from mech_unlearn.restoration.engine.levels import Levels, QuerySet
from mech_unlearn.restoration.engine.normalise import MIN_GAP
from mech_unlearn.restoration.profiles.experts import Profiles, contrast_facts, make_profiles, read_span
from mech_unlearn.restoration.profiles.steer import Arm, Steer, null_donors, null_rows
from mech_unlearn.verdict.result import Result

ALPHAS = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Strengths tried; 0 changes nothing. Source: grid of the release of arXiv 2602.18505, with 0.5 added."""
MAX_ACCURACY_DROP, MAX_KL = 0.02, 0.1
"""Collateral bounds: share of other facts lost, and nats of KL on their prompts, when their own profile is written."""
MIN_RHO = 0.1
"""Below this rho, or half a nat of gain, nothing was restored: no nulls are drawn, their rates are NaN and p_null is 1
(NaN where rho is)."""


@dataclass(frozen=True, eq=False)
class SaeLevels:
    """Profiles, and what they do to the retrained models at each strength."""

    profiles: Profiles
    tune: Levels
    test: Levels
    tune_retrained: Float[Tensor, "retrained alpha tune_fact"]
    test_retrained: Float[Tensor, "retrained alpha fact"]
    fvu_full: float


def _fact_index(profiles: Profiles, query_set: QuerySet) -> Int[Tensor, " query"]:
    """The place in `profiles.facts` of each query's fact. Ids alone may stand for one forgotten and one other fact; a
    profile is that of a subject and a relation, which a sham fact shares with the true one."""
    order = {(fact.subject, fact.relation, fact.id): i for i, fact in enumerate(profiles.facts)}
    asked = [query.fact for query in query_set.queries]
    return torch.tensor([order[f.subject, f.relation, f.id] for f in asked], device=profiles.target.device)


def _profile_curve(
    case: Case, profiles: Profiles, query_set: QuerySet, model: Model
) -> Float[Tensor, "alpha kind fact"]:
    """Margins under arm B at each strength."""
    index = _fact_index(profiles, query_set)
    arms = [Steer(profiles, "profile", alpha, index) for alpha in ALPHAS]
    return query_set.margins_each(model, [{case.write_site: arm} for arm in arms])


def prepare(case: Case, shared: Levels | None = None) -> SaeLevels:
    """Choose experts on the full model, and steer the retrained models at each strength."""
    profiles = make_profiles(case)
    tune, test = both_levels(case, shared)
    on_tune, on_test = (
        margins_after(
            case,
            lambda model, asked=levels.query_set: _profile_curve(case, profiles, asked, model),
            (len(ALPHAS), len(levels.full)),
        )
        for levels in (tune, test)
    )
    return SaeLevels(profiles, tune, test, on_tune, on_test, subject_fvu(case, test, case.full))


def subject_fvu(case: Case, test: Levels, model: Model) -> float:
    """sum ||h - h_hat||^2 / sum ||h - mean h||^2 at the subjects' last tokens; NaN without an SAE."""
    if case.sae is None:
        return float("nan")
    h = read_span(model, test.true, case.write_site)[0][:, 0]
    return ((h - case.sae.reconstruct(h)).square().sum() / (h - h.mean(0)).square().sum()).item()


def collateral(case: Case, profiles: Profiles, model: Model) -> list[tuple[float, float]]:
    """Per strength: share of other facts lost, and mean KL in nats, when other entities' own profiles are written.

    Measured on `TUNE_FACTS` other facts or up to twice as many, evenly spaced.
    """
    facts = contrast_facts(case)
    if not facts:
        return [(0.0, 0.0)] * len(ALPHAS)
    queries = split_queries(case, "tune", facts[:: max(1, len(facts) // TUNE_FACTS)], limit=1)
    query_set = QuerySet(facts, queries, 0)

    def run(write: RowWrite | None) -> tuple[Tensor, Tensor]:
        last = torch.zeros(len(queries), model.hf.config.vocab_size, device=model.device)

        def read(logits: Tensor, batch: Batch) -> None:
            at = logits[torch.arange(len(logits), device=logits.device), batch.end].float().log_softmax(-1)
            last[batch.query] = at[:, : last.shape[1]]

        places: dict[Site | str, RowWrite] = {"unembed.hook_out": read}
        if write is not None:
            places = {case.write_site: write, **places}
        return score(model, queries, places).exact.float(), last

    right, plain = run(None)
    index = _fact_index(profiles, query_set)
    out = []
    for alpha in ALPHAS:
        hit, steered = run(Steer(profiles, "profile", alpha, index))
        kl = (plain.exp() * (plain - steered)).sum(-1).mean().item()
        out.append(((right - hit).mean().item(), kl))
    return out


def choose_alpha(
    mean_rho: Float[Tensor, " alpha"], damage: Sequence[tuple[float, float]]
) -> tuple[int, tuple[str, ...]]:
    """Index of the strength with the largest mean rho among those within the collateral bounds.

    When none is, the smallest strength with the flag `collateral`.
    """
    fine = [i for i, (lost, kl) in enumerate(damage) if lost <= MAX_ACCURACY_DROP and kl <= MAX_KL]
    if not fine:
        return 0, ("collateral",)
    return max(fine, key=lambda i: mean_rho.nan_to_num(nan=0.0)[i].item()), ()


def restored_rate(
    before: Float[Tensor, " fact"], after: Float[Tensor, "*draw fact"], full: Float[Tensor, " fact"]
) -> Float[Tensor, "*draw fact"]:
    """RR = clip((s(arm) - s(U)) / (s(F) - s(U)), 0, 1); NaN where s(F) - s(U) < 0.5 nat."""
    lost = full - before
    return torch.where(lost >= MIN_GAP, ((after - before) / lost.clamp(min=MIN_GAP)).clamp(0, 1), torch.nan)


def _nulls(
    case: Case, ready: SaeLevels, model: Model, alpha: float, gained: Sequence[int]
) -> Float[Tensor, "kind draw fact"]:
    """Margins under each draw of N1 and N2, for the facts whose arm B gained something; NaN for the others."""
    profiles, facts = ready.profiles, tuple(case.facts[i] for i in gained)
    out = torch.full((2, case.draws, len(case.facts)), torch.nan)
    if not facts:
        return out
    asked = {fact.id for fact in facts}
    query_set = QuerySet(facts, tuple(query for query in ready.test.true if query.fact.id in asked), 0)
    index, used = _fact_index(profiles, query_set), profiles.chosen.any(0).nonzero()[:, 0].cpu()
    draw = random.Random(case.seed)
    for k in range(case.draws):
        rows = null_rows(profiles.units, used, profiles.rate, case.seed + k)
        donor = null_donors(profiles.facts, draw).to(index.device)
        arms = (
            Steer(profiles, "profile", alpha, index, rows=rows),
            Steer(profiles, "profile", alpha, index, donor=donor),
        )
        out[:, k, list(gained)] = query_set.margins_each(model, [{case.write_site: arm} for arm in arms])[:, 0]
    return out


def audit(case: Case, ready: SaeLevels, model: Model, name: str) -> Result:
    """Choose the strength on TUNE, then run every arm and the nulls on TEST."""
    keep, profiles, query_set = case.others_than(model), ready.profiles, ready.test.query_set
    tuned = ready.tune.rho(
        ready.tune.query_set.margins(model),
        _profile_curve(case, profiles, ready.tune.query_set, model),
        ready.tune_retrained,
        keep,
    )
    best, warning = choose_alpha(tuned.nanmean(1), collateral(case, profiles, model))
    alpha, index = ALPHAS[best], _fact_index(profiles, query_set)
    states = read_span(case.full, query_set.queries, case.write_site)[0]
    before = query_set.margins(model)

    wanted: tuple[tuple[Arm, float], ...] = (("profile", alpha), ("amplify", alpha), ("oracle", alpha), ("full", 1.0))
    steers = [Steer(profiles, arm, strength, index, states=states) for arm, strength in wanted]
    after, *others = query_set.margins_each(model, [{case.write_site: steer} for steer in steers])
    arms = dict(zip(("rr_amplify", "rr_oracle", "rr_full"), others, strict=True))
    rates = {name: restored_rate(before[0], scores[0], ready.test.full) for name, scores in arms.items()}
    found = measure_gain(case, ready.test, ready.test_retrained[:, best], model, lambda _: after, before)
    gain = after[0] - before[0]
    restored = (gain >= MIN_GAP) & (found.rho >= MIN_RHO)
    gained = restored.nonzero()[:, 0].tolist()
    nulls = _nulls(case, ready, model, alpha, gained)
    p_null = (1 + (nulls - before[0] >= gain).flatten(0, 1).sum(0)) / (1 + 2 * case.draws)
    rate = restored_rate(before[0], after[0], ready.test.full)
    null_rate = restored_rate(before[0], nulls, ready.test.full)
    ood = subject_fvu(case, ready.test, model) > TRANSFER_BOUND * ready.fvu_full
    flags = tuple(
        (
            *profiles.flags[fact.subject],
            *warning,
            *(("sae_ood",) if ood else ()),
            *(("not_lost",) if x != x else ()),
        )
        for fact, x in zip(case.facts, rate.tolist(), strict=True)
    )
    result = gain_result(
        case,
        found if keep else replace(found, ignorant=ready.test.never),
        test="sae",
        name=name,
        cost_fe=float(6 + 2 * case.draws * len(gained) / len(case.facts) + len(ALPHAS)),
        flags=flags,
        columns={
            "rr_profile": rate,
            "rr_control_adjusted": rate - null_rate.amax(0).mean(0),
            "rr_n1": null_rate[0].mean(0),
            "rr_n2": null_rate[1].mean(0),
            **rates,
        },
        curves={"tune_mean_rho": tuned.nanmean(1, keepdim=True).expand(-1, len(case.facts))},
        axis=ALPHAS,
    )
    tested = torch.where(restored, p_null, torch.where(found.rho.isnan(), torch.nan, 1.0))
    return replace(result, p_null=tested, alpha=alpha, layer=case.write_site.layer)
