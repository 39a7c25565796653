"""Activation interventions: what an Edit may do to a forward pass besides changing weights.

Each kind is a frozen type with a `site`, the token ids of the `subjects` it looks for, and a call. `Shift`, `Affine`
and `Clamp` change the states at their site, `Ban` changes logits, `Prefix` changes the tokens that are read. Fields
that are tensors are stored as tensors, all others as JSON; `KINDS` says which type a stored one is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.core import Site

Where = Literal["last", "from", "all"]
"""The subject's last token; that token and all behind it; every token."""
Tokens = tuple[int, ...]


def occurrences(
    ids: Int[Tensor, "batch pos"], tokens: Tokens
) -> tuple[Int[Tensor, " occurrence"], Int[Tensor, " occurrence"]]:
    """Row and last position of each occurrence of a token sequence."""
    width = len(tokens)
    if ids.shape[1] < width:
        none = torch.zeros(0, dtype=torch.long, device=ids.device)
        return none, none
    hit = (ids.unfold(1, width, 1) == torch.tensor(tokens, device=ids.device)).all(-1)
    rows, starts = hit.nonzero(as_tuple=True)
    return rows, starts + width - 1


def _tensors(intervention: Any) -> dict[str, Tensor]:
    """What has to be stored as tensors: field -> tensor."""
    values = {f.name: getattr(intervention, f.name) for f in fields(intervention)}
    return {name: x for name, x in values.items() if isinstance(x, Tensor)}


def _settings(intervention: Any) -> dict[str, Any]:
    """All other fields that are set, as JSON values."""
    values = {f.name: getattr(intervention, f.name) for f in fields(intervention)}
    plain = {name: x for name, x in values.items() if not isinstance(x, Tensor) and x is not None}
    return {n: {"layer": x.layer, "kind": x.kind} if isinstance(x, Site) else x for n, x in plain.items()}


@dataclass(frozen=True, eq=False)
class Shift:
    """An activation intervention at the last token of each occurrence of a subject: add a vector.

    With `centers`, first take out of the state's deviation from the subject's centre all that lies outside of `kept`:
    the part of a context's effect that is the subject's own.
    """

    site: Site
    subjects: tuple[Tokens, ...]
    """Token ids of each subject, as they occur inside a prompt."""
    vectors: Float[Tensor, "subject d_model"]
    centers: Float[Tensor, "subject d_model"] | None = None
    kept: Float[Tensor, "direction d_model"] | None = None
    """Orthonormal directions; given with `centers`."""

    moves_positions = False
    tensors = property(_tensors)
    settings = property(_settings)

    def __post_init__(self) -> None:
        if (self.centers is None) != (self.kept is None):
            raise ValueError("a shift takes centers and kept directions together, or neither")
        if len(self.vectors) != len(self.subjects):
            raise ValueError(f"{len(self.subjects)} subjects and {len(self.vectors)} vectors: one each")

    def _moved(self, state: Float[Tensor, "row d_model"], subject: int) -> Float[Tensor, "row d_model"]:
        vector = self.vectors[subject].to(state)
        if self.centers is None or self.kept is None:
            return state + vector
        deviation, kept = state - self.centers[subject].to(state), self.kept.to(state)
        return state - deviation + deviation @ kept.T @ kept + vector

    def __call__(self, x: Float[Tensor, "batch pos d_model"], ids: Int[Tensor, "batch pos"]) -> Tensor:
        out = x
        for subject, tokens in enumerate(self.subjects):
            at = occurrences(ids, tokens)
            if len(at[0]):
                out = out.clone() if out is x else out
                out[at] = self._moved(out[at], subject)
        return out


