"""Concept vectors: which MLP value vectors write a concept, judged by the tokens that they promote.

Paper:    Hong, Yu, Yang, Ravfogel, Geva 2024, Intrinsic evaluation of unlearning using parametric knowledge traces,
          arXiv 2406.11614, section 3. Reading a value vector by the unembedding: Geva et al. 2022, arXiv 2203.14680.
Needs:    weights only. A word search costs n_layers * d_mlp * d_model^2 multiplications; the modes that need top
          tokens (text, coherence, scorer) n_layers * d_mlp * d_model * d_vocab: a minute or two for GPT-2 small.
Differs:  the paper shows the top tokens to a language model and to people; here coherence, a text, a word list or any
          `scorer` judges them. Coherence is compared with random mixtures of the layer's own vectors and not with
          random token sets: the top tokens of any vector share its direction, so that random vectors would pass too.
          The paper does not say which tail its filter drops; here the 30 % whose top tokens stand out least. Tokens of
          a text are compared as lower-case words, not as ids. A gain between MLP and residual stream is applied.
Fails:    only what a vector adds with a positive coefficient is read; gated MLPs also use it with a negative one.
          Early layers write in a basis that the unembedding does not read. Rare and unused tokens lie close together
          and look coherent: read the tokens. A vector that promotes a word need not be used for it: see
          `mech_unlearn.locate.neurons.concept_causal`.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact
from mech_unlearn.locate.neurons.value_vectors import (
    TOP,
    WRITTEN,
    Gains,
    Projection,
    project,
    text_masks,
    token_strings,
    top_tokens,
    unembedding,
    value_vectors,
    word_tokens,
)
from mech_unlearn.model.bridge import Model

DROP = 0.3
"""Share of each layer's vectors that the filter drops. Source: 2406.11614, section 3."""
MIXTURES = 200
"""Random mixtures per layer; the standard deviation of their coherence is then known to about 5 % (1 / sqrt(2n))."""

Scorer = Callable[[list[str]], float]
"""Judges the top tokens of a vector, best first; a language-model judge is such a function."""


def prefilter(projection: Projection, drop: float = DROP) -> Bool[Tensor, " vector"]:
    """Vectors that are kept: all but the share whose mean top logit exceeds their mean logit least; none of length 0.

    Raises:
        ValueError: a share outside [0, 1).
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop={drop}: the share of vectors to leave out must lie in [0, 1)")
    strength = projection.logits.mean(1) - projection.mean
    kept = projection.norm > 0
    kept[strength.argsort()[: int(drop * len(strength))]] = False
    return kept


def coherence(ids: Int[Tensor, "vector top"], unit: Float[Tensor, "d_vocab d_model"]) -> Float[Tensor, " vector"]:
    """Mean cosine over all pairs of the tokens of each row: (|sum of unit vectors|^2 - n) / (n (n - 1)); on the CPU."""
    n = ids.shape[1]
    if n < 2:
        raise ValueError("coherence compares tokens with each other: give top >= 2")
    sums = torch.nn.functional.embedding_bag(ids.to(unit.device), unit, mode="sum")
    return ((sums.square().sum(1) - n) / (n * (n - 1))).cpu()


@torch.no_grad()
def _promotion(
    model: Model, groups: Sequence[Sequence[int]], layers: Sequence[int], gains: Gains
) -> Iterator[Float[Tensor, "vector word"]]:
    """Per layer, the logit of each word's best token in standard deviations of the vector's logits over the vocabulary.

    Mean and deviation come from the mean and covariance of the unembedding's rows, so no logits are made.
    """
    readout = unembedding(model)
    mean = readout.mean(0)
    covariance = (readout - mean).T @ (readout - mean) / len(readout)
    tokens = torch.tensor([token for group in groups for token in group], device=readout.device)
    sizes = [len(group) for group in groups]
    for layer in layers:
        vectors = value_vectors(model, layer, gains=gains)
        deviation = ((vectors @ covariance) * vectors).sum(1).clamp(min=0).sqrt()
        z = vectors @ (readout[tokens] - mean).T / deviation[:, None]
        z[deviation == 0] = float("nan")
        yield torch.stack([part.amax(1) for part in z.split(sizes, 1)], 1).cpu()


def _text_scores(ids: Int[Tensor, "vector top"], masks: Bool[Tensor, "text d_vocab"]) -> Float[Tensor, " vector"]:
    """Share of tokens in the first text, times 1 - the largest idf-weighted overlap of these with another text."""
    concept, others = masks[0].float(), masks[1:].float()
    weight = concept * (1 + len(masks) / masks.sum(0).clamp(min=1)).log()
    table = torch.cat([concept[:, None], weight[:, None], (weight * others).T], 1)
    sums = torch.nn.functional.embedding_bag(ids, table, mode="sum")
    purity = 1 - (sums[:, 2:] / sums[:, 1:2].clamp(min=1e-12)).amax(1) if len(others) else torch.ones(len(ids))
    return sums[:, 0] / ids.shape[1] * purity


def _coherence_z(model: Model, found: Projection, seed: int, chunk: int, gains: Gains) -> Float[Tensor, " vector"]:
    """Coherence in standard deviations from the mean coherence of random mixtures of the layer's unit vectors.

    A mixture is a Gaussian vector with the second moments of the layer, and the embedding's own clusters and the
    choice of the tokens by the vector act on it alike.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + found.layer)
    directions = torch.nn.functional.normalize(value_vectors(model, found.layer, gains=gains), dim=1)
    mixed = torch.randn(MIXTURES, len(directions), generator=generator).to(directions.device) @ directions
    readout = unembedding(model)
    unit = torch.nn.functional.normalize(readout - readout.mean(0), dim=1)
    null = coherence(top_tokens(mixed, readout, found.ids.shape[1], chunk)[0], unit)
    return (coherence(found.ids, unit) - null.mean()) / null.std()


