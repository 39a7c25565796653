"""Forward passes that leave out what nobody reads: logits of chosen positions only, and one new token at a time.

Each gives what the plain forward pass gives; where that cannot be said, all is computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.model.bridge import Model

LOGIT_BYTES = 2**28
"""Float32 logits held at once, at the most, where one row has no more."""


def logit_tokens(d_vocab: int) -> int:
    """Tokens whose float32 logits fit into `LOGIT_BYTES`; one at the least."""
    return max(1, LOGIT_BYTES // (4 * d_vocab))


def _keep(model: Model, positions: int) -> dict[str, int]:
    """The argument by which a Hugging Face model unembeds its last positions only; none where it has no such."""
    return {"logits_to_keep": positions} if "logits_to_keep" in signature(type(model.hf).forward).parameters else {}


def _require_room(model: Model, tokens: int) -> None:
    limit = model.n_ctx
    if limit is not None and tokens > limit:
        raise ValueError(f"a prompt of {tokens} tokens; {model.name!r} has {limit} positions")


def _whole(model: Model) -> bool:
    """Whether something reads or changes logits by position, so that all positions have to be unembedded."""
    acts, ends = model.in_force, (model.hf, *model.hf.get_output_embeddings().modules())
    return bool(acts.interventions or acts.forward_replaced or acts.hooked("unembed") or not acts.as_loaded(*ends))


@contextmanager
def unembedded(hf: Any, places: tuple[Int[Tensor, " place"], Int[Tensor, " place"]]) -> Iterator[None]:
    """Within the block a Hugging Face model unembeds its states at these (row, position) only: its logits are those
    of one row, [1, place, d_vocab]."""
    head = hf.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][places][None], *args[1:]))
    try:
        yield
    finally:
        head.remove()


def logits_at(
    model: Model,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None,
    places: tuple[Int[Tensor, " place"], Int[Tensor, " place"]],
) -> Float[Tensor, "place d_vocab"]:
    """The logits at these (row, position), differentiable; other states are not unembedded, unless something acts by
    position, as in `last_logits`.

    Raises:
        ValueError: more tokens than the model has positions.
    """
    if _whole(model):
        return model.logits(ids, mask)[places]
    _require_room(model, ids.shape[1])
    with unembedded(model.hf, places):
        return model.hf(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]


def last_logits(
    model: Model, ids: Int[Tensor, "batch pos"], positions: int
) -> Float[Tensor, "batch positions d_vocab"]:
    """The logits of the last positions of each row; those before are not unembedded.

    Where something reads or changes logits by position (a hook at the unembedding, a ban of answers, a prefix, models
    that answer together) all positions are computed, so that it sees what it always sees. Hooks at layers see whole
    rows either way.

    Raises:
        ValueError: more tokens than the model has positions.
    """
    if _whole(model):
        return model.logits(ids)[:, -positions:]
    _require_room(model, ids.shape[1])
    return model.hf(input_ids=ids, use_cache=False, **_keep(model, positions)).logits[:, -positions:]


def next_logits(
    model: Model, ids: Int[Tensor, "batch pos"], cache: Any = None
) -> tuple[Float[Tensor, "batch d_vocab"], Any]:
    """Logits of the token behind each row, and the cache of keys and values for the step after.

    Only for a model that keeps its prefix so (`Model.keeps_prefix`) and on which nothing is in force: a cache keeps
    what earlier, shorter rows made of their positions.

    Args:
        cache: what the step before gave, for rows that have one token less; None reads whole rows.

    Raises:
        ValueError: more tokens than the model has positions.
    """
    _require_room(model, ids.shape[1])
    new = ids if cache is None else ids[:, -1:]
    made = model.hf(input_ids=new, past_key_values=cache, use_cache=True, **_keep(model, 1))
    return made.logits[:, -1], made.past_key_values
