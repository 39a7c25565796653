"""Is a concept vector used: what the model forgets when noise is added to that one vector, and how far it has moved.

Paper:    Hong, Yu, Yang, Ravfogel, Geva 2024, arXiv 2406.11614, section 3 (validation by noise) and section 4
          (intrinsic measures).
Needs:    facts of the concept and facts of others; two scorings of all of them per vector and noise sample.
Differs:  the paper compares generated answers by BLEU and ROUGE-L, here the log-probability of the answer and the
          share answered greedily, so that no text has to be judged. The noise is set by its length relative to the
          vector's, because the paper's standard deviation of 0.1 is several times a weight of Llama 2 and another
          multiple in any other model. Each sample has a control, the same noise on a random vector of the layer. The
          weights are restored bit-exactly after each sample; in the paper's notebook noise adds up over concepts.
Fails:    a vector that is hardly ever active passes the noise unseen; one that is always active hurts everything:
          read the target against the others and against the control, not alone. With few facts or noise samples the
          intervals are too narrow.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact
from mech_unlearn.edit.edit import Edit, LowRank
from mech_unlearn.locate.neurons.concept_vectors import concept_vectors
from mech_unlearn.locate.neurons.value_vectors import STORED, TOP, WRITTEN, Gains, project, text_mask, value_vectors
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.metrics.intervals import DRAWS
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.scores import per_fact, score
from mech_unlearn.model.tokens import make_queries

EFFECTS = (
    "target",
    "other",
    "target, control",
    "other, control",
    "target - control",
    "target - other",
    "(target - other) - control",
)
_MEASURES = (
    ("noise on value vectors", "change of log-probability of the answer (nats)"),
    ("noise on value vectors, recall", "change of the share of phrasings answered"),
)
RATIO = 5.0
"""Length of the noise over the length of the vector: 0.1 x sqrt(4096) = 6.4 over about 1.3 in Llama 2 7B."""


@dataclass(frozen=True, eq=False, kw_only=True)
class NoiseEffects:
    """What noise on single value vectors changes: axes (vector, effect); negative means harm."""

    logprob: Attribution
    """Change of the answer's mean log-probability per token, nats."""
    recall: Attribution
    """Change of the share of phrasings answered greedily."""
    std: tuple[float, ...]
    """Standard deviation of the noise on each vector."""
    ratio: tuple[float, ...]
    """Expected length of the noise over the length of each vector (root mean square)."""


def noisy(model: Model, layer: int, neuron: int, noise: Float[Tensor, " d_model"]) -> Edit:
    """The edit that adds a vector to one value vector; `with noisy(...).on(model)` restores bit-exactly."""
    name, stored_in_first = model.w_out(layer)
    rows = model.held[name].shape[0 if stored_in_first else 1]
    unit = torch.zeros(rows, device=noise.device)
    unit[neuron] = 1
    delta = LowRank(unit[:, None], noise[None]) if stored_in_first else LowRank(noise[:, None], unit[None])
    return Edit(name=f"noise on L{layer} neuron {neuron}", base="", deltas={name: delta})