@torch.no_grad()
def concept_vectors(
    model: Model,
    facts: Sequence[Fact] | None = None,
    *,
    words: Sequence[str] | None = None,
    text: str | None = None,
    others: Sequence[str] = (),
    scorer: Scorer | None = None,
    layers: Sequence[int] | None = None,
    top: int = TOP,
    drop: float = DROP,
    limit: int | None = None,
    seed: int = 0,
    chunk: int = 256,
    gains: Gains = WRITTEN,
) -> Attribution:
    """Score of every value vector as a vector of one concept: axes (layer, neuron).

    Give one of `facts`, `words`, `text`, `scorer`; with none of them the score is coherence.

    * facts: the words are the objects of the facts, each once.
    * words: how much the vector promotes them: the logit of each word in standard deviations of the vector's logits
      over the vocabulary, mean over the words, with a 95 % normal interval over the words (NaN for one word). A word's
      logit is the largest among its tokens (`word_tokens`). Every vector is scored.
    * text: share of the top tokens that occur in the text, times 1 - the largest idf-weighted overlap of these tokens
      with one of the `others`, texts of other concepts.
    * scorer: what it returns for the top tokens.
    * coherence: mean cosine between the unembeddings (centred) of the top tokens, in standard deviations from the mean
      of 200 random mixtures of the layer's vectors. Its tails are heavier than normal ones: it is no p-value.

    The last three leave NaN where the filter dropped a vector.

    Args:
        top: tokens that stand for a vector.
        drop: share of each layer that `prefilter` drops.
        limit: at most that many vectors per layer go to the scorer, those whose top tokens stand out most.
        chunk: vectors projected at a time.
        gains: which gains multiply the vectors, see `Gains`.

    Raises:
        ValueError: no facts or words, more than one concept, a word or text without tokens, settings out of range, or
            an activation intervention in force (weights do not show it).

    Warns:
        UserWarning: a word of several tokens, for which its first token stands.
    """
    _check(model, {"facts": facts, "words": words, "text": text, "scorer": scorer}, others, limit)
    chosen = tuple(range(model.n_layers)) if layers is None else tuple(layers)
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(model.n_layers)):
        raise ValueError(f"layers {chosen}: give layers of {model.name!r} (0..{model.n_layers - 1}), each once")
    if facts is not None or words is not None:
        tokens, split = word_tokens(model.tokenizer, [fact.object for fact in facts] if facts else words or ())
        if split:
            warnings.warn(f"words of several tokens, for which the first stands: {', '.join(split)}", stacklevel=2)
        return _of_words(model, tokens, split, chosen, gains)
    masks = None if text is None else text_masks(model.tokenizer, [text, *others])
    rows = []
    for layer in chosen:
        found = project(model, layer, top=top, chunk=chunk, gains=gains)
        kept = prefilter(found, drop)
        if scorer is not None:
            row = _scorer_scores(model, found, kept, scorer, limit)
        elif masks is not None:
            row = _text_scores(found.ids, masks)
        else:
            row = _coherence_z(model, found, seed, chunk, gains)
        rows.append(row.masked_fill(~kept, float("nan")))
    unit = "coherence (z against random mixtures)" if masks is None else "share of top tokens x purity"
    note = f"top {top} tokens; {drop:.0%} of each layer dropped" + (f"; {len(others)} other texts" if others else "")
    return _attribution(torch.stack(rows), chosen, "score" if scorer is not None else unit, top, note)


