"""Which latents fire on what is to be forgotten and not on what is to stay, or on a concept and not elsewhere.

Paper:    Ferrando, Obeso, Rajamanoharan, Nanda 2024, Do I know this entity?, arXiv 2411.14257 (scores and filter);
          forget against retain as in SAEBench's unlearning task and Ashuach et al. 2025, CRISP, arXiv 2508.13650.
Needs:    an SAE; one forward pass per prompt or text, up to the SAE's layer.
Differs:  an item is a subject or a text, never a token: tokens of one text are not independent. Scores are differences
          of firing frequency with held-out AUC; CRISP's ratio of activations stands beside them.
Fails:    latents of the prompts' wording or of how often a name occurs separate as well as those of the fact: look at
          `top_contexts`, and remove them (`latent_effects`) to see whether the answer needs them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.locate.latents.latent_states import ACTIVE, background, check_sae, latent_blocks
from mech_unlearn.locate.latents.separation import Contrast, Group, separate
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import ordinary_positions
from mech_unlearn.model.latents import Sae
from mech_unlearn.model.pieces import pieces
from mech_unlearn.model.tokens import make_queries

WHERE = ("subject", "prompt")
POOLS = ("mean", "max")
Texts = Sequence[str] | Mapping[str, Sequence[str]]
"""Texts, or texts by type."""


def _pooled(
    model: Model,
    sae: Sae,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    items: Sequence[int],
    pool: str,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Rate and activation of each item over its states: their mean, or their maximum; [item, d_sae], on the CPU."""
    size = max(items) + 1
    rate, activation = torch.zeros(size, sae.d_sae), torch.zeros(size, sae.d_sae)
    count, owner = torch.zeros(size), torch.tensor(items)
    for index, acts in latent_blocks(model, sae, rows, positions):
        at, acts = owner[index[:, 0]], acts.cpu()
        fired = (acts > threshold).float()
        if pool == "mean":
            rate.index_add_(0, at, fired)
            activation.index_add_(0, at, acts)
        else:
            index = at[:, None].expand_as(acts)
            rate.scatter_reduce_(0, index, fired, "amax")
            activation.scatter_reduce_(0, index, acts, "amax")
        count.index_add_(0, at, torch.ones(len(at)))
    divisor = count[:, None] if pool == "mean" else 1.0
    return rate / divisor, activation / divisor


def _subjects(model: Model, sae: Sae, facts: Sequence[Fact], label: str, where: str, threshold: float) -> Group:
    order = {subject: i for i, subject in enumerate(dict.fromkeys(fact.subject for fact in facts))}
    kinds = {fact.subject: fact.kind for fact in facts}
    queries = make_queries(model.tokenizer, facts, distractors=False)
    ends = [q.span[1] if where == "subject" else len(q.prompt) for q in queries]
    # Phrasings that are equal up to the subject's last token are one state there, and count once.
    chosen = dict.fromkeys((order[q.fact.subject], q.prompt[:end]) for q, end in zip(queries, ends, strict=True))
    rows = [row for _, row in chosen]
    places = [(len(row) - 1,) for row in rows] if where == "subject" else ordinary_positions(model, rows)
    rate, activation = _pooled(model, sae, rows, places, [item for item, _ in chosen], "mean", threshold)
    return Group(
        label=label,
        noun="subjects",
        names=tuple(order),
        kinds=tuple(kinds[subject] for subject in order),
        rate=rate,
        activation=activation,
    )


@takes_settings_of(separate)
def forget_retain(
    model: Model,
    facts: Sequence[Fact],
    retain: Sequence[Fact],
    sae: Sae,
    *,
    where: str = "subject",
    texts: Sequence[str] = (),
    threshold: float = ACTIVE,
    **settings: Any,
) -> Contrast:
    """Latents that fire on the facts to be forgotten and not on those to be kept; an item is a subject.

    f is the mean over subjects of the share of states on which the latent is active, the readout's activation the mean
    over the same states. Takes the settings of `separate` (max_background, top, heldout, seed).

    Args:
        where: the "subject"'s last token (2411.14257), or all tokens of the "prompt" but special ones; of the main
            prompt and the paraphrases.
        texts: generic text for the background filter; the subjects' names in it do not count.

    Raises:
        ValueError: no facts, a subject of one kind on both sides, fewer than four subjects of a kind on a side, or an
            SAE that does not fit the model.
    """
    if where not in WHERE:
        raise ValueError(f"where={where!r}: choose {' or '.join(WHERE)}")
    if not facts or not retain:
        raise ValueError(f"{len(facts)} forget and {len(retain)} retain facts: give some of each")
    check_sae(model, sae)
    groups = (
        _subjects(model, sae, facts, "forget", where, threshold),
        _subjects(model, sae, retain, "retain", where, threshold),
    )
    names = [name for group in groups for name in group.names]
    return separate(sae, *groups, background(model, sae, texts, names, threshold), **settings)


def _texts(model: Model, sae: Sae, texts: Texts, label: str, pool: str, threshold: float, context: int) -> Group:
    by_kind = texts if isinstance(texts, Mapping) else {None: texts}
    items = list(dict.fromkeys((text, kind) for kind, members in by_kind.items() for text in members))
    cut = pieces(model, [text for text, _ in items], context)
    rows, owner = [piece.ids for piece in cut], [piece.text for piece in cut]
    places = ordinary_positions(model, rows)
    empty = set(range(len(items))) - {i for i, at in zip(owner, places, strict=True) if at}
    if empty or not items:
        what = f"text {items[min(empty)][0]!r} has no token" if empty else "no texts"
        raise ValueError(f"{what} among the {label} texts: give texts with words")
    rate, activation = _pooled(model, sae, rows, places, owner, pool, threshold)
    return Group(
        label=label,
        noun="texts",
        names=tuple(text for text, _ in items),
        kinds=tuple(kind for _, kind in items),
        rate=rate,
        activation=activation,
    )


@takes_settings_of(separate)
def concept_other(
    model: Model,
    texts: Texts,
    other_texts: Texts,
    sae: Sae,
    *,
    pool: str = "mean",
    background_texts: Sequence[str] = (),
    threshold: float = ACTIVE,
    context: int = 512,
    **settings: Any,
) -> Contrast:
    """Latents that fire on texts about a concept and not on other texts; an item is a text, repeated texts count once.

    Takes the settings of `separate` (max_background, top, heldout, seed). Special tokens do not count.

    Args:
        texts: texts about the concept; with a mapping type -> texts, scores are the smallest over types.
        pool: "mean": share of a text's tokens on which the latent is active, and mean activation over them; "max":
            whether it is active anywhere in the text, and its largest activation. "max" favours longer texts.
        background_texts: generic text for the background filter.
        context: longer texts are read in pieces of this many tokens.

    Raises:
        ValueError: no texts, a text on both sides, fewer than four texts of a type on a side, a text without tokens,
            or an SAE that does not fit the model.
    """
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r}: choose {' or '.join(POOLS)}")
    check_sae(model, sae)
    concept = _texts(model, sae, texts, "concept", pool, threshold, context)
    other = _texts(model, sae, other_texts, "other", pool, threshold, context)
    return separate(sae, concept, other, background(model, sae, background_texts, (), threshold), **settings)
