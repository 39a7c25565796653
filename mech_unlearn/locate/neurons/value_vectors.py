"""Value vectors of the MLPs, the tokens that they promote, and the tokens of words and texts.

A value vector is a row of the MLP output matrix [d_mlp, d_model]: what a neuron writes per unit of its activation. Its
dot products with the rows of the unembedding say which tokens that makes likelier.
Source: Geva et al. 2022, arXiv 2203.14680, section 3; top 200 and no final norm as in 2406.11614.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.model.bridge import Model, post_norm
from mech_unlearn.model.tokens import encode_all, token_span

TOP = 200
"""Tokens that stand for a vector. Source: 2406.11614, section 3."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Projection:
    """Top tokens of value vectors of one layer, on the CPU."""

    layer: int
    neurons: tuple[int, ...]
    ids: Int[Tensor, "vector top"]
    logits: Float[Tensor, "vector top"]
    """Dot products with the unembedding rows, largest first."""
    mean: Float[Tensor, " vector"]
    """Mean logit over the vocabulary."""
    norm: Float[Tensor, " vector"]
    """Length of the vector as it is stored."""


@dataclass(frozen=True, kw_only=True)
class Gains:
    """Which norms' gains multiply a value vector before it is read."""

    post_norm: bool = True
    """Of a norm behind the MLP (Gemma 2, OLMo 2). The residual stream then receives this vector times one positive
    number, 1 / rms of the whole MLP output, that depends on the token; without the gain the vector points elsewhere
    than what is written. No effect in other models."""
    final_norm: bool = False
    """Of the final norm, after centring if it is a LayerNorm: the linear part of the model's readout. The paper's code
    leaves it out."""


WRITTEN = Gains()
"""The vector as it reaches the residual stream, up to a positive factor."""
STORED = Gains(post_norm=False)
"""The vector as it lies in the weights."""


def unembedding(model: Model) -> Float[Tensor, "d_vocab d_model"]:
    """The unembedding (tied or not) in float32, without rows that no token of the tokenizer has."""
    return model.hf.get_output_embeddings().weight.detach()[: len(model.tokenizer)].float()


@torch.no_grad()
def _final_gain(model: Model) -> tuple[Float[Tensor, " d_model"], bool]:
    """(Gain of the final norm, whether it subtracts the mean), found by calling it: the odd part at inputs of +-1."""
    norm = model.component("ln_final")
    x = torch.ones(1, 1, model.d_model, device=model.device, dtype=model.dtype)
    x[..., 1::2] = -1
    odd = (norm(x) - norm(-x)) / 2
    centred = (norm(x + 1) - norm(x)).norm() < 0.1 * odd.norm()
    return (odd * x).flatten().float(), bool(centred)


@torch.no_grad()
def value_vectors(
    model: Model,
    layer: int,
    neurons: Sequence[int] | None = None,
    *,
    gains: Gains = WRITTEN,
) -> Float[Tensor, "vector d_model"]:
    """The rows of the MLP output matrix of a layer, float32: what each neuron writes per unit of its activation.

    Raises:
        ValueError: a layer or neuron that the model lacks. KeyError: a layer without one output matrix.
    """
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"layer {layer} is not in {model.name!r}, whose layers are 0..{model.n_layers - 1}")
    name, stored_in_first = model.w_out(layer)
    rows = model.held[name].detach() if stored_in_first else model.held[name].detach().T
    if neurons is not None:
        if bad := [j for j in neurons if not 0 <= j < len(rows)]:
            raise ValueError(f"neuron {bad[0]} is not in layer {layer} of {model.name!r}: 0..{len(rows) - 1}")
        rows = rows[list(neurons)]
    rows = rows.float()
    if gains.post_norm and (norm := post_norm(model, layer)) is not None:
        rows = rows * norm[1].float()
    if gains.final_norm:
        gain, centred = _final_gain(model)
        rows = (rows - rows.mean(1, keepdim=True) if centred else rows) * gain
    return rows