def _check(model: Model, concept: Mapping[str, Any], others: Sequence[str], limit: int | None) -> None:
    given = [name for name, x in concept.items() if x is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} were given: choose one way to say what the concept is")
    if (others and "text" not in given) or (limit is not None and ("scorer" not in given or limit < 1)):
        raise ValueError("others= goes with text=, and limit= (1 or more) with scorer=")
    if model.in_force.interventions:
        raise ValueError("value vectors are weights and do not show an activation intervention; leave it first")
    if "facts" in given and not concept["facts"]:
        raise ValueError("no facts to locate: give at least one")


def _of_words(
    model: Model, tokens: Mapping[str, Sequence[int]], split: Sequence[str], layers: Sequence[int], gains: Gains
) -> Attribution:
    """How much each vector promotes the words, with an interval over them; `split` are those of several tokens."""
    z = torch.stack(list(_promotion(model, list(tokens.values()), layers, gains)))
    values, n = z.mean(-1), len(tokens)
    half = 1.96 * z.std(-1) / math.sqrt(n) if n > 1 else torch.full_like(values, float("nan"))
    first = f"; of several tokens, for which the first stands: {', '.join(split)}" if split else ""
    note = f"words: {', '.join(tokens)}{first}; 95 % normal interval over the words"
    unit = "mean logit of the words (standard deviations of the vector's logits)"
    return _attribution(values, layers, unit, n, note, low=values - half, high=values + half)


def _attribution(values: Tensor, layers: Sequence[int], unit: str, n: int, note: str, **bounds: Tensor) -> Attribution:
    labels = {"layer": tuple(layers), "neuron": tuple(range(values.shape[1]))}
    return Attribution(
        name="concept vectors", values=values, axes=tuple(labels), labels=labels, unit=unit, n=n, note=note, **bounds
    )


def _scorer_scores(
    model: Model, found: Projection, kept: Bool[Tensor, " vector"], scorer: Scorer, limit: int | None
) -> Float[Tensor, " vector"]:
    out = torch.full((len(kept),), float("nan"))
    strength = (found.logits.mean(1) - found.mean).masked_fill(~kept, float("-inf"))
    for j in strength.argsort(descending=True)[: min(int(kept.sum()), limit or len(kept))].tolist():
        out[j] = float(scorer(token_strings(model.tokenizer, found.ids[j].tolist())))
    return out


def candidates(model: Model, scores: Attribution, k: int = 20, *, shown: int = 20, gains: Gains = WRITTEN):
    """A pandas frame of the k best vectors of `concept_vectors`: layer, neuron, score, norm, tokens; best first.

    `tokens` are the `shown` most promoted tokens as one string; give the `gains` that the scores were made with.
    """
    import pandas as pd

    rows = []
    for at, score in scores.top(k):
        found = project(model, at["layer"], [at["neuron"]], top=shown, gains=gains)
        tokens = ", ".join(token_strings(model.tokenizer, found.ids[0].tolist()))
        rows.append((at["layer"], at["neuron"], score, found.norm[0].item(), tokens))
    return pd.DataFrame(rows, columns=["layer", "neuron", "score", "norm", "tokens"])


def find(
    model: Model,
    words: Sequence[str],
    k: int = 20,
    *,
    layers: Sequence[int] | None = None,
    shown: int = 20,
    gains: Gains = WRITTEN,
):
    """The k value vectors that promote some words most, as a frame of `candidates`; see `concept_vectors`."""
    return candidates(
        model, concept_vectors(model, words=words, layers=layers, gains=gains), k, shown=shown, gains=gains
    )
