"""The suffix sweep: what many patches of one prompt do, each computed only from where it begins.

A patch at layer l and position t changes nothing below l and nothing before t. So the model is run once (`record`);
a patched row then joins the batch at its first layer, over the positions from its first one on, with the recorded keys
and values in front of it. All patches share each layer's call, and the batch grows on the way up. Rows depend on
themselves only, so one backward pass of the summed outputs gives every row's gradient.

Exact, and blind to architecture: each decoder layer is called again with what the model itself gave it (masks, rotary
angles, positions), only with other hidden states. The locators and restoration tests that patch states stand on this
file; it is over 300 lines because recording and replaying have to agree on every argument.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.bridge import Write as Hook
from mech_unlearn.model.readout import bypassed

Write = Callable[[Tensor, int], Tensor]
"""(activation [row, pos, ...], first position) -> its replacement: x[:, p - first] belongs to position p."""


@dataclass(frozen=True, eq=False)
class _OfRows:
    """An argument that has entries for each row: masks, ALiBi slopes of each head, inputs that depend on the tokens."""

    entries: Tensor
    """[row, entry, ...]; one row where all rows have the same."""

    def of(self, rows: Int[Tensor, " n"]) -> Tensor:
        """The argument of some rows, [n * entry, ...]."""
        same = len(self.entries) == 1
        return (self.entries.expand(len(rows), *self.entries.shape[1:]) if same else self.entries[rows]).flatten(0, 1)


def _by_row(value: Any, longer: Any, n: int) -> Any:
    """An argument given for n rows; `longer` is the same for one row more: what grows has entries for each row."""
    if isinstance(value, tuple):
        return tuple(_by_row(part, more, n) for part, more in zip(value, longer, strict=True))
    if not isinstance(value, Tensor) or value.shape == longer.shape:
        return value
    entries = value.unflatten(0, (n, -1))
    return _OfRows(entries[:1] if (entries == entries[:1]).all() else entries)


@dataclass(frozen=True, eq=False)
class _Call:
    """What the model gave one decoder layer beside the hidden states, for all recorded rows."""

    args: tuple
    kwargs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Recording:
    """One run of rows of equal length: enough to leave it at any layer and position."""

    model: Model
    ids: Int[Tensor, "row pos"]
    resid: Float[Tensor, "layer_or_end row pos d_model"]
    """The residual stream before each layer, and after the last one."""
    kept: dict[Site, Tensor]
    """Further activations that were asked for, [row, pos, ...]."""
    cache: tuple[tuple[Tensor, Tensor], ...] | None
    """Keys and values of each layer, [row, head, pos, d_head]; None if prefixes are to be recomputed."""
    calls: dict[int, list[_Call]] = field(default_factory=dict, repr=False)
    """First position -> what each layer was given; filled when it is first needed."""

    @property
    def width(self) -> int:
        """Positions of a row."""
        return self.ids.shape[1]

    def state(self, site: Site) -> Tensor:
        """A recorded activation, [row, pos, ...].

        Raises:
            KeyError: one that was not kept.
        """
        if site.kind in ("resid_pre", "resid_post"):
            return self.resid[site.layer + (site.kind == "resid_post")]
        if site not in self.kept:
            raise KeyError(f"{site} was not recorded; ask for it with record(..., keep=[{site!r}])")
        return self.kept[site]


@dataclass(frozen=True, eq=False)
class Patch:
    """Copies of recorded rows with activations written over on their way up."""

    rows: Int[Tensor, " n"]
    """The recorded row that each copy continues."""
    writes: tuple[tuple[Site, Write], ...]
    """Site -> what is written there. Positions before `first` are beyond its reach."""
    first: int = 0
    """The first position that changes; those before it are taken from the recording."""

    @property
    def start(self) -> int:
        """The first layer that has to be run again; n_layers if only the last layer's output is written."""
        return min(site.layer + (site.kind == "resid_post") for site, _ in self.writes)


def put(at: Int[Tensor, "n *k"], values: Tensor, part: Tensor | None = None) -> Write:
    """A write of values into positions of each row: `at` [n] with values [n, ...], or `at` [n, k] with [n, k, ...].

    Args:
        part: only these entries of the activation's next axis (heads of `z`, neurons of `mlp_post`), one index per
            row or one for all; the values then have the shape of one such entry.
    """

    lowest = int(at.min())

    def write(x: Tensor, first: int) -> Tensor:
        if lowest < first:
            raise ValueError(f"a write at position {lowest}, but the rows are run from position {first} on")
        x = x.clone()
        row = torch.arange(len(x), device=x.device).view(-1, *[1] * (at.ndim - 1))
        if part is None:
            x[row, at - first] = values.to(x)
        else:
            x[row, at - first, part] = values.to(x)
        return x

    return write


