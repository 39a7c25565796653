"""Running text as rows of token ids: a long text is read in pieces that the model has positions for."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import encode_all


@dataclass(frozen=True)
class Piece:
    """A part of a text. The special tokens that the text begins with (BOS) stand before each of its pieces."""

    text: int
    """Index of the text."""
    start: int
    """Position i of the piece is position start + i of the text, but for those special tokens."""
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    """The characters of the text that each token covers; special tokens cover none."""


def pieces(model: Model, texts: Sequence[str], context: int = 512) -> list[Piece]:
    """Texts in pieces of at most `context` tokens (or the model's positions, if those are fewer), in order. A text of
    nothing but special tokens has none.

    Raises:
        ValueError: `context` leaves no room for a token behind the special ones.
    """
    context = min(context, model.n_ctx or context)
    special, known = set(model.tokenizer.all_special_ids), encode_all(model.tokenizer, texts)
    found = []
    for number, text in enumerate(texts):
        ids, offsets = known[text].ids, known[text].offsets
        head = sum(1 for _ in itertools.takewhile(special.__contains__, ids))
        size = context - head
        if size < 1:
            raise ValueError(f"pieces of {context} tokens have no room behind {head} special ones; raise context")
        for a in range(0, len(ids) - head, size):
            span = slice(head + a, head + a + size)
            found.append(Piece(number, a, ids[:head] + ids[span], offsets[:head] + offsets[span]))
    return found


def token_rows(model: Model, texts: Sequence[str], context: int = 512) -> list[tuple[int, ...]]:
    """The token ids of `pieces`."""
    return [piece.ids for piece in pieces(model, texts, context)]