@dataclass(frozen=True, eq=False, kw_only=True)
class Affine:
    """x becomes x - left right (x - center), in float32, at the chosen positions.

    Raises:
        ValueError: no subjects where positions are told by them, or shapes that do not fit.
    """

    site: Site
    subjects: tuple[Tokens, ...] = ()
    left: Float[Tensor, "d_model rank"]
    right: Float[Tensor, "rank d_model"]
    center: Float[Tensor, " d_model"]
    where: Where = "last"
    skip_first: bool = False
    """Leave position 0 (the BOS of most tokenizers) as it is; for "all"."""

    moves_positions = False
    tensors = property(_tensors)
    settings = property(_settings)

    def __post_init__(self) -> None:
        if (self.where == "all") == bool(self.subjects):
            raise ValueError(f"an affine map at where={self.where!r} with {len(self.subjects)} subjects")
        if self.left.shape != self.right.T.shape or len(self.center) != len(self.left):
            raise ValueError(f"left {tuple(self.left.shape)}, right {tuple(self.right.shape)} do not fit the center")

    def mask(self, ids: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """The positions that are changed."""
        chosen = torch.full_like(ids, self.where == "all", dtype=torch.bool)
        for tokens in self.subjects:
            chosen[occurrences(ids, tokens)] = True
        if self.where == "from":
            chosen = chosen.cumsum(1) > 0
        if self.skip_first:
            chosen[:, 0] = False
        return chosen

    def mapped(self, state: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """The states after the map, in their own dtype."""
        x = state.float()
        left, right, center = (t.to(x) for t in (self.left, self.right, self.center))
        return (x - (x - center) @ right.T @ left.T).to(state.dtype)

    def __call__(self, x: Float[Tensor, "batch pos d_model"], ids: Int[Tensor, "batch pos"]) -> Tensor:
        chosen = self.mask(ids)
        if not chosen.any():
            return x
        out = x.clone()
        out[chosen] = self.mapped(x[chosen])
        return out


@dataclass(frozen=True, eq=False, kw_only=True)
class Clamp:
    """Some latents of an SAE are set to a value wherever they are active; what else the state holds stays.

    a_j = relu(pre_j) with pre = encoder x + bias, where pre_j is above its threshold (and, in a TopK SAE, among the
    `top` largest of all); then x <- x + sum_j (value_j - a_j) decoder_j over the active ones, so that the SAE's error
    and all other latents' share are kept. Only the chosen latents are stored and computed, but for a TopK SAE, whose
    latents compete: there `rest` holds the encoder of the others.
    """

    site: Site
    subjects: tuple[Tokens, ...] = ()
    """None: a clamp looks for no subject."""
    encoder: Float[Tensor, "latent width"]
    bias: Float[Tensor, " latent"]
    threshold: Float[Tensor, " latent"]
    decoder: Float[Tensor, "latent width"]
    value: Float[Tensor, " latent"]
    """What an active latent is set to; -c in SAEBench."""
    top: int | None = None
    """k of a TopK SAE."""
    rest: Float[Tensor, "other width"] | None = None
    rest_bias: Float[Tensor, " other"] | None = None
    skip_first: bool = True
    """Leave position 0 as it is."""

    moves_positions = False
    tensors = property(_tensors)
    settings = property(_settings)

    def __post_init__(self) -> None:
        if (self.top is None) != (self.rest is None) or (self.rest is None) != (self.rest_bias is None):
            raise ValueError(
                "a clamp in a TopK SAE takes top, rest and rest_bias together; in another SAE none of them"
            )

    def active(self, state: Float[Tensor, "*row width"]) -> tuple[Tensor, Bool[Tensor, "*row latent"]]:
        """(Pre-activations of the chosen latents, which of them are active)."""
        x = state.float()
        pre = x @ self.encoder.to(x).T + self.bias.to(x)
        on = pre > self.threshold.to(x).clamp(min=0)
        if self.rest is not None and self.rest_bias is not None and self.top is not None:
            others = x @ self.rest.to(x).T + self.rest_bias.to(x)
            every = torch.cat([pre, others], -1)
            on &= pre >= every.topk(min(self.top, every.shape[-1]), -1).values[..., -1:]
        return pre, on

    def __call__(self, x: Float[Tensor, "batch pos width"], ids: Int[Tensor, "batch pos"]) -> Tensor:
        pre, on = self.active(x)
        if self.skip_first:
            on[:, 0] = False
        rows = on.any(-1)
        if not rows.any():
            return x
        change = torch.where(on[rows], self.value.to(pre) - pre[rows], torch.zeros_like(pre[rows]))
        out = x.clone()
        out[rows] = (x[rows].float() + change @ self.decoder.to(pre)).to(x.dtype)
        return out


@dataclass(frozen=True, eq=False, kw_only=True)
class Ban:
    """The logits of some tokens are lowered at every position from a subject's last token on; no state changes."""

    site: None = None
    subjects: tuple[Tokens, ...]
    tokens: tuple[Tokens, ...]
    """Banned tokens of each subject."""
    penalty: float
    """Logits; finite, so that float16 can hold it."""

    moves_positions = False
    tensors = property(_tensors)
    settings = property(_settings)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.subjects) or not 0 < self.penalty < float("inf"):
            raise ValueError(f"{len(self.subjects)} subjects, {len(self.tokens)} bans, penalty {self.penalty}")

    def __call__(self, x: Float[Tensor, "batch pos d_vocab"], ids: Int[Tensor, "batch pos"]) -> Tensor:
        banned: dict[int, Tensor] = {}
        for subject, tokens in zip(self.subjects, self.tokens, strict=True):
            seen = torch.zeros_like(ids, dtype=torch.bool)
            seen[occurrences(ids, subject)] = True
            if seen.any():
                seen = seen.cumsum(1) > 0
                for token in tokens:
                    banned[token] = banned[token] | seen if token in banned else seen
        if not banned:
            return x
        out, lowest = x.clone(), torch.finfo(x.dtype).min
        for token, seen in banned.items():
            out[..., token] = torch.where(seen, (x[..., token] - self.penalty).clamp(min=lowest), x[..., token])
        return out


@dataclass(frozen=True, eq=False, kw_only=True)
class Prefix:
    """Tokens are read in front of a row (behind its BOS) in which a subject occurs; logits keep the row's positions."""

    site: None = None
    subjects: tuple[Tokens, ...]
    prefixes: tuple[Tokens, ...]
    """Tokens for the rows of each subject; the first subject that is found decides."""
    otherwise: Tokens = ()
    """Tokens in front of all other rows."""
    bos: int | None = None
    """The token that stays in front, where a row begins with it."""

    moves_positions = True
    """Tokens stand in front of prompts, so that states have other positions than the prompt's."""
    tensors = property(_tensors)
    settings = property(_settings)

    def __post_init__(self) -> None:
        if len(self.prefixes) != len(self.subjects) or not all(self.prefixes):
            raise ValueError(f"{len(self.subjects)} subjects and {len(self.prefixes)} prefixes: one each, none empty")

    def chosen(self, ids: Int[Tensor, "batch pos"]) -> dict[Tokens, list[int]]:
        """Prefix -> the rows that it stands in front of."""
        of: list[Tokens] = [self.otherwise] * len(ids)
        for subject, prefix in reversed(list(zip(self.subjects, self.prefixes, strict=True))):
            for row in occurrences(ids, subject)[0].tolist():
                of[row] = prefix
        return {prefix: [i for i, own in enumerate(of) if own == prefix] for prefix in dict.fromkeys(of)}


Intervention = Shift | Affine | Clamp | Ban | Prefix
KINDS: Mapping[str, type] = {"shift": Shift, "affine": Affine, "clamp": Clamp, "ban": Ban, "prefix": Prefix}


def kind_of(intervention: Intervention) -> str:
    """The name of its type in `KINDS`."""
    return next(name for name, kind in KINDS.items() if type(intervention) is kind)
