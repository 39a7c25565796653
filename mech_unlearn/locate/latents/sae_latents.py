"""Which latents of an SAE mark what is to be forgotten: one score per latent, with how far the SAE can be trusted.

Paper:    Ferrando, Obeso, Rajamanoharan, Nanda 2024, Do I know this entity?, arXiv 2411.14257, section 3.
Needs:    an SAE, and either facts to be kept or entities the model does not know.
Differs:  see `separation`; the note states AUC on held-out items, FVU and the share of the loss that the SAE recovers.
Fails:    a latent that separates need not carry the answer: see `latent_effects` and `top_contexts`.
"""

from collections.abc import Sequence
from typing import Any

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Entity, Fact
from mech_unlearn.locate.latents.known_unknown import separation
from mech_unlearn.locate.latents.latent_scores import forget_retain
from mech_unlearn.locate.latents.sae_quality import sae_quality
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.latents import Sae


@takes_settings_of(forget_retain, separation)
def sae_latents(
    model: Model,
    facts: Sequence[Fact],
    *,
    sae: Sae,
    retain: Sequence[Fact] = (),
    unknown: Sequence[Entity] = (),
    texts: Sequence[str] = (),
    **settings: Any,
) -> Attribution:
    """Separation score of each latent, f_forget - f_retain or f_known - f_unknown: axes (latent,).

    f is the firing frequency at the subject's last token, the score the smallest difference over types of subjects; NaN
    for latents that fire on any text. The note holds the AUC of the best latent and of a logistic readout on held-out
    subjects, and FVU, loss recovered and latents per token of the SAE on the texts. Takes the settings of
    `forget_retain` or of `known_unknown.separation`.

    Args:
        facts: what is to be forgotten; their subjects are the known entities when `unknown` is given.
        retain: facts about other subjects that are to be kept.
        unknown: entities of the same kinds that the model does not know.
        texts: generic text, for the background filter (1,000 tokens or more) and for the SAE's quality; without any,
            the quality is measured on the facts' own statements.

    Raises:
        ValueError: both or neither of `retain` and `unknown`, and what the contrast refuses.
    """
    if bool(retain) == bool(unknown):
        raise ValueError("give either retain facts or unknown entities to compare with, and not both")
    if retain:
        found = forget_retain(model, facts, retain, sae, texts=texts, **settings)
        scores, auc = found.first, found.auc
    else:
        known = tuple({fact.subject: fact.entity for fact in facts}.values())
        templates = tuple(dict.fromkeys(template for fact in facts for template in fact.templates))
        both = separation(model, sae, known, unknown, templates, texts=texts, **settings)
        scores, auc = both.known, both.auc
    stated = [fact.stated(t) for fact in (*facts, *retain) for t in fact.templates]
    quality = sae_quality(model, sae, texts or stated)
    readouts = ", ".join(
        f"{name} {value:.2f} [{low:.2f}, {high:.2f}]"
        for name, value, low, high in auc.to_frame().itertuples(index=False)
    )
    where = "texts" if texts else "the facts' statements"
    return Attribution(
        name=scores.name,
        values=scores.values,
        axes=scores.axes,
        labels=scores.labels,
        unit=scores.unit,
        n=scores.n,
        low=scores.low,
        high=scores.high,
        note=f"{scores.note}; AUC {readouts} ({auc.note}); SAE on {where}: {quality}",
    )
