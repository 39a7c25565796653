"""Known and unknown entities: which latents tell what the model knows from what it does not.

Paper:    Ferrando, Obeso, Rajamanoharan, Nanda 2024, Do I know this entity?, arXiv 2411.14257, section 3.
Needs:    an SAE per layer; one forward pass per entity and context, up to the SAE's layer.
Differs:  contexts are the facts' own phrasings cut after the name, not "The movie X"; readouts are scored by AUC on
          held-out entities, and a logistic readout on the best latents stands beside the single ones. The background
          leaves out the entities' own names, of which a small corpus is full and the paper's Pile sample is not.
Fails:    names that share tokens with known names may fire known latents; with few entities the best of many
          latents is partly luck, hence the AUC on held-out entities. Separating is not controlling the answer.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.capture import stream
from mech_unlearn.core import Attribution, Entity, Fact, Site
from mech_unlearn.latents import Sae, entity_states
from mech_unlearn.model import Model
from mech_unlearn.prompts import encode_all

MIN_BACKGROUND = 1000
"""Generic tokens below which a firing frequency of 2 % (20 firings) cannot be told from chance."""
MEASURES = ("s_known", "s_unknown", "AUC top known", "AUC top unknown", "AUC logistic")


@dataclass(frozen=True, kw_only=True)
class Separation:
    """Latents and readouts that tell known from unknown entities at one site."""

    site: Site
    known: Attribution
    """s_known = f_K - f_U of each latent, the smallest over entity types; NaN for latents that fire on any text."""
    unknown: Attribution
    """s_unknown = f_U - f_K, in the same way."""
    auc: Attribution
    """Area under the ROC curve on entities that nothing was chosen on, for each readout."""
    background: Float[Tensor, " d_sae"] | None
    """Share of generic tokens on which each latent is active; None where no filter was applied."""
    heldout: tuple[tuple[str, ...], tuple[str, ...]]
    """Names of the known and of the unknown entities that only tested."""

    def top_known(self, k: int = 20) -> tuple[int, ...]:
        """Indices of the k best known latents, best first."""
        return tuple(at["latent"] for at, _ in self.known.top(k))

    def top_unknown(self, k: int = 20) -> tuple[int, ...]:
        """Indices of the k best unknown latents, best first."""
        return tuple(at["latent"] for at, _ in self.unknown.top(k))


def _by_kind(
    known: Sequence[Entity], unknown: Sequence[Entity], share: float, generator: torch.Generator
) -> tuple[list[tuple[list[int], list[int]]], list[int], list[int]]:
    """For each entity type the fitting (known, unknown) indices, and the held-out indices of both classes."""
    fitting, held = [], ([], [])
    for kind in dict.fromkeys(e.kind for e in (*known, *unknown)):
        pair = []
        for side, entities in enumerate((known, unknown)):
            members = [i for i, e in enumerate(entities) if e.kind == kind]
            mixed = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            test = round(len(mixed) * share)
            if test < 2 or len(mixed) - test < 2:
                raise ValueError(
                    f"{len(mixed)} {('known', 'unknown')[side]} entities of kind {kind!r}: with heldout={share} each "
                    "part needs two or more"
                )
            held[side].extend(mixed[:test])
            pair.append(mixed[test:])
        fitting.append(tuple(pair))
    return fitting, *held


def _wins(positive: Tensor, negative: Tensor) -> Float[Tensor, "positive negative"]:
    delta = positive.double()[:, None] - negative.double()[None]
    return (delta > 0).double() + (delta == 0).double() / 2


def auc(positive: Float[Tensor, " positive"], negative: Float[Tensor, " negative"]) -> float:
    """Probability that a positive scores above a negative, ties counting half (the Mann-Whitney statistic)."""
    return _wins(positive, negative).mean().item()


def _auc_interval(
    positive: Tensor, negative: Tensor, generator: torch.Generator, draws: int = 1000
) -> tuple[float, float, float]:
    """AUC and its 95 % percentile bootstrap interval over the entities of each class."""
    wins = _wins(positive, negative)
    p = torch.randint(len(positive), (draws, len(positive)), generator=generator)
    n = torch.randint(len(negative), (draws, len(negative)), generator=generator)
    values = torch.stack([wins[a][:, b].mean() for a, b in zip(p, n, strict=True)])
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return wins.mean().item(), low, high


def _difference(first: Bool[Tensor, "a c d_sae"], second: Bool[Tensor, "b c d_sae"]) -> tuple[Tensor, Tensor]:
    """Difference of firing frequencies per latent and the half width of its normal 95 % interval over entities."""
    a, b = first.double().mean(1), second.double().mean(1)
    error = a.var(0, unbiased=True) / len(a) + b.var(0, unbiased=True) / len(b)
    return a.mean(0) - b.mean(0), 1.96 * error.sqrt()


def _scores(
    name: str, active: Sequence[Tensor], fitting: Sequence[tuple[list[int], list[int]]], general: Tensor, site: Site,
    note: str,
) -> Attribution:  # fmt: skip
    parts = [_difference(active[0][k], active[1][u]) for k, u in fitting]
    values, which = torch.stack([p[0] for p in parts]).min(0)
    half = torch.stack([p[1] for p in parts]).gather(0, which[None])[0]
    values = values.masked_fill(general, float("nan"))
    return Attribution(
        name=f"{name} latents at {site}",
        values=values.float(),
        axes=("latent",),
        labels={"latent": tuple(range(len(values)))},
        unit="difference of firing frequency",
        n=sum(len(k) + len(u) for k, u in fitting),
        low=(values - half).float(),
        high=(values + half).float(),
        note=note,
    )


def _generic_tokens(
    model: Model, texts: Sequence[str], names: Sequence[str], context: int = 512
) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """Rows of token ids, and the positions in each that hold neither a special token nor a part of a name."""
    pattern = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))
    rows, positions = [], []
    known = encode_all(model.tokenizer, texts)
    for text in texts:
        encoding = known[text]
        spans = [match.span() for match in pattern.finditer(text)]
        for start in range(0, len(encoding.ids), context):
            piece = list(enumerate(encoding.offsets[start : start + context]))
            rows.append(encoding.ids[start : start + context])
            positions.append([i for i, (a, b) in piece if b > a and not any(a < e and b > s for s, e in spans)])
    return rows, positions


def _background(
    model: Model, sae: Sae, texts: Sequence[str], names: Sequence[str], threshold: float
) -> tuple[Float[Tensor, " d_sae"] | None, int]:
    """Share of generic tokens on which each latent fires, None if there are too few of them, and their number."""
    fired, count = torch.zeros(sae.d_sae), 0
    rows, positions = _generic_tokens(model, texts, names)
    for part in stream(model, rows, [sae.site], positions):
        fired += (sae.encode(part.at[sae.site].to(model.device)) > threshold).sum(0).cpu()
        count += len(part.index)
    return (fired / count if count >= MIN_BACKGROUND else None), count


@torch.no_grad()
def separation(
    model: Model,
    sae: Sae,
    known: Sequence[Entity],
    unknown: Sequence[Entity],
    templates: Sequence[str],
    *,
    texts: Sequence[str] = (),
    threshold: float = 1e-6,
    max_background: float = 0.02,
    top: int = 20,
    heldout: float = 0.5,
    seed: int = 0,
) -> Separation:
    """Which latents fire on entities the model knows, and which on those it does not (Ferrando et al., 2411.14257).

    At the last token of each name, in each context, a latent is active above `threshold`. On the fitting entities
    s_known = f_K - f_U and s_unknown = f_U - f_K, the smallest over entity types; f is the mean over entities of the
    share of contexts in which the latent is active. On the held-out entities, the AUC (known above unknown) of three
    readouts: the top known latent, minus the top unknown one (mean activation over contexts), and a logistic regression
    on the `top` best of both.

    Args:
        texts: generic text; latents active on `max_background` or more of its tokens are left out (2 % in the paper).
            Tokens of the entities' names do not count. Off, and the note says so, with fewer than 1,000 tokens.
        heldout: share of the entities of each type and class that only test.

    Raises:
        ValueError: a type with too few known or unknown entities, or no latent left by the background filter.
    """
    generator = torch.Generator().manual_seed(seed)
    fitting, held_k, held_u = _by_kind(known, unknown, heldout, generator)
    acts = [
        sae.encode(entity_states(model, entities, templates, sae.site).to(model.device)).cpu()
        for entities in (known, unknown)
    ]
    active = (acts[0] > threshold, acts[1] > threshold)
    background, count = _background(model, sae, texts, [e.name for e in (*known, *unknown)], threshold)
    general = torch.zeros(sae.d_sae, dtype=torch.bool) if background is None else background >= max_background
    if general.all():
        raise ValueError(f"every latent fires on {max_background:.0%} of the texts or more; pass texts=() or raise it")
    kept = "off" if background is None else f"left {int((~general).sum())} of {len(general)} latents, {count} tokens"
    note = f"95 % normal interval over entities; background filter {kept}"
    s_known = _scores("known", active, fitting, general, sae.site, note)
    s_unknown = _scores("unknown", active[::-1], [(u, k) for k, u in fitting], general, sae.site, note)
    mean = (acts[0].mean(1), acts[1].mean(1))
    read = _readouts(mean, fitting, s_known.top(top), s_unknown.top(top))
    result = _auc(read, mean[0][held_k], mean[1][held_u], sae.site, generator)
    names = tuple(known[i].name for i in held_k), tuple(unknown[i].name for i in held_u)
    return Separation(site=sae.site, known=s_known, unknown=s_unknown, auc=result, background=background, heldout=names)


def _readouts(
    mean: tuple[Tensor, Tensor], fitting: Sequence[tuple[list[int], list[int]]], best_k: list, best_u: list
) -> dict[str, Callable[[Tensor], Tensor]]:
    chosen = sorted({at["latent"] for at, _ in (*best_k, *best_u)})
    fit_k, fit_u = ([i for pair in fitting for i in pair[side]] for side in (0, 1))
    decide = _logistic(mean[0][fit_k][:, chosen], mean[1][fit_u][:, chosen])
    return {
        "top known latent": lambda x: x[:, best_k[0][0]["latent"]],
        "top unknown latent": lambda x: -x[:, best_u[0][0]["latent"]],
        f"logistic on {len(chosen)} latents": lambda x: decide(x[:, chosen]),
    }


def _auc(
    readouts: dict[str, Callable[[Tensor], Tensor]],
    known: Tensor,
    unknown: Tensor,
    site: Site,
    generator: torch.Generator,
) -> Attribution:
    table = torch.tensor([_auc_interval(read(known), read(unknown), generator) for read in readouts.values()])
    return Attribution(
        name=f"known against unknown entities at {site}",
        values=table[:, 0],
        axes=("readout",),
        labels={"readout": tuple(readouts)},
        unit="AUC",
        n=len(known) + len(unknown),
        low=table[:, 1],
        high=table[:, 2],
        note=f"{len(known)} known and {len(unknown)} unknown held-out entities; 95 % bootstrap interval over them",
    )


def _logistic(known: Float[Tensor, "known latent"], unknown: Float[Tensor, "unknown latent"]):
    """Decision value of a logistic regression (L2, C = 1, standardised inputs, classes weighted equally)."""
    from sklearn.linear_model import LogisticRegression

    both = torch.cat([known, unknown])
    mean, scale = both.mean(0), both.std(0).clamp(min=1e-6)
    labels = [1] * len(known) + [0] * len(unknown)
    fitted = LogisticRegression(class_weight="balanced", max_iter=1000).fit(((both - mean) / scale).numpy(), labels)
    return lambda x: torch.from_numpy(fitted.decision_function(((x - mean) / scale).numpy()))


def known_unknown(
    model: Model,
    facts: Sequence[Fact],
    unknown: Sequence[Entity],
    saes: Sequence[Sae],
    **settings: Any,
) -> Attribution:
    """Known against unknown entities by layer: axes (layer, measure), from one `separation` per SAE.

    The measures are the largest s_known and s_unknown over latents (differences of firing frequency on the fitting
    entities) and the AUC of the three readouts on held-out entities. Takes the settings of `separation`.

    Args:
        facts: facts the model knows; their subjects are the known entities and their phrasings the contexts.
        saes: one SAE for each layer to be looked at.

    Raises:
        ValueError: no SAE, two for one layer, or what `separation` refuses.
    """
    if not saes:
        raise ValueError("no SAE: give one for each layer to be looked at")
    layers = sorted(sae.site.layer for sae in saes)
    if len(set(layers)) < len(layers):
        raise ValueError(f"several SAEs for one layer: layers {layers}")
    known = tuple({fact.subject: fact.entity for fact in facts}.values())
    templates = tuple(dict.fromkeys(template for fact in facts for template in fact.templates))
    results = [
        separation(model, sae, known, unknown, templates, **settings)
        for sae in sorted(saes, key=lambda s: s.site.layer)
    ]
    parts = {key: torch.stack([_row(result, key) for result in results]) for key in ("values", "low", "high")}
    return Attribution(
        name="known and unknown entities",
        axes=("layer", "measure"),
        labels={"layer": tuple(layers), "measure": MEASURES},
        unit="difference of firing frequency (s) or AUC",
        n=len(known) + len(unknown),
        note=f"{results[0].known.note}; AUC: {results[0].auc.note}",
        **parts,
    )


def _row(result: Separation, key: str) -> Float[Tensor, " measure"]:
    """Values, or bounds, of the best known latent, the best unknown latent and the three readouts."""
    best = [getattr(a, key)[a.values.nan_to_num(nan=-2.0).argmax()] for a in (result.known, result.unknown)]
    return torch.cat([torch.stack(best), getattr(result.auc, key)])
