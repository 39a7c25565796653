"""Activations of prompts at chosen sites and positions, in memory or streamed to disk.

What is in memory at any time: the weights, one batch of at most `max_tokens` tokens on its way through the layers
up to the last site that was asked for (the layers above it, the final norm and the unembedding never run), the
chosen positions of that batch, and, with a folder, the chosen positions of the shard being filled. Without a folder
the store holds all chosen positions and nothing else.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.files import claim, replacing
from mech_unlearn.model.bridge import Model, require_positions
from mech_unlearn.model.tokens import buckets

Place = Site | str
At = str | Sequence[int] | Sequence[Sequence[int]]
"""All positions ("all"), those of `ordinary_positions` ("ordinary"), the last one ("last"), one position per prompt, or
several positions per prompt."""


class _Stop(Exception):
    """Ends a forward pass whose remaining layers nobody asked for."""


@dataclass(frozen=True, eq=False)
class States:
    """Activations of some (prompt, position) pairs at every site, one row per pair."""

    index: Int[Tensor, "state 2"]
    """Prompt and position (in the unpadded prompt) of each row."""
    at: Mapping[Place, Tensor]
    """Site -> [state, d] on the CPU."""


def ordinary_positions(model: Model, rows: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Positions of each row that hold no special token, and never the first.

    The state of whatever token stands first is an attention sink of many times the norm of others, BOS or not: no
    mean, key, scale or SAE should be judged by it. Source: massive activations, arXiv 2402.17762.
    """
    special = set(model.tokenizer.all_special_ids)
    return [tuple(i for i, token in enumerate(row) if i > 0 and token not in special) for row in rows]


def _positions(model: Model, prompts: Sequence[Sequence[int]], at: At) -> Sequence[tuple[int, ...]]:
    if at == "ordinary":
        return ordinary_positions(model, prompts)
    if at == "all":
        return [tuple(range(len(row))) for row in prompts]
    if at == "last":
        return [(len(row) - 1,) for row in prompts]
    if isinstance(at, str):
        raise ValueError(f"at={at!r}: choose 'all', 'ordinary', 'last' or give the positions of each prompt")
    if len(at) != len(prompts):
        raise ValueError(f"at names the positions of {len(at)} prompts, but there are {len(prompts)}")
    chosen = [(p,) if isinstance(p, int) else tuple(p) for p in at]
    for i, (row, places) in enumerate(zip(prompts, chosen, strict=True)):
        if not all(0 <= p < len(row) for p in places):
            raise ValueError(f"prompt {i} has positions 0..{len(row) - 1}, asked for {places}")
    return chosen


def _check(model: Model, prompts: Sequence[Sequence[int]], sites: Sequence[Place]) -> None:
    require_positions(model)
    if not sites:
        raise ValueError("no site to capture: name at least one")
    for site in sites:
        model.resolve(site)
    for i, row in enumerate(prompts):
        if len(row) == 0:
            raise ValueError(f"prompt {i} is empty: it has no tokens")


@torch.no_grad()
def _run(model: Model, ids: Tensor, index: Tensor, sites: Sequence[Place]) -> dict[Place, Tensor]:
    """One forward pass that ends at the last site; `index` [state, 2] are row and position of what is kept."""
    kept: dict[Place, Tensor] = {}
    # Interventions of an edit in force may sit above the last site and must see every forward pass.
    early = not model.in_force.interventions

    def keep(site: Place):
        def read(x: Tensor) -> None:
            if x.shape[:2] != ids.shape:
                raise ValueError(
                    f"{site!s} has shape {tuple(x.shape)}, not one state per position: no state to capture"
                )
            kept[site] = x[index[:, 0], index[:, 1]].cpu()
            if early and len(kept) == len(sites):
                raise _Stop

        return read

    with model.hooks(*((site, keep(site)) for site in sites)), suppress(_Stop):
        model.logits(ids)
    return kept


def stream(
    model: Model, prompts: Sequence[Sequence[int]], sites: Sequence[Place], at: At = "all", *, max_tokens: int = 8192
) -> Iterator[States]:
    """States of one batch after the other, shortest prompts first; nothing but the batch is held.

    Args:
        prompts: rows of token ids, special tokens included (`prompts.encode(...).ids`).
        max_tokens: tokens of one batch at the most (a longer prompt is a batch of its own).

    Raises:
        KeyError: a site the model lacks. ValueError: an empty prompt or a position outside of its prompt.
    """
    sites = tuple(dict.fromkeys(sites))
    _check(model, prompts, sites)
    positions = _positions(model, prompts, at)
    for members in buckets(prompts, max_tokens):
        ids = torch.tensor([list(prompts[i]) for i in members], device=model.device)
        local = [(row, p) for row, i in enumerate(members) for p in positions[i]]
        if not local:
            continue
        index = torch.tensor(local, device=model.device)
        kept = _run(model, ids, index, sites)
        yield States(torch.stack([torch.tensor(members)[index[:, 0].cpu()], index[:, 1].cpu()], 1), kept)


