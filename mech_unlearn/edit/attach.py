"""Interventions in force: how each kind is hung onto a model, and taken off again.

A prefix moves every position behind it. Whoever reads or writes states by position would be misaligned, so while one
is in force no other hook may be on the model: `require_positions` refuses before work starts, and the forward pass
itself refuses hooks it finds. A cache is refused by every kind, since a later step would no longer see the subject.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mech_unlearn.edit.interventions import Ban, Intervention, Prefix, Tokens
from mech_unlearn.model.bridge import Model, require_positions


@contextmanager
def attached(interventions: Sequence[Intervention], model: Model) -> Iterator[None]:
    """Put interventions in force: each sees the activation and the token ids of the running forward pass.

    Raises:
        KeyError: a site the model lacks.
        RuntimeError: one that no forward pass reached although the block ended normally.
    """
    with ExitStack() as stack:
        stack.enter_context(_listed(interventions, model))
        for intervention in interventions:
            if isinstance(intervention, Prefix):
                stack.enter_context(_prefixed(intervention, model))
            if isinstance(intervention, Ban):
                stack.enter_context(_banned(intervention, model))
        stack.enter_context(_on_states([i for i in interventions if not isinstance(i, Prefix | Ban)], model))
        yield


@contextmanager
def _listed(interventions: Sequence[Intervention], model: Model) -> Iterator[None]:
    model.in_force.interventions.extend(interventions)
    try:
        yield
    finally:
        for intervention in interventions:
            model.in_force.interventions.remove(intervention)


@contextmanager
def _on_states(interventions: Sequence[Any], model: Model) -> Iterator[None]:
    if not interventions:
        yield
        return
    seen: dict[str, Tensor] = {}
    # The input embedding is given the ids that the layers see, after a prefix has been put in front.
    handle = model.hf.get_input_embeddings().register_forward_pre_hook(
        lambda _, args, kwargs: seen.__setitem__(
            "ids", args[0] if args else kwargs.get("input", kwargs.get("input_ids"))
        ),
        with_kwargs=True,
    )
    cacheless = model.hf.register_forward_pre_hook(_refuse_cache, with_kwargs=True)
    ours, before = model.in_force.own_hooks, model.in_force.handles()
    fresh: set[int] = set()
    try:
        with model.hooks(*((i.site, lambda x, i=i: i(x, seen["ids"])) for i in interventions)):
            fresh = model.in_force.handles() - before
            ours |= fresh
            yield
    finally:
        ours -= fresh
        handle.remove()
        cacheless.remove()


REMEDY = "generate with mech_unlearn.model.scores.greedy, or pass use_cache=False"


def _refuse_cache(_: Any, __: tuple, kwargs: dict[str, Any]) -> None:
    """A call that names no cache may make one on the way: it reads whole rows, and reading on from it is refused."""
    given = [name for name in ("past_key_values", "use_cache") if kwargs.get(name) not in (None, False)]
    if given:
        raise ValueError(f"an edit of activations needs whole rows of token ids, without {', '.join(given)}; {REMEDY}")


def _ids(args: tuple, kwargs: dict[str, Any], what: str) -> Int[Tensor, "batch pos"]:
    """The token ids of a call of the model that reads whole rows.

    Raises:
        ValueError: a cache or something else by which rows are not read whole.
    """
    given = {name for name, value in kwargs.items() if value is not None and value is not False}
    odd = given - {"input_ids", "attention_mask", "position_ids", "return_dict"}
    if odd or len(args) > 1:
        raise ValueError(
            f"{what} needs whole rows of token ids, without {', '.join(sorted(odd)) or 'more arguments'}; {REMEDY}"
        )
    ids = kwargs.get("input_ids", next(iter(args), None))
    if ids is None:
        raise ValueError(f"{what} needs input_ids")
    return ids


@contextmanager
def _banned(ban: Ban, model: Model) -> Iterator[None]:
    fired = [False]

    def lower(_: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        fired[0] = True
        output.logits = ban(output.logits, _ids(args, kwargs, "a ban of answers"))
        return output

    handle = model.hf.register_forward_hook(lower, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if not fired[0]:
        raise RuntimeError("hooks that never fired: ['logits']")


@contextmanager
def _prefixed(prefix: Prefix, model: Model) -> Iterator[None]:
    hf, fired = model.hf, [False]
    inner, own = hf.forward, model.in_force.forward_replaced

    def forward(*args: Any, **kwargs: Any) -> Any:
        fired[0] = True
        if hasattr(forward, "beneath") or model.in_force.layers_bypassed:  # without any layer no prompt is read
            return inner(*args, **kwargs)
        if model.in_force.foreign_hooks():
            require_positions(model)
        ids = _ids(args, kwargs, "an in-context edit")
        groups = prefix.chosen(ids)
        if list(groups) == [()]:
            return inner(*args, **kwargs)
        return _each(model, inner, groups, ids, kwargs, prefix.bos)

    object.__setattr__(hf, "forward", forward)
    try:
        yield
    finally:
        if hf.__dict__["forward"] is forward:
            _uncover(hf, inner, own)
        else:  # that of a later edit stands on it, and takes it off with itself
            forward.beneath = inner, own  # pyright: ignore[reportFunctionMemberAccess]
    if not fired[0]:
        raise RuntimeError("hooks that never fired: ['input']")


def _uncover(hf: Any, forward: Any, own: bool) -> None:
    """Give a model the forward pass beneath, its class's where it had none of its own, past those that were left."""
    while hasattr(forward, "beneath"):
        forward, own = forward.beneath
    if own:
        object.__setattr__(hf, "forward", forward)
    else:
        hf.__dict__.pop("forward")


