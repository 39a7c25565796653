"""Known and unknown entities: which latents tell what the model knows from what it does not.

Paper:    Ferrando, Obeso, Rajamanoharan, Nanda 2024, Do I know this entity?, arXiv 2411.14257, section 3.
Needs:    an SAE per layer; one forward pass per entity and context, up to the SAE's layer.
Differs:  contexts are the facts' own phrasings cut after the name, not "The movie X"; readouts are scored by AUC on
          held-out entities, and a logistic readout on the best latents stands beside the single ones. The background
          leaves out the entities' own names, of which a small corpus is full and the paper's Pile sample is not.
Fails:    names that share tokens with known names may fire known latents; with few entities the best of many
          latents is partly luck, hence the AUC on held-out entities. Separating is not controlling the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Entity, Fact, Site
from mech_unlearn.locate.latents.latent_states import ACTIVE, CODES, background, check_sae
from mech_unlearn.locate.latents.separation import Group, separate
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.latents import Sae, entity_states

__all__ = ["Separation", "known_unknown", "separation"]

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


def _group(
    model: Model, sae: Sae, entities: Sequence[Entity], label: str, templates: Sequence[str], threshold: float
) -> Group:
    """What the latents do at the last token of each name: share of the contexts, and mean activation over them."""
    states = entity_states(model, entities, templates, sae.site)
    rate, mean = [], []
    for chunk in states.split(max(1, CODES // (sae.d_sae * states.shape[1]))):
        acts = sae.encode(chunk.to(model.device))
        rate.append((acts > threshold).float().mean(1).cpu())
        mean.append(acts.mean(1).cpu())
    return Group(
        label=label,
        noun="entities",
        names=tuple(e.name for e in entities),
        kinds=tuple(e.kind for e in entities),
        rate=torch.cat(rate),
        activation=torch.cat(mean),
    )


@torch.no_grad()
def separation(
    model: Model,
    sae: Sae,
    known: Sequence[Entity],
    unknown: Sequence[Entity],
    templates: Sequence[str],
    *,
    texts: Sequence[str] = (),
    threshold: float = ACTIVE,
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
    check_sae(model, sae)
    groups = (
        _group(model, sae, known, "known", templates, threshold),
        _group(model, sae, unknown, "unknown", templates, threshold),
    )
    generic = background(model, sae, texts, [e.name for e in (*known, *unknown)], threshold)
    found = separate(sae, *groups, generic, max_background=max_background, top=top, heldout=heldout, seed=seed)
    return Separation(
        site=found.site,
        known=found.first,
        unknown=found.second,
        auc=found.auc,
        background=found.background,
        heldout=found.heldout,
    )


@takes_settings_of(separation)
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
