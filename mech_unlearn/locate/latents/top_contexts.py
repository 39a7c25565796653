"""Where a latent fires most: the tokens, and the text around them, with its highest activations.

Paper:    Bricken et al. 2023, Towards monosemanticity, Transformer Circuits; Cunningham et al. 2023, arXiv 2309.08600.
Needs:    texts, the more the better; one forward pass up to the SAE's layer. Memory does not grow with the texts.
Differs:  a context (the tokens around, and which of them fires) is listed once, however often the texts repeat it.
Fails:    the top says what drives a latent hardest, not what drives it mostly; a name that is rare in the texts is
          missing however well the latent fires on it.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mech_unlearn.locate.latents.latent_states import ACTIVE, check_sae, latent_blocks
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.latents import Sae
from mech_unlearn.model.pieces import pieces

CHUNK = 1024
"""Texts tokenized at a time."""


@dataclass(frozen=True)
class _Piece:
    """A piece of a text: its token ids, the characters of each in the text, and where it begins in the text."""

    text: int
    source: str
    start: int
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]

    def around(self, position: int, window: int) -> tuple[tuple[int, ...], int]:
        """Ordinary tokens at most `window` before and behind, and which of them is at the position."""
        places = self.near(position, window)
        return tuple(self.ids[i] for i in places), places.index(position)

    def near(self, position: int, window: int) -> list[int]:
        """Positions of these tokens in the piece."""
        span = range(max(0, position - window), min(len(self.ids), position + window + 1))
        return [i for i in span if self.offsets[i][1] > self.offsets[i][0] or i == position]

    def snippet(self, position: int, window: int) -> str:
        """The text that these tokens cover."""
        places = self.near(position, window)
        return self.source[min(self.offsets[i][0] for i in places) : max(self.offsets[i][1] for i in places)]


@dataclass(frozen=True)
class _Hit:
    activation: float
    piece: _Piece
    position: int

    @property
    def order(self) -> tuple[float, int, int]:
        """Sorts the highest activation first, the earliest place among equals."""
        return -self.activation, self.piece.text, self.piece.start + self.position


def _pieces(model: Model, texts: Iterable[str], context: int) -> Iterator[list[_Piece]]:
    numbered = enumerate(texts)
    while chunk := list(itertools.islice(numbered, CHUNK)):
        cut = pieces(model, [text for _, text in chunk], context)
        yield [_Piece(*chunk[piece.text], piece.start, piece.ids, piece.offsets) for piece in cut]


def _merge(best: dict[Any, _Hit], hits: Iterator[_Hit], k: int, window: int) -> None:
    """Keep the k best contexts; `hits` come best first, so that the first of a context is its best."""
    found = 0
    seen = set()
    for hit in hits:
        if found == k or (len(best) >= k and hit.activation < min(h.activation for h in best.values())):
            break
        key = hit.piece.around(hit.position, window)
        if key in seen:
            continue
        seen.add(key)
        found += 1
        if key not in best or hit.order < best[key].order:
            best[key] = hit
    for key in sorted(best, key=lambda key: best[key].order)[k:]:
        del best[key]


def _sorted_hits(values: Tensor, index: Tensor, pieces: Sequence[_Piece]) -> Iterator[_Hit]:
    """Active states of one latent, highest first; equal ones in the order of the texts."""
    active = (values > ACTIVE).nonzero()[:, 0]
    order = active[values[active].argsort(descending=True, stable=True)]
    for i in order.tolist():
        row, position = index[i].tolist()
        yield _Hit(values[i].item(), pieces[row], position)


def top_contexts(
    model: Model,
    sae: Sae,
    texts: Iterable[str],
    latents: Sequence[int],
    *,
    k: int = 10,
    window: int = 10,
    context: int = 512,
    max_tokens: int = 8192,
) -> Any:
    """The k contexts with the highest activation of each latent, as a pandas frame, best first.

    Columns: latent, rank (from 1), activation, token (as the vocabulary spells it), snippet (the text around it),
    text (index of the text), position (of the token in it, special tokens counted). Contexts of equal tokens count
    once, with their highest activation; equal activations stand in the order of the texts. Special tokens are left out.
    A latent that fires on fewer contexts has fewer rows.

    Args:
        texts: any iterable, read once; a chunk of 1,024 texts is held at a time.
        window: tokens shown before and behind.
        context: longer texts are read in pieces of this many tokens.

    Raises:
        ValueError: no latents, one outside of 0..d_sae-1, k or window out of range, or an SAE that does not fit.
    """
    import pandas as pd

    check_sae(model, sae)
    wrong = [j for j in latents if not 0 <= j < sae.d_sae]
    if wrong or not latents:
        raise ValueError(f"latents {wrong or 'none'}: name some of 0..{sae.d_sae - 1}")
    if k < 1 or window < 0:
        raise ValueError(f"k={k}, window={window}: k must be 1 or more, window 0 or more")
    wanted = list(dict.fromkeys(latents))
    best: dict[int, dict[Any, _Hit]] = {j: {} for j in wanted}
    for cut in _pieces(model, texts, context):
        rows = [piece.ids for piece in cut]
        places = [[i for i, (a, b) in enumerate(piece.offsets) if b > a] for piece in cut]
        for index, acts in latent_blocks(model, sae, rows, places, max_tokens):
            chosen = acts[:, wanted].cpu()
            for column, j in enumerate(wanted):
                _merge(best[j], _sorted_hits(chosen[:, column], index, cut), k, window)
    lines = [
        {
            "latent": j,
            "rank": rank,
            "activation": hit.activation,
            "token": model.tokenizer.convert_ids_to_tokens(hit.piece.ids[hit.position]),
            "snippet": hit.piece.snippet(hit.position, window),
            "text": hit.piece.text,
            "position": hit.piece.start + hit.position,
        }
        for j in wanted
        for rank, hit in enumerate(sorted(best[j].values(), key=lambda hit: hit.order), 1)
    ]
    return pd.DataFrame(lines, columns=["latent", "rank", "activation", "token", "snippet", "text", "position"])