class _Prefix:
    """Stands where the model expects its cache: puts the recorded keys and values in front of new ones."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)

    def get_seq_length(self, *_: Any) -> int:
        return self.keys.shape[2]


def _is_cache(x: Any) -> bool:
    from transformers.cache_utils import Cache

    return isinstance(x, Cache)


def refuse_interventions(model: Model) -> None:
    """Raise where activation interventions are in force: layers called one by one would miss them.

    Raises:
        ValueError: an edit with interventions is on.
    """
    if model.in_force.interventions:
        raise ValueError(
            f"an edit with activation interventions is in force on {model.name!r}: patching calls the layers one by "
            "one; leave the edit, or use its weight form"
        )


class _Stop(Exception):
    """Ends a forward pass after the last decoder layer."""


def _run_layers(model: Model, ids: Tensor, store: Any) -> None:
    """The decoder layers of a forward pass, without final norm and unembedding."""

    def stop(*_: Any) -> None:
        raise _Stop

    handle = model.bridge.blocks[model.n_layers - 1].register_forward_hook(stop)
    try:
        with suppress(_Stop):
            model.hf(input_ids=ids, past_key_values=store, use_cache=store is not None)
    finally:
        handle.remove()


@torch.no_grad()
def record(
    model: Model,
    ids: Int[Tensor, "row pos"],
    *,
    writes: Sequence[tuple[str | Site, Hook]] = (),
    keep: Sequence[Site] = (),
    cache: bool = True,
) -> Recording:
    """Run rows once and keep what patches need: the residual stream, keys and values, and the sites in `keep`.

    Args:
        writes: interventions of this run, for example noise on `hook_embed` for a corrupted run.
        cache: keep keys and values, so that positions before a patch are never run again; not done for a model
            that does not keep its prefix so. Results agree.

    Raises:
        KeyError: an unknown site. ValueError: interventions of an edit are in force, or layers share keys and values.
    """
    from transformers import DynamicCache

    refuse_interventions(model)
    if getattr(model.hf.config, "num_kv_shared_layers", None):
        raise ValueError(
            f"layers of {model.name!r} ({type(model.hf).__name__}) read keys and values of others: they cannot be run "
            "one by one; use logit_lens or methods that train"
        )
    ids = ids.to(model.device)
    resid: list[Tensor] = []
    kept: dict[Site, Tensor] = {}
    last = Site(model.n_layers - 1, "resid_post")
    reads: list[tuple[str | Site, Hook]] = [
        (Site(layer, "resid_pre"), lambda x: resid.append(x)) for layer in range(model.n_layers)
    ]
    reads += [(site, lambda x, site=site: kept.__setitem__(site, x)) for site in dict.fromkeys(keep)]
    store: Any = DynamicCache() if cache and model.keeps_prefix else None
    with model.hooks(*writes, *reads, (last, lambda x: resid.append(x))):
        _run_layers(model, ids, store)
    pairs = None if store is None else tuple((layer.keys, layer.values) for layer in store.layers)
    return Recording(model, ids, torch.stack(resid), kept, pairs)


@torch.no_grad()
def _calls(recording: Recording, first: int) -> list[_Call]:
    """What each layer is given when the recorded rows are run from position `first` on."""
    if first not in recording.calls:
        ids, n = recording.ids, len(recording.ids)
        given, more = (_given(recording, rows[:, first:], first) for rows in (ids, torch.cat([ids, ids[:1]])))
        recording.calls[first] = [
            _Call(_by_row(a.args, b.args, n), {key: _by_row(x, b.kwargs[key], n) for key, x in a.kwargs.items()})
            for a, b in zip(given, more, strict=True)
        ]
    return recording.calls[first]


def _given(recording: Recording, ids: Int[Tensor, "row pos"], first: int) -> list[_Call]:
    """What the model gives its layers, none of which runs."""
    from transformers import DynamicCache

    model, found = recording.model, []
    store = None if recording.cache is None else DynamicCache()
    if store is not None and first:
        for layer, (keys, values) in enumerate(recording.cache or ()):
            store.update(keys[:1, :, :first], values[:1, :, :first], layer)

    def keep(_: int, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        found.append(_Call(args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
        if len(found) == model.n_layers:
            raise _Stop
        return args[0] if args else kwargs["hidden_states"]

    with bypassed(model, keep), suppress(_Stop):
        model.hf(input_ids=ids, past_key_values=store, use_cache=store is not None)
    return found


@dataclass(frozen=True, eq=False)
class _Member:
    """A patch that is on its way up, and its rows [a, b) of the batch."""

    patch: Patch
    a: int
    b: int


def _written(x: Tensor, site: Site, members: Sequence[_Member], first: int) -> Tensor:
    """x with all writes at a site; x itself where there is none."""
    pieces, at = [], 0
    for member in members:
        for write in (write for place, write in member.patch.writes if place == site):
            if pieces and at > member.a:  # a second write of the same patch at the same site
                pieces[-1] = write(pieces[-1], first)
                continue
            pieces += [x[at : member.a], write(x[member.a : member.b], first)]
            at = member.b
    if not pieces:
        return x
    return torch.cat([piece for piece in (*pieces, x[at:]) if len(piece)])


def _block(recording: Recording, layer: int, x: Tensor, rows: Tensor, members: Sequence[_Member], first: int) -> Tensor:
    """One decoder layer over the batch, with the writes inside of it."""
    call = _calls(recording, first)[layer]
    prefix: Any = None
    if recording.cache is not None:
        keys, values = recording.cache[layer]
        prefix = _Prefix(keys[rows, :, :first], values[rows, :, :first])

    def given(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(given(part) for part in value)
        return value.of(rows) if isinstance(value, _OfRows) else prefix if _is_cache(value) else value

    args = [given(value) for value in call.args]
    kwargs = {key: given(value) for key, value in call.kwargs.items()}
    inner = {
        site
        for member in members
        for site, _ in member.patch.writes
        if site.layer == layer and site.kind not in ("resid_pre", "resid_post")
    }
    hooks = [(site, lambda x, site=site: _written(x, site, members, first)) for site in sorted(inner)]
    with recording.model.hooks(*hooks):
        out = recording.model.bridge.blocks[layer](x, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def _climb(
    recording: Recording, patches: Sequence[Patch], first: int, read: Int[Tensor, " read"]
) -> list[Float[Tensor, "n read d_model"]]:
    """The final states of patches that share their first position, from one pass upwards."""
    n_layers = recording.model.n_layers
    members: list[_Member] = []
    waiting = sorted(range(len(patches)), key=lambda i: patches[i].start)
    order: list[int] = []
    x = recording.resid.new_empty(0, recording.width - first, recording.model.d_model)
    rows = recording.ids.new_empty(0)
    for layer in range(n_layers + 1):
        # `x` is the batch after layer - 1; patches whose first layer is this one join now
        x = _written(x, Site(layer - 1, "resid_post"), members, first) if layer else x
        joining = []
        while waiting and patches[waiting[0]].start == layer:
            order.append(waiting.pop(0))
            patch = patches[order[-1]]
            at = members[-1].b if members else 0
            members.append(_Member(patch, at, at + len(patch.rows)))
            state = recording.resid[layer][patch.rows, first:]
            own = _Member(patch, 0, len(patch.rows))
            joining.append(_written(state, Site(layer - 1, "resid_post"), [own], first) if layer else state)
            rows = torch.cat([rows, patch.rows])
        x = torch.cat([x, *joining]) if joining else x
        if layer == n_layers or not members:
            continue
        x = _written(x, Site(layer, "resid_pre"), members, first)
        x = _block(recording, layer, x, rows, members, first)
    final = x[:, read - first]
    by_patch = {i: final[member.a : member.b] for i, member in zip(order, members, strict=True)}
    return [by_patch[i] for i in range(len(patches))]


def _groups(recording: Recording, patches: Sequence[Patch], max_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """(First position, indices of patches that climb together), under a bound on tokens."""
    by_first: dict[int, list[int]] = {}
    for i, patch in enumerate(patches):
        by_first.setdefault(patch.first if recording.cache is not None else 0, []).append(i)
    for first, members in sorted(by_first.items()):
        chosen: list[int] = []
        tokens = 0
        for i in members:
            size = len(patches[i].rows) * (recording.width - first)
            if chosen and tokens + size > max_tokens:
                yield first, chosen
                chosen, tokens = [], 0
            chosen.append(i)
            tokens += size
        yield first, chosen


def sweep(
    recording: Recording, patches: Sequence[Patch], read: Sequence[int], *, max_tokens: int = 32_768
) -> list[Float[Tensor, "n read d_model"]]:
    """The residual stream after the last layer, at the positions `read`, of each patch's rows.

    Gradients flow to what the writes put in, unless the caller turned them off. Read logits off with
    `readout.readout`.

    Args:
        read: positions at or after the first position of every patch.
        max_tokens: tokens that climb together at the most (one patch is never split); bounds memory.

    Raises:
        KeyError: a write at a site that the model lacks.
        ValueError: a patch without a write or that begins after a position that is read.
    """
    refuse_interventions(recording.model)
    for patch in patches:
        if not patch.writes:
            raise ValueError("a patch without a write: there is nothing to sweep")
        for site, _ in patch.writes:
            recording.model.resolve(site)
        if not 0 <= patch.first <= min(read, default=0) or max(read) >= recording.width:
            raise ValueError(f"positions {list(read)} are read, but the patch begins at {patch.first}")
    out: list[Tensor] = [recording.resid.new_empty(0)] * len(patches)
    where = torch.tensor(list(read), device=recording.ids.device)
    for first, members in _groups(recording, patches, max_tokens):
        for i, states in zip(members, _climb(recording, [patches[i] for i in members], first, where), strict=True):
            out[i] = states
    return out