def _gather(
    model: Model, prompts: Sequence[Sequence[int]], sites: Sequence[Place], at: Sequence[Sequence[int]],
    max_tokens: int, dtype: torch.dtype,
) -> States:  # fmt: skip
    """All states of some prompts, sorted by prompt and then as asked for."""
    parts = list(stream(model, prompts, sites, at, max_tokens=max_tokens))
    if not parts:
        raise ValueError("no position to capture: `at` names none in any prompt")
    index = torch.cat([part.index for part in parts])
    order = index[:, 0].argsort(stable=True)
    return States(index[order], {site: torch.cat([part.at[site] for part in parts])[order].to(dtype) for site in sites})


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """States of prompts at sites, in the order of the prompts; in memory, or on disk and read when asked for."""

    sites: tuple[Place, ...]
    held: States | None
    """All states, when they are in memory."""
    folder: Path | None
    """Where the shards lie, when they are on disk."""
    names: Mapping[Place, str]
    """Site -> its name in the shards."""

    def _files(self) -> list[Path]:
        assert self.folder is not None
        return sorted(self.folder.glob("[0-9]*.safetensors"))

    def _key(self, site: Place) -> str:
        if site not in self.names:
            raise KeyError(f"{site!s} was not captured; sites: {', '.join(map(str, self.sites))}")
        return self.names[site]

    def __getitem__(self, site: Place) -> Tensor:
        """All states of one site, [state, d]; from disk this reads that site only.

        Raises:
            KeyError: a site that was not captured.
        """
        key = self._key(site)
        return self.held.at[site] if self.held is not None else self._read(key)

    @property
    def index(self) -> Int[Tensor, "state 2"]:
        """Prompt and position of each state."""
        return self.held.index if self.held is not None else self._read("index")

    def _read(self, key: str) -> Tensor:
        from safetensors import safe_open

        parts = []
        for path in self._files():
            with safe_open(path, framework="pt") as file:
                parts.append(file.get_tensor(key))
        return torch.cat(parts)

    def shards(self) -> Iterator[States]:
        """One shard after the other; only one is in memory."""
        from safetensors.torch import load_file

        if self.held is not None:
            yield self.held
            return
        for path in self._files():
            tensors = load_file(path)
            yield States(tensors["index"], {site: tensors[key] for site, key in self.names.items()})


def capture(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sites: Sequence[Place],
    at: At = "all",
    *,
    folder: str | os.PathLike | None = None,
    max_tokens: int = 8192,
    shard_states: int = 65_536,
    dtype: torch.dtype | None = None,
) -> ActivationStore:
    """Activations of prompts at sites and positions: in memory, or streamed into a folder of safetensors shards.

    With a folder, one shard of about `shard_states` states is in memory at a time, each is written atomically, and a
    run that was interrupted goes on after the last finished shard.

    Args:
        prompts: rows of token ids, special tokens included (`prompts.encode(...).ids`).
        at: "all" positions, the "ordinary" ones, the "last" one, one position per prompt, or several per prompt.
        folder: a new or empty folder, or one that the same call began to fill.
        dtype: of what is kept; by default the model's.

    Raises:
        KeyError: a site the model lacks.
        ValueError: an empty prompt, a position outside of its prompt, or a folder made from another model, other
            prompts, positions or sites.
    """
    sites = tuple(dict.fromkeys(sites))
    _check(model, prompts, sites)
    positions = _positions(model, prompts, at)
    names = {site: model.resolve(site) for site in sites}
    keep = model.dtype if dtype is None else dtype
    if folder is None:
        return ActivationStore(sites, _gather(model, prompts, sites, positions, max_tokens, keep), None, names)
    cuts = _cuts(positions, shard_states)
    manifest = _manifest(model, prompts, positions, names, keep, cuts)
    root = claim(Path(folder), manifest)
    _fill(root, cuts, lambda a, b: _gather(model, prompts[a:b], sites, positions[a:b], max_tokens, keep), names)
    return ActivationStore(sites, None, root, names)


def _cuts(positions: Sequence[Sequence[int]], shard_states: int) -> list[tuple[int, int]]:
    """Runs [a, b) of prompts with `shard_states` states or a little more; prompts without a position join a run."""
    cuts, start, count = [], 0, 0
    for i, places in enumerate(positions):
        count += len(places)
        if count >= shard_states:
            cuts.append((start, i + 1))
            start, count = i + 1, 0
    if count:
        cuts.append((start, len(positions)))
    if not cuts:
        raise ValueError("no position to capture: `at` names none in any prompt")
    return cuts


def _manifest(
    model: Model, prompts: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], names: Mapping[Place, str],
    dtype: torch.dtype, cuts: Sequence[tuple[int, int]],
) -> dict:  # fmt: skip
    rows = json.dumps([[list(row), list(at)] for row, at in zip(prompts, positions, strict=True)])
    return {
        "format": "mech_unlearn.activations/1",
        "model": model.hash(),
        "interventions": model.in_force.digest(),
        "data": hashlib.sha256(rows.encode()).hexdigest(),
        "sites": list(names.values()),
        "dtype": str(dtype),
        "shards": [list(cut) for cut in cuts],
    }


def _fill(
    root: Path, cuts: Sequence[tuple[int, int]], gather: Callable[[int, int], States], names: Mapping[Place, str]
) -> None:
    """Compute and write the shards that are not there yet."""
    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    for number, (start, end) in enumerate(tqdm(cuts, desc="capture", unit="shard", disable=None)):
        path = root / f"{number:06d}.safetensors"
        if path.exists():
            continue
        states = gather(start, end)
        shift = torch.tensor([start, 0])
        tensors = {names[site]: x.contiguous() for site, x in states.at.items()}
        with replacing(path) as part:
            save_file({"index": states.index + shift, **tensors}, part)
