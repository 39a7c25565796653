"""Acting on what a locator says: does ablating its top sites hurt a fact more than ablating as many others?

Paper:    Hase et al. 2023, Does localization inform editing?, arXiv 2301.04213 (the question); Heimersheim and Nanda
          2024, How to use and interpret activation patching, arXiv 2404.15255 (resampling instead of zero).
Needs:    a locator's result, phrasings that it did not see; per phrasing two forward passes and one suffix sweep of
          1 + 3 x `random_draws` rows at the most.
Differs:  each token of a class is a site of its own with the value of its class, so that all sets have the same number
          of states; random sets leave out the top sites.
Fails:    sets of equal number need not be of equal strength: a whole residual state holds more than an attention
          output, so compare within one kind. A difference says that the top sites matter more, not that the fact is
          stored there, nor that an edit there works.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact, Site, SiteKind
from mech_unlearn.locate.acting.sites import COMPONENTS, CONTROLS, KINDS, PLACES, Ablation, grid, sets
from mech_unlearn.locate.patching.pairs import Pair, make_pairs
from mech_unlearn.locate.patching.token_classes import token_classes
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.model.answers import answer_rows, answer_score, equal_shape
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.sweep import Patch, Recording, Write, record, refuse_interventions, sweep
from mech_unlearn.model.tokens import Query

CHOICES = {"ablation": ("resample", "mean", "zero"), "rank": ("high", "low", "size"),
           "which": ("paraphrases", "heldout", "prompt")}  # fmt: skip


def _overwrite(row: Tensor, place: Tensor, part: Tensor | None, values: Tensor) -> Write:
    def write(x: Tensor, first: int) -> Tensor:
        x = x.clone()
        at = (row, place - first) if part is None else (row, place - first, part)
        x[at] = values.to(x)
        return x

    return write


def _name_of(query: Query) -> list[str]:
    """The class of each position from the subject on; "answer" behind the prompt."""
    names = {p: name for name, places in token_classes(query).items() for p in places}
    return [names.get(p, "answer") for p in range(query.span[0], len(query.full) - 1)]


def _means(model: Model, queries: Sequence[Query], sites: Sequence[Site], max_tokens: int):
    """(Site, class) -> mean state over all prompts' tokens of the class."""
    total: dict[tuple[Site, str], Tensor] = {}
    count: dict[str, int] = {}
    inner = [site for site in sites if site.kind not in ("resid_pre", "resid_post")]
    for members in equal_shape(queries, max_tokens):
        some = record(model, torch.tensor([queries[i].full[:-1] for i in members]), keep=inner, cache=False)
        for place, name in enumerate(_name_of(queries[members[0]]), queries[members[0]].span[0]):
            count[name] = count.get(name, 0) + len(members)
            for site in sites:
                x = some.state(site)[:, place].double().sum(0)
                total[site, name] = total[site, name] + x if (site, name) in total else x
    return {(site, name): x / count[name] for (site, name), x in total.items()}


def _patches(
    base: Recording,
    fill: Callable[[Site, Tensor, Tensor, Tensor | None], Tensor],
    jobs: Sequence[tuple[int, list[tuple[Site, list[int], int | None]]]],
    first: int,
    size: int,
) -> list[tuple[list[int], Patch]]:
    """(Indices of jobs, patch): jobs (recorded row, cells) that begin at the same layer climb as one patch."""
    by_start: dict[int, list[int]] = {}
    for j, (_, cells) in enumerate(jobs):
        by_start.setdefault(min(s.layer + (s.kind == "resid_post") for s, _, _ in cells), []).append(j)
    out, device = [], base.ids.device
    for _, members in sorted(by_start.items()):
        for chosen in (members[i : i + size] for i in range(0, len(members), size)):
            entries: dict[Site, list[tuple[int, int, int, int]]] = {}
            for row, j in enumerate(chosen):
                for site, places, part in jobs[j][1]:
                    entries.setdefault(site, []).extend((row, jobs[j][0], p, -1 if part is None else part)
                                                        for p in places)  # fmt: skip
            writes = []
            for site, found in sorted(entries.items()):
                row, recorded, place, part = torch.tensor(found, device=device).unbind(1)
                parts = None if (part < 0).all() else part
                writes.append((site, _overwrite(row, place, parts, fill(site, recorded, place, parts))))
            rows = torch.tensor([jobs[j][0] for j in chosen], device=device)
            out.append((chosen, Patch(rows, tuple(writes), first)))
    return out


