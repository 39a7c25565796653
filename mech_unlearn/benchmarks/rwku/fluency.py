"""Fluency: is what the model writes still varied, or does it repeat itself? n-gram entropy.

Paper: n-gram entropy as RWKU takes it over from model editing (arXiv 2406.10890; arXiv 2202.05262, "generation
    entropy"; Zhang et al. 2018): mean of 2/3 of the bigram and 4/3 of the trigram entropy of a text, bits.
Needs: greedy text after general prompts (RWKU: 256 tokens), of the audited and of the full model.
Differs: words are NLTK's without its sentence splitter, which is data to be downloaded: a full stop inside a text stays
    with its word. Prompts are given as they are, without a chat template.
Fails: high entropy is no sense: a model that writes random words scores best. Entropy grows with length, so compare
    texts of one `max_new_tokens` only.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import torch

from mech_unlearn.metrics.generation import continuations
from mech_unlearn.metrics.intervals import RowScores
from mech_unlearn.model.bridge import Model

WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""Length of n-grams -> weight of their entropy. Source: released code of 2406.10890."""
MAX_NEW_TOKENS = 256


def ngram_entropy(words: Sequence[str], n: int) -> float:
    """Shannon entropy of the n-grams of a text, bits; 0 where it has fewer than n words."""
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) + 0.0


def weighted_ngram_entropy(text: str) -> float:
    """Mean over n = 2, 3 of weight x n-gram entropy, bits."""
    from nltk.tokenize import word_tokenize

    words = word_tokenize(text, preserve_line=True)
    return sum(weight * ngram_entropy(words, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def fluency_ngram_entropy(
    model: Model,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    clusters: Sequence[Hashable] | None = None,
) -> RowScores:
    """Weighted bi- and trigram entropy of the greedy text after each prompt, bits.

    Raises:
        ValueError: as `generation.continuations`.
    """
    texts = continuations(model, prompts, max_new_tokens)
    return RowScores(
        values=torch.tensor([weighted_ngram_entropy(text) for text in texts], dtype=torch.float64),
        unit=f"bits, weighted 2- and 3-gram entropy of {max_new_tokens} greedy tokens",
        clusters=None if clusters is None else tuple(clusters),
        texts=texts,
    )
