"""Attribution patching: activation patching of every site at once, estimated from one gradient.

Paper:    Nanda 2023, attribution patching; Syed et al. 2023, arXiv 2310.10348; Kramar et al. 2024, AtP*,
          arXiv 2403.00745. Several steps: Hanna et al. 2024, EAP-IG, arXiv 2403.17806.
Needs:    per fact two forward passes and `steps` backward passes, whatever the number of sites.
Differs:  pairs, classes of tokens and scores are those of `activation_patching`, so that `agreement` compares like
          with like; with `steps` > 1 the gradient is the mean over runs whose embeddings lie between the two prompts
          (midpoints), the cure for saturation used here; AtP*'s recomputed attention patterns and dropped gradients
          are not implemented.
Fails:    it is linear: a saturated attention pattern or answer has no gradient (false negatives, worst for q and k and
          for whole early residual states), and paths that cancel at the point of the gradient hide each other.
          Measure it with `agreement` before trusting it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact, Site, SiteKind
from mech_unlearn.locate.patching.activation_patching import HEADS, Effects, as_attribution, patch_table, units_of
from mech_unlearn.locate.patching.pairs import Pair, check_metric, class_places, make_pairs, record_pairs
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.model.answers import answer_rows, answer_score
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.bridge import Write as Hook
from mech_unlearn.model.sweep import refuse_interventions


def _gradients(
    model: Model, embedded: Tensor, ids: Tensor, sites: Sequence[Site], pairs: Sequence[Pair], metric: str
) -> list[Tensor]:
    """Gradient of the summed score at each site, for rows with the given embeddings."""
    kept: dict[Site, Tensor] = {}
    final: list[Tensor] = []
    start = embedded.detach().requires_grad_()
    last = Site(model.n_layers - 1, "resid_post")

    def reader(site: Site) -> Hook:
        def read(x: Tensor) -> Tensor:
            kept[site] = x
            return x  # heads are read through a view: only what is given back is what the model goes on with

        return read

    reads = [(site, reader(site)) for site in sites]
    with torch.enable_grad(), model.hooks(("hook_embed", lambda _: start), *reads, (last, lambda x: final.append(x))):
        model.logits(ids)
    answers = [p.own.answers[0] for p in pairs]
    with torch.enable_grad():
        score = answer_score(model, final[0][:, answer_rows([p.own for p in pairs])], answers, metric)
    return list(torch.autograd.grad(score.sum(), [kept[site] for site in sites]))


def _estimate_group(
    model: Model, pairs: Sequence[Pair], kind: SiteKind, units: Sequence[str], direction: str, metric: str, steps: int
) -> Effects:
    """Estimated effect of each patch on pairs of equal shape."""
    sites = [Site(layer, kind) for layer in range(model.n_layers)]
    base, source = record_pairs(model, pairs, direction, sites, cache=False)
    ends: list[Tensor] = []
    for run in (base, source):
        with torch.no_grad(), model.hooks(("hook_embed", lambda x: ends.append(x))):
            model.logits(run.ids)
    total = [torch.zeros_like(base.state(site)) for site in sites]
    for step in range(steps):
        share = 0.0 if steps == 1 else (step + 0.5) / steps
        found = _gradients(model, torch.lerp(ends[0], ends[1], share), base.ids, sites, pairs, metric)
        total = [a + g / steps for a, g in zip(total, found, strict=True)]
    read, answers = answer_rows([p.own for p in pairs]), [p.own.answers[0] for p in pairs]
    with torch.no_grad():
        before, after = (answer_score(model, run.resid[-1][:, read], answers, metric).cpu() for run in (base, source))
    places = class_places(pairs[0].own)
    size = len(units) if kind not in HEADS else base.state(sites[0]).shape[2]
    effects = torch.full((len(pairs), size, model.n_layers), float("nan"))
    for layer, (site, gradient) in enumerate(zip(sites, total, strict=True)):
        share = (gradient * (source.state(site) - base.state(site))).sum(-1).cpu()  # [pair, pos] or [pair, pos, head]
        for u, unit in enumerate(units):
            if chosen := places[unit]:
                summed = share[:, chosen].sum(1)
                effects[:, slice(None) if kind in HEADS else u, layer] = summed
    return effects, before, after


def attribution_patching_per_fact(
    model: Model,
    facts: Sequence[Fact],
    *,
    kind: SiteKind = "resid_post",
    direction: str = "denoise",
    metric: str = "logprob",
    at: str | None = None,
    steps: int = 1,
    others: Sequence[Fact] = (),
    seed: int = 0,
    max_tokens: int = 8192,
) -> Attribution:
    """Estimated effect of each patch for each fact: axes and units of `activation_patching_per_fact`.

    The estimate is (source state - base state) . d score / d state, summed over the tokens of a class; the gradient is
    that of the base run (steps = 1), or the mean over `steps` runs between base and source.

    Raises:
        KeyError: a kind that the architecture lacks.
        ValueError: no facts, no partner of equal length, metric "exact" (it has no gradient), settings out of range.
    """
    refuse_interventions(model)
    check_metric(metric)
    if metric == "exact":
        raise ValueError("metric 'exact' has no gradient: choose logprob or probability")
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one gradient is needed")
    units = units_of(kind, at)
    pairs = make_pairs(model, facts, others, seed)
    found = patch_table(
        model,
        pairs,
        lambda some: _estimate_group(model, some, kind, units, direction, metric, steps),
        max_tokens,
    )
    how = "gradient of the base run" if steps == 1 else f"mean gradient of {steps} runs between base and source"
    where = f" at {at}" if at else ""
    return as_attribution(
        f"attribution patching, {kind}{where}, {direction}", facts, found, kind, units, metric, how
    )  # fmt: skip


@takes_settings_of(attribution_patching_per_fact)
def attribution_patching(model: Model, facts: Sequence[Fact], **settings: Any) -> Attribution:
    """Average over facts of `attribution_patching_per_fact`: axes (token, layer) or (layer, head)."""
    return attribution_patching_per_fact(model, facts, **settings).mean(facts)


def agreement(true: Attribution, estimate: Attribution, k: int = 10) -> dict[str, float]:
    """How well an estimate tells what patching would find, over all values that both have.

    Returns:
        pearson and spearman correlation; slope of the estimate on the truth (1 = right size); and the share of the k
        largest true effects (by absolute value, per fact) that are not among the estimate's k largest.

    Raises:
        ValueError: the two do not cover the same facts and sites.
    """
    from scipy import stats

    if true.axes != estimate.axes or true.labels != estimate.labels:
        raise ValueError(f"{true.name!r} and {estimate.name!r} do not cover the same facts and sites")
    known = ~(true.values.isnan() | estimate.values.isnan())
    x, y = true.values[known].double().numpy(), estimate.values[known].double().numpy()
    missed = []
    for t, e in zip(true.values.flatten(1), estimate.values.flatten(1), strict=True):
        size = min(k, int((~t.isnan()).sum()))
        best, guess = (set(v.abs().nan_to_num(nan=-1).topk(size).indices.tolist()) for v in (t, e))
        missed.append(1 - len(best & guess) / size)
    return {
        "pearson": float(stats.pearsonr(x, y)[0]),  # pyright: ignore[reportArgumentType]
        "spearman": float(stats.spearmanr(x, y)[0]),  # pyright: ignore[reportArgumentType]
        "slope": float((x * y).sum() / (x * x).sum()),
        "missed": sum(missed) / len(missed),
        "k": float(k),
        "n": float(len(true.values)),
    }