def _check(result: Attribution, facts: Sequence[Fact], kind: str | None, at: str, k: int, draws: int, **choices: str):
    axes = result.axes[-2:]
    if axes not in KINDS or result.axes[:-2] not in ((), ("fact",)):
        raise ValueError(f"{result.name!r} has axes {result.axes}; acting needs {', '.join(map(str, KINDS))}, "
                         "with or without fact in front")  # fmt: skip
    if kind is None and axes == ("token", "layer"):
        raise ValueError(f"{result.name!r} does not say what its sites are: give kind=, {', '.join(KINDS[axes])}")
    if kind is not None and kind not in KINDS[axes]:
        raise ValueError(f"kind={kind!r}: sites of axes {axes} are {', '.join(KINDS[axes])}")
    if at not in PLACES:
        raise ValueError(f"at={at!r}: choose one of {', '.join(PLACES)}")
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r}: choose {', '.join(CHOICES[name])}")
    if not facts or k < 1 or draws < 1:
        raise ValueError(f"{len(facts)} facts, k={k}, random_draws={draws}: each must be at least one")
    if result.axes[0] == "fact" and (missing := [f.id for f in facts if f.id not in result.labels["fact"]]):
        raise ValueError(f"{result.name!r} has no values for fact {missing[0]!r}")


def act_per_fact(
    model: Model,
    facts: Sequence[Fact],
    result: Attribution,
    *,
    k: int,
    kind: SiteKind | None = None,
    at: str = "answer",
    ablation: str = "resample",
    rank: str = "high",
    which: str = "paraphrases",
    random_draws: int = 20,
    others: Sequence[Fact] = (),
    seed: int = 0,
    max_tokens: int = 32_768,
) -> Attribution:
    """Fall of the answer's log-probability when sites are ablated, for each fact: axes (fact, sites), nats per token.

    `sites` are the k "top" sites of the result; as many random ones, mean over draws, from "anywhere" in the result's
    axes, from the "same layers" and, where the result tells tokens apart, at the "same tokens" as the top ones; and
    the difference of the top and each control. The mean over the fact's phrasings. NaN where there are too few others.

    Args:
        result: of a locator, axes (token, layer), (layer, head), (layer, neuron) or (layer, component), with `fact`
            in front (each fact's own top sites) or averaged (the same for all).
        kind: what a cell of the result is; heads are `z` and neurons `mlp_post` where not given.
        at: for results that do not tell tokens apart: the tokens that are ablated, a class, the "subject", those that
            predict the "answer", or "all" from the subject on.
        ablation: "resample" (the state of the same prompt about another subject), "mean" (over all these prompts'
            tokens of the class) or "zero".
        rank: top sites have the highest values, the lowest (direction="noise") or the largest in size.
        which: the phrasings that are asked. Locate on others.
        others: further facts whose subjects may serve as the other subject.
        max_tokens: tokens in a batch at the most; bounds memory.

    Raises:
        ValueError: no facts, a fact without such a phrasing or values, too few sites, settings out of range,
            no partner of equal length, or activation interventions in force.
    """
    refuse_interventions(model)
    _check(result, facts, kind, at, k, random_draws, ablation=ablation, rank=rank, which=which)
    axes = result.axes[-2:]
    setting = Ablation(k=k, kind=kind or KINDS[axes][0], at=at, ablation=ablation, rank=rank, draws=random_draws,
                       seed=seed)  # fmt: skip
    forms = {"paraphrases": lambda f: f.paraphrases, "heldout": lambda f: f.heldout, "prompt": lambda f: (f.prompt,)}
    if bare := [f.id for f in facts if not forms[which](f)]:
        raise ValueError(f"fact {bare[0]!r} has no phrasing of kind {which!r}")
    asked = [
        (i, replace(f, prompt=t, paraphrases=(), heldout=())) for i, f in enumerate(facts) for t in forms[which](f)
    ]
    pairs = make_pairs(model, [f for _, f in asked], others, seed)
    of = {name: i for i, name in enumerate(result.labels.get("fact", ()))}
    tables = [result.values[of[f.id]] if of else result.values for _, f in asked]
    falls = _falls(model, pairs, result, tables, setting, max_tokens)
    controls = CONTROLS if axes == ("token", "layer") else CONTROLS[:2]
    index = torch.tensor([i for i, _ in asked])
    mean = torch.zeros(len(facts), len(CONTROLS) + 1, dtype=torch.float64).index_add(0, index, falls)
    mean = (mean / torch.bincount(index)[:, None])[:, : len(controls) + 1]
    labels = ("top", *controls, *(f"top - {control}" for control in controls))
    return Attribution(
        name=f"acting on {result.name}",
        values=torch.cat([mean, mean[:, :1] - mean[:, 1:]], 1).float(),
        axes=("fact", "sites"),
        labels={"fact": tuple(f.id for f in facts), "sites": labels},
        unit="fall of the log-probability of the answer (nats per token)",
        n=len(facts),
        note=f"k={k} {axes[1] if axes[0] == 'layer' else setting.kind} sites, {ablation}; "
        f"{'own' if of else 'the same'} sites for each fact; {len(asked)} prompts ({which}), {random_draws} draws",
    )


