"""From facts and templates to token ids: subject spans by character offsets, answers, padding, buckets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.model.bridge import Model

Occurrence = Literal["first", "last", "all"]


@dataclass(frozen=True)
class Encoding:
    """Token ids of one text with the characters that each covers; special tokens cover none."""

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


def encode_all(tokenizer: Any, texts: Sequence[str]) -> dict[str, Encoding]:
    """Tokenize texts with the special tokens the HF tokenizer puts in front, and none behind; text -> encoding.

    An EOS or SEP that the tokenizer appends is dropped: the text is a prompt that goes on.
    """
    unique = list(dict.fromkeys(texts))
    if not unique:
        return {}
    out = tokenizer(unique, return_offsets_mapping=True, return_special_tokens_mask=True)
    rows = zip(out["input_ids"], out["offset_mapping"], out["special_tokens_mask"], strict=True)
    return {text: _trimmed(*row) for text, row in zip(unique, rows, strict=True)}


def _trimmed(ids: list[int], offsets: list[tuple[int, int]], special: list[int]) -> Encoding:
    end = len(ids)
    while end and special[end - 1] and any(not s for s in special[: end - 1]):
        end -= 1
    covered = ((0, 0) if s else (o[0], o[1]) for o, s in zip(offsets[:end], special[:end], strict=True))
    return Encoding(tuple(ids[:end]), tuple(covered))


def encode(tokenizer: Any, text: str) -> Encoding:
    """The encoding of one text; see `encode_all`."""
    return encode_all(tokenizer, [text])[text]


def has_unknown(tokenizer: Any, encoding: Encoding) -> bool:
    """Whether the tokenizer only knows part of the text as its unknown token; a BOS that is the same token is none."""
    pairs = zip(encoding.ids, encoding.offsets, strict=True)
    return any(token == tokenizer.unk_token_id and b > a for token, (a, b) in pairs)


def token_span(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """Token positions [a, b) that cover the characters [start, end) of the encoded text.

    Raises:
        ValueError: no token covers these characters.
    """
    inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < end and b > start and b > a]
    if not inside:
        raise ValueError(f"no token covers characters {start}..{end}")
    return inside[0], inside[-1] + 1


def subject_spans(
    tokenizer: Any, text: str, subject: str, occurrence: Occurrence = "last"
) -> tuple[tuple[int, int], ...]:
    """Token spans [a, b) of a subject in an unpadded text: its first, last or all occurrences.

    Raises:
        ValueError: the subject does not occur in the text.
    """
    starts = []
    at = text.find(subject)
    while at >= 0:
        starts.append(at)
        at = text.find(subject, at + 1)
    if not starts:
        raise ValueError(f"subject {subject!r} not found in prompt {text!r}")
    chosen = {"first": starts[:1], "last": starts[-1:], "all": starts}[occurrence]
    encoding = encode(tokenizer, text)
    return tuple(token_span(encoding, start, start + len(subject)) for start in chosen)


@dataclass(frozen=True)
class Query:
    """One prompt, tokenized, with its candidate answers; the first candidate is the true one."""

    prompt: tuple[int, ...]
    span: tuple[int, int]
    """Subject tokens [a, b) in the unpadded prompt."""
    answers: tuple[tuple[int, ...], ...]
    fact: Fact
    template: str

    @property
    def full(self) -> tuple[int, ...]:
        """Prompt and true answer."""
        return self.prompt + self.answers[0]


@dataclass(frozen=True)
class Ask:
    """A fact to be asked for in one phrasing, if wanted about another subject than its own."""

    fact: Fact
    template: str
    subject: str | None = None

    @property
    def prompt(self) -> str:
        return self.template.replace("{}", self.subject or self.fact.subject)


def tokenize(tokenizer: Any, asks: Sequence[Ask], distractors: bool = True) -> tuple[Query, ...]:
    """The queries of some asks, from one call of the tokenizer.

    Prompt and candidate are tokenized jointly, so that token merges across the border are those of the text.

    Args:
        distractors: whether the fact's distractors are candidates too; recall needs the true answer only.

    Raises:
        ValueError: a candidate's first token also covers the end of the prompt, or a word without tokens.
    """
    texts, wanted = [], []
    for ask in asks:
        prompt = ask.prompt
        answers = (ask.fact.object, *(ask.fact.distractors if distractors else ()))
        wanted.append([ask.fact.joined(prompt, answer) for answer in answers])
        texts += [prompt, *wanted[-1]]
    known = encode_all(tokenizer, texts)
    return tuple(
        _query(tokenizer, ask, known[ask.prompt], [known[text] for text in both])
        for ask, both in zip(asks, wanted, strict=True)
    )


def _query(tokenizer: Any, ask: Ask, encoding: Encoding, both: Sequence[Encoding]) -> Query:
    prompt, fact = encoding.ids, ask.fact
    for answer, candidate in zip((fact.object, *fact.distractors), both):
        if candidate.ids[: len(prompt)] != prompt or len(candidate.ids) == len(prompt):
            raise ValueError(
                f"fact {fact.id!r}: the tokens of {answer!r} merge with the end of the prompt {ask.prompt!r}; end the "
                f"prompt in a full word{'' if fact.joiner else ' or a mark, or set joiner to a space'}"
            )
        if has_unknown(tokenizer, candidate):
            raise ValueError(f"fact {fact.id!r}: the tokenizer has no tokens for part of {ask.prompt!r} or its answers")
    slot = ask.template.index("{}")
    span = token_span(encoding, slot, slot + len(ask.subject or fact.subject))
    return Query(prompt, span, tuple(c.ids[len(prompt) :] for c in both), fact, ask.template)


def make_query(tokenizer: Any, fact: Fact, template: str, subject: str | None = None) -> Query:
    """The query of one fact and phrasing; see `tokenize`."""
    return tokenize(tokenizer, [Ask(fact, template, subject)])[0]


def make_queries(
    tokenizer: Any,
    facts: Sequence[Fact],
    which: Literal["templates", "prompt", "heldout"] = "templates",
    distractors: bool = True,
) -> tuple[Query, ...]:
    """One query per fact and phrasing: all that a method may see, the main prompt only, or the held-out ones."""
    choose = {"templates": lambda f: f.templates, "prompt": lambda f: (f.prompt,), "heldout": lambda f: f.heldout}
    return tokenize(tokenizer, [Ask(fact, t) for fact in facts for t in choose[which](fact)], distractors)


def pad(
    rows: Sequence[Sequence[int]], fill: int, side: Literal["left", "right"] = "right"
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Int[Tensor, " batch"]]:
    """Padded ids, attention mask (1 = real token), and how far each row was shifted to the right.

    Add the shift to a span of the unpadded prompt to get the span in the padded batch.
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros_like(ids)
    shifts = torch.zeros(len(rows), dtype=torch.long)
    for i, row in enumerate(rows):
        at = width - len(row) if side == "left" else 0
        ids[i, at : at + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, at : at + len(row)] = 1
        shifts[i] = at
    return ids, mask, shifts


def buckets(rows: Sequence[Sequence[int]], max_tokens: int = 8192) -> Iterator[list[int]]:
    """Indices of rows of equal length, at most `max_tokens` tokens together: batches that need no padding."""
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    for length, members in sorted(by_length.items()):
        size = max(1, max_tokens // max(length, 1))
        for start in range(0, len(members), size):
            yield members[start : start + size]


def embeddings(model: Model, rows: Sequence[Sequence[int]]) -> Float[Tensor, "row token d_model"]:
    """Embeddings of rows of tokens of equal length, as they stand at `hook_embed`."""
    kept: list[Tensor] = []
    table = model.hf.get_input_embeddings()
    with torch.no_grad(), model.hooks(("hook_embed", lambda x: kept.append(x))):
        table(torch.tensor([list(row) for row in rows], device=model.device))
    return kept[0]