def top_tokens(
    vectors: Float[Tensor, "vector d_model"], readout: Float[Tensor, "d_vocab d_model"], top: int, chunk: int
) -> tuple[Int[Tensor, "vector top"], Float[Tensor, "vector top"], Float[Tensor, " vector"]]:
    """(ids, logits, mean logit over the vocabulary), on the CPU; logits of at most `chunk` vectors exist at a time."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows in vectors.split(chunk):
        logits = rows @ readout.T
        best = logits.topk(top, dim=1)
        parts.append((best.indices.int().cpu(), best.values.cpu(), logits.mean(1).cpu()))
    ids, logits, mean = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids, logits, mean


@torch.no_grad()
def project(
    model: Model,
    layer: int,
    neurons: Sequence[int] | None = None,
    *,
    top: int = TOP,
    chunk: int = 256,
    gains: Gains = WRITTEN,
) -> Projection:
    """Top tokens of the value vectors of one layer (all, or some neurons) under the unembedding, without its bias.

    Args:
        chunk: vectors at a time; bounds memory to chunk x d_vocab logits.
        gains: which gains multiply the vectors, see `Gains`.

    Raises:
        ValueError: a layer or neuron that the model lacks, or more tokens than the vocabulary has.
    """
    readout = unembedding(model)
    if not 1 <= top <= len(readout) or chunk < 1:
        raise ValueError(f"top={top}, chunk={chunk}: top must be 1..{len(readout)} (the vocabulary), chunk positive")
    ids, logits, mean = top_tokens(value_vectors(model, layer, neurons, gains=gains), readout, top, chunk)
    stored = value_vectors(model, layer, neurons, gains=STORED).norm(dim=1).cpu()
    chosen = tuple(range(len(ids))) if neurons is None else tuple(neurons)
    return Projection(layer=layer, neurons=chosen, ids=ids, logits=logits, mean=mean, norm=stored)


def token_strings(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Each token as text of its own, without the spaces around it."""
    return [text.strip() for text in tokenizer.batch_decode([[int(i)] for i in ids])]


def text_mask(tokenizer: Any, text: str) -> Bool[Tensor, " d_vocab"]:
    """Tokens of the vocabulary that occur in a text, as lower-case strings of two characters or more with a letter,
    without English stop words and special tokens; with and without a leading space count alike.

    Raises:
        ValueError: no such token in the text.
    """
    return text_masks(tokenizer, [text])[0]


def text_masks(tokenizer: Any, texts: Sequence[str]) -> Bool[Tensor, "text d_vocab"]:
    """`text_mask` of several texts."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    size, special = len(tokenizer), set(tokenizer.all_special_ids)
    words = [word.lower() for word in token_strings(tokenizer, range(size))]
    out = torch.zeros(len(texts), size, dtype=torch.bool)
    for row, text in zip(out, texts, strict=True):
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        wanted = {words[i] for i in found if i not in special} - ENGLISH_STOP_WORDS
        wanted = {word for word in wanted if len(word) > 1 and any(c.isalpha() for c in word)}
        row[:] = torch.tensor([word in wanted and i not in special for i, word in enumerate(words)])
        if not row.any():
            raise ValueError(f"text {text[:40]!r} has no token of two letters that is no stop word; give a longer one")
    return out


def word_tokens(tokenizer: Any, words: Sequence[str]) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """(Word -> the tokens that begin it, words of several tokens).

    A word is looked up behind a space, behind a line break and at the start of a text. The tokens that are the whole
    word count; where there is none, the first token of each way of writing it stands for the word.

    Raises:
        ValueError: no words, an empty one, or one that the tokenizer has no tokens for.
    """
    words = tuple(dict.fromkeys(word.strip() for word in words))
    if not words or "" in words:
        raise ValueError("words: give at least one, none of them empty")
    known = encode_all(tokenizer, [prefix + word for word in words for prefix in (" ", "", "\n")])
    out: dict[str, tuple[int, ...]] = {}
    split = []
    for word in words:
        whole, first = [], []
        for prefix in (" ", "", "\n"):
            encoding = known[prefix + word]
            a, b = token_span(encoding, len(prefix), len(prefix + word))
            if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in encoding.ids[a:b]:
                (whole if b - a == 1 else first).append(encoding.ids[a])
        if not whole + first:
            raise ValueError(f"word {word!r}: the tokenizer has no tokens for it")
        if not whole:
            split.append(word)
        out[word] = tuple(dict.fromkeys(whole or first))
    return out, tuple(split)