def _each(
    model: Model, forward: Any, groups: dict[Tokens, list[int]], ids: Tensor, kwargs: dict[str, Any], bos: int | None
) -> Any:
    """One forward pass per prefix; the logits of the rows' own positions, in the rows' order."""
    limit, longest = model.n_ctx, max(map(len, groups))
    if limit is not None and ids.shape[1] + longest > limit:
        raise ValueError(f"a prompt of {ids.shape[1]} tokens behind {longest} of a prefix; {model.name!r} has {limit}")
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    logits, out = None, None
    for prefix, members in groups.items():
        rows = torch.tensor(members, device=ids.device)
        own = None if positions is None else positions.expand(len(ids), -1)[rows]
        given = extended(prefix, ids[rows], None if mask is None else mask[rows], own, bos)
        out = forward(**given, use_cache=False)
        if logits is None:
            logits = out.logits.new_zeros(*ids.shape, out.logits.shape[-1])
        logits = logits.index_copy(0, rows, out.logits[:, -ids.shape[1] :])
    assert out is not None
    out.logits = logits
    return out


def extended(
    prefix: Tokens,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None = None,
    positions: Int[Tensor, "batch pos"] | None = None,
    bos: int | None = None,
) -> dict[str, Tensor]:
    """The arguments of a forward pass with a prefix in front of the first real token of each row, behind its BOS.

    Rows may be padded on either side; the prefix stands next to the prompt, never in front of the padding. The last
    `pos` positions of the result are those of the row: the last prefix token stands for BOS, and predicts what BOS did.

    Raises:
        ValueError: a mask that is not [batch, pos].
    """
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"an in-context edit takes a mask [batch, pos], got {tuple(mask.shape)}")
    n, width = len(prefix), ids.shape[1]
    first = torch.zeros(len(ids), dtype=torch.long, device=ids.device) if mask is None else mask.long().argmax(1)
    if bos is not None:
        first = first + (ids.gather(1, first[:, None])[:, 0] == bos)
    column = torch.arange(width + n, device=ids.device).expand(len(ids), -1)
    offset = column - first[:, None]
    inside = (offset >= 0) & (offset < n)
    source = torch.where(offset < 0, column, (column - n).clamp(min=0))
    inserted = torch.tensor([*prefix, 0], device=ids.device)[offset.clamp(0, n)]
    out = {"input_ids": torch.where(inside, inserted, ids.gather(1, source))}
    if mask is not None:
        out["attention_mask"] = torch.where(inside, torch.ones_like(column), mask.gather(1, source).to(column))
    if positions is not None:
        start = (positions.gather(1, first.clamp(max=width - 1)[:, None]) + (first == width)[:, None]).to(column)
        later = positions.gather(1, source) + torch.where(offset >= n, n, 0)
        out["position_ids"] = torch.where(inside, start + offset, later)
    return out