def _falls(
    model: Model, pairs: Sequence[Pair], result: Attribution, tables: Sequence[Tensor], setting: Ablation, tokens: int
) -> Float[Tensor, "pair set"]:
    """Fall for each pair of the top sites and, mean over draws, of each control."""
    kinds = tuple(COMPONENTS.values()) if "component" in result.axes else (setting.kind,)
    sites = [Site(layer, kind) for layer in range(model.n_layers) for kind in kinds]
    inner = [site for site in sites if site.kind not in ("resid_pre", "resid_post")]
    queries = [pair.own for pair in pairs]
    means = _means(model, queries, sites, tokens) if setting.ablation == "mean" else {}
    out = torch.full((len(pairs), len(CONTROLS) + 1), float("nan"), dtype=torch.float64)
    for members in equal_shape(queries, tokens):
        some = [pairs[i] for i in members]
        own, other = (torch.tensor([q.full[:-1] for q in qs], device=model.device)
                      for qs in ([p.own for p in some], [p.other for p in some]))  # fmt: skip
        base = record(model, own)
        source = record(model, other, keep=inner, cache=False)
        first, names = some[0].own.span[0], _name_of(some[0].own)

        def fill(site: Site, recorded: Tensor, place: Tensor, part: Tensor | None, source=source, names=names,
                 first=first) -> Tensor:  # fmt: skip
            if setting.ablation == "mean":
                states = torch.stack([means[site, names[p - first]] for p in place.tolist()])
            else:
                states = source.state(site)[recorded, place]
            states = torch.zeros_like(states) if setting.ablation == "zero" else states
            return states if part is None else states[torch.arange(len(part), device=part.device), part]

        jobs, where = [], []
        for row, i in enumerate(members):
            sites_here = grid(result, tables[i], queries[i], setting)
            name = f"{queries[i].fact.id} {queries[i].template}"
            for chosen, what in zip(*sets(sites_here, setting, "token" in result.axes, name), strict=True):
                jobs.append((row, [sites_here.cells(c) for c in chosen]))
                where.append((row, what))
        read, answers = answer_rows([p.own for p in some]), [p.own.answers[0] for p in some]
        patched = _patches(base, fill, jobs, first, max(1, tokens // (base.width - first)))
        with torch.no_grad():
            before = answer_score(model, base.resid[-1][:, read], answers, "logprob").cpu()
            states = torch.cat(sweep(base, [patch for _, patch in patched], read, max_tokens=tokens))
            order = [j for chosen, _ in patched for j in chosen]
            after = answer_score(model, states, [answers[jobs[j][0]] for j in order], "logprob").cpu()
        row, what = torch.tensor([where[j] for j in order]).unbind(1)
        sums = torch.zeros(2, len(members), out.shape[1], dtype=torch.float64)
        sums[0].index_put_((row, what), (before[row] - after).double(), accumulate=True)
        sums[1].index_put_((row, what), torch.ones(len(row), dtype=torch.float64), accumulate=True)
        out[members] = sums[0] / sums[1]
    return out


@takes_settings_of(act_per_fact)
def act(model: Model, facts: Sequence[Fact], result: Attribution, **settings: Any) -> Attribution:
    """Average over facts of `act_per_fact` with 95 % intervals over groups of facts: axes (sites)."""
    return act_per_fact(model, facts, result, **settings).mean(facts)