def _effects(
    target: Float[Tensor, "run seed fact"],
    other: Float[Tensor, "run seed other"],
    facts: Sequence[Fact],
    others: Sequence[Fact],
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, low, high) of EFFECTS; run 0 is the vector and run 1 its control.

    The intervals are percentiles of a bootstrap that draws noise samples and groups of facts independently of each
    other, jointly for vector and control, and for target and other facts where these share a group. Source: Owen 2007,
    The pigeonhole bootstrap, Ann. Appl. Stat. 1(2).
    """
    generator = torch.Generator().manual_seed(seed)

    def weights(size: int) -> Float[Tensor, "draw size"]:
        """How often each entry is drawn; row 0 holds every entry once and gives the mean itself."""
        drawn = torch.randint(size, (DRAWS, size), generator=generator)
        return torch.cat([torch.ones(1, size), torch.zeros(DRAWS, size).scatter_add(1, drawn, torch.ones(DRAWS, size))])

    samples = weights(target.shape[1])
    names = [[fact.group or fact.subject for fact in part] for part in (facts, others)]
    sets = [sorted(set(part)) for part in names]
    if set(sets[0]) & set(sets[1]):
        sets = [sorted({*sets[0], *sets[1]})] * 2
        drawn = [weights(len(sets[0]))] * 2
    else:
        drawn = [weights(len(part)) for part in sets]

    def means(x: Float[Tensor, "run seed fact"], part: int) -> Float[Tensor, "draw run"]:
        by_fact = drawn[part][:, [sets[part].index(name) for name in names[part]]]
        return torch.einsum("ds,rsf,df->dr", samples, x, by_fact) / (samples.sum(1) * by_fact.sum(1))[:, None]

    (a, b), (c, d) = means(target, 0).T, means(other, 1).T
    table = torch.stack([a, c, b, d, a - b, a - c, (a - c) - (b - d)], 1)
    low, high = table[1:].nanquantile(torch.tensor([0.025, 0.975]), dim=0)  # NaN: a draw without any such fact
    alone = [target.shape[1] < 2 and len(set(part)) < 2 for part in names]
    nothing = torch.tensor([alone[0], alone[1], alone[0], alone[1], alone[0], any(alone), any(alone)])
    return table[0], low.masked_fill(nothing, float("nan")), high.masked_fill(nothing, float("nan"))


def _noise_size(
    facts: Sequence[Fact], others: Sequence[Fact], std: float | None, ratio: float | None, samples: int
) -> float:
    """The standard deviation or the ratio that is asked for, after checking what `noise_effects` was given."""
    if not facts or not others:
        raise ValueError("noise needs facts of the concept and others to compare with: give at least one of each")
    if both := {fact.id for fact in facts} & {fact.id for fact in others}:
        raise ValueError(f"fact {min(both)!r} stands among the facts of the concept and among the others")
    if std is not None and ratio is not None:
        raise ValueError(f"std={std} and ratio={ratio}: give one of them")
    size = std if std is not None else RATIO if ratio is None else ratio
    if not size > 0 or samples < 1:
        raise ValueError(f"noise of size {size} with samples={samples}: both must be positive")
    return size


def _changes(
    model: Model, vector: tuple[int, int], scale: float, samples: int, seed: int, ask: Callable[[], Tensor]
) -> Float[Tensor, "measure run sample fact"]:
    """What `ask` gives with each noise sample on the vector (run 0) and on a random other of its layer (run 1)."""
    layer, neuron = vector
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer} {neuron}".encode()))
    width = value_vectors(model, layer).shape[0]
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for _ in range(samples):
        noise = (scale * torch.randn(model.d_model, generator=generator)).to(model.device)
        control = (neuron + 1 + int(torch.randint(width - 1, (1,), generator=generator))) % width
        for row, place in zip(rows, (neuron, control), strict=True):
            with noisy(model, layer, place, noise).on(model):
                row.append(ask())
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def noise_effects(
    model: Model,
    facts: Sequence[Fact],
    *,
    others: Sequence[Fact],
    vectors: Sequence[tuple[int, int]] | None = None,
    std: float | None = None,
    ratio: float | None = None,
    samples: int = 8,
    seed: int = 0,
    max_tokens: int = 8192,
) -> NoiseEffects:
    """Change of the answers to the concept's facts and to others when noise N(0, std^2) is added to single vectors.

    Each of the `samples` adds new noise to the vector, and the same noise to a random other vector of the layer as a
    control. Values are means over samples and facts (a fact is the mean over the phrasings a method may see); the
    intervals draw samples and groups of facts (`_effects`), NaN with one sample and one group. Activation
    interventions in force stay in force.

    Args:
        others: facts of other subjects or relations.
        vectors: (layer, neuron) pairs; by default the three that promote the objects of the facts most.
        std: standard deviation of each entry of the noise (0.1 in the paper); not together with ratio.
        ratio: length of the noise over that of the vector, root mean square; 5 where neither is given.

    Raises:
        ValueError: no facts or others, a fact in both, a vector the model lacks or of length 0, settings out of range.
    """
    size = _noise_size(facts, others, std, ratio, samples)
    if vectors is None:
        vectors = [(at["layer"], at["neuron"]) for at, _ in concept_vectors(model, facts).top(3)]
    if not vectors:
        raise ValueError("no vectors: give at least one (layer, neuron)")
    lengths = [_length(model, layer, neuron) for layer, neuron in vectors]
    root = model.d_model**0.5
    stds = [size if std is not None else size * length / root for length in lengths]
    everything = (*facts, *others)
    queries = make_queries(model.tokenizer, everything, distractors=False)

    def ask() -> Float[Tensor, "measure fact"]:
        scores = per_fact(score(model, queries, max_tokens=max_tokens), queries, everything)
        return torch.stack([scores.logprob, scores.recall])

    before = ask()
    rows = []
    for vector, scale in zip(vectors, stds, strict=True):
        change = _changes(model, vector, scale, samples, seed, ask) - before[:, None, None]
        parts = change.split([len(facts), len(others)], dim=-1)
        rows.append([torch.stack(_effects(a, b, facts, others, seed)) for a, b in zip(*parts, strict=True)])
    known, recalled = before[:, : len(facts)].mean(1).tolist()
    note = f"before: {known:.3f} nats, recall {recalled:.2f}; {samples} noise samples, {len(others)} other facts"
    note += "; 95 % bootstrap interval over noise samples and groups of facts"
    tables = torch.stack([torch.stack(row) for row in rows], 1)  # measure, vector, statistic, effect
    labels = {"vector": tuple(f"L{layer} neuron {neuron}" for layer, neuron in vectors), "effect": EFFECTS}
    logprob, recall = (
        Attribution(
            name=name, values=table[:, 0], axes=tuple(labels), labels=labels, unit=unit, n=len(facts),
            low=table[:, 1], high=table[:, 2], note=note,
        )
        for table, (name, unit) in zip(tables, _MEASURES, strict=True)
    )  # fmt: skip
    ratios = tuple(scale * root / length for scale, length in zip(stds, lengths, strict=True))
    return NoiseEffects(logprob=logprob, recall=recall, std=tuple(stds), ratio=ratios)


@takes_settings_of(noise_effects)
def concept_causal(model: Model, facts: Sequence[Fact], *, others: Sequence[Fact], **settings: Any) -> Attribution:
    """Change of the answers' log-probability (nats) by noise on value vectors: axes (vector, effect).

    The first of what `noise_effects` gives, with its settings.
    """
    return noise_effects(model, facts, others=others, **settings).logprob


def _length(model: Model, layer: int, neuron: int) -> float:
    """Length of a value vector as it is stored.

    Raises:
        ValueError: a vector that the model lacks, or one of length 0, which no noise can be measured by.
    """
    length = value_vectors(model, layer, [neuron], gains=STORED).norm().item()
    if length == 0:
        raise ValueError(f"the value vector L{layer} neuron {neuron} of {model.name!r} is zero: choose another")
    return length


@dataclass(frozen=True, kw_only=True)
class Intrinsic:
    """How far one value vector has moved between two models. Source: 2406.11614, section 4."""

    cosine: float
    distance: float
    """Euclidean, of the vectors as they are stored."""
    jaccard: float
    """Top tokens of both over top tokens of either."""
    text_ratio: float | None
    """Top tokens after that occur in the text, over those before; None without a text or where there were none."""
    text_kept: float | None
    """Top tokens before and after that occur in the text, over those before."""


def intrinsic(
    before: Model,
    after: Model,
    layer: int,
    neuron: int,
    *,
    text: str | None = None,
    top: int = TOP,
    gains: Gains = WRITTEN,
) -> Intrinsic:
    """Measure one value vector before and after; each model reads its own vector by its own unembedding.

    For an edit: `with clone(model) as other, edit.on(other): intrinsic(model, other, ...)`. Tokens are compared by id,
    and with the text as in `text_mask`.

    Raises:
        ValueError: a vector that a model lacks, or models of another width or vocabulary.
    """
    if before.d_model != after.d_model or before.tokenizer.get_vocab() != after.tokenizer.get_vocab():
        raise ValueError(
            f"{before.name!r} and {after.name!r} differ in d_model or vocabulary: their vectors do not compare"
        )
    old, new = (value_vectors(m, layer, [neuron], gains=STORED)[0].double().cpu() for m in (before, after))
    ids = [set(project(m, layer, [neuron], top=top, gains=gains).ids[0].tolist()) for m in (before, after)]
    ratio = kept = None
    if text is not None:
        mask = text_mask(before.tokenizer, text)
        inside = [{i for i in tokens if mask[i]} for tokens in ids]
        if inside[0]:
            ratio = len(inside[1]) / len(inside[0])
            kept = len(inside[0] & inside[1]) / len(inside[0])
    return Intrinsic(
        cosine=torch.cosine_similarity(old, new, dim=0).item(),
        distance=(old - new).norm().item(),
        jaccard=len(ids[0] & ids[1]) / len(ids[0] | ids[1]),
        text_ratio=ratio,
        text_kept=kept,
    )
