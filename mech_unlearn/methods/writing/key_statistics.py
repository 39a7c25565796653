"""Second moments of MLP keys, C = E[k k^T], of all layers in one pass; and a cache on disk for them.

A cached tensor is one safetensors file, named by what it is and by a hash of everything it depends on: weights,
activation interventions in force, token ids, layer, dtype. What is read back must say the same in its header and match
its own digest; a file that does not is named in a warning and computed anew. Writes are atomic.
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.edit.interventions import Tokens
from mech_unlearn.files import replacing
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import At, stream

FORMAT = "mech_unlearn.key_statistics/1"
CHUNK = 1024
"""Tokens whose products are summed in float32 before they join the float64 sum."""
BLOCKS = 8
"""Column blocks of a second moment; only those on and above the diagonal are computed."""


def second_moments(
    model: Model,
    rows: Sequence[Tokens],
    layers: Sequence[int],
    at: At = "ordinary",
    cache_dir: str | os.PathLike | None = None,
) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:
    """Uncentred second moment E[k k^T] of the MLP keys of each layer, mean over tokens, float64 on the model's device.

    One forward pass per batch serves all layers and ends at the deepest. Products of at most `CHUNK` tokens are summed
    in float32 (the keys' own precision), chunks in float64.

    Args:
        at: the "ordinary" tokens of each row, which leave out its first (see `ordinary_positions`), or only the "last".
        cache_dir: folder of the cache; layers found there cost no forward pass. None: no disk.

    Raises:
        ValueError: no rows, an empty row, or a position outside of its row. KeyError: a layer the model lacks.
    """
    if not rows:
        raise ValueError("no text to take key statistics from: give RetainSet.texts or retained facts")
    if cache_dir is None:
        return _moments(model, rows, layers, at)
    identity = {"model": model.state_hash(), "data": rows_hash(rows, at)}
    return cached(cache_dir, "moment", identity, layers, lambda missing: _moments(model, rows, missing, at), model)


def _moments(model: Model, rows: Sequence[Tokens], layers: Sequence[int], at: At) -> dict[int, Tensor]:
    sums: dict[int, Tensor] = {}
    count = 0
    for part in stream(model, rows, [Site(layer, "mlp_post") for layer in layers], at):
        count += len(part.index)
        for layer in layers:
            keys = part.at[Site(layer, "mlp_post")].to(model.device)
            if layer not in sums:
                sums[layer] = torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64, device=keys.device)
            add_products(sums[layer], keys)
    if not count:
        raise ValueError("no text of more than one token to take key statistics from: give longer RetainSet.texts")
    for total in sums.values():
        total.triu_().div_(count).add_(total.triu(1).T)
    return sums


def add_products(total: Float[Tensor, "width width"], keys: Float[Tensor, "token width"]) -> None:
    """Add the blocks on and above the diagonal of keys^T keys to `total`, in place; the others stay as they are."""
    size = -(-keys.shape[1] // BLOCKS)
    for some in keys.split(CHUNK):
        some = some.double() if some.dtype == torch.float64 else some.float()
        for start in range(0, keys.shape[1], size):
            total[start : start + size, start:] += some[:, start : start + size].T @ some[:, start:]


def damped(moment: Float[Tensor, "d_mlp d_mlp"], share: float) -> Float[Tensor, "d_mlp d_mlp"]:
    """C + share * tr(C) / d_mlp * I: a moment of fewer tokens than dimensions is singular, and so has no inverse.

    Raises:
        ValueError: a negative share.
    """
    if share < 0:
        raise ValueError(f"damping={share}: a share of the mean of C's diagonal, 0 or more")
    return moment + share * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def rows_hash(rows: Sequence[Tokens], at: At) -> str:
    """SHA-256 over token ids and positions, in their order."""
    return hashlib.sha256(json.dumps([list(map(list, rows)), at]).encode()).hexdigest()


def cached(
    folder: str | os.PathLike,
    what: str,
    identity: Mapping[str, str],
    layers: Sequence[int],
    compute: Callable[[list[int]], dict[int, Tensor]],
    model: Model,
) -> dict[int, Tensor]:
    """One float64 tensor per layer: from the folder where it is there and sound, else computed, in one call, and kept.

    Args:
        what: word that the file names begin with.
        identity: everything but the layer that the tensors depend on.

    Raises:
        ValueError: a folder that cannot be made or written.
    """
    root = Path(folder)
    headers = {layer: {"format": FORMAT, "what": what, "layer": str(layer), **identity} for layer in layers}
    paths = {layer: root / _file_name(header) for layer, header in headers.items()}
    found = {layer: tensor for layer in layers if (tensor := _read(paths[layer], headers[layer])) is not None}
    missing = [layer for layer in layers if layer not in found]
    if missing:
        try:
            root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=root).close()
        except OSError as error:
            raise ValueError(f"cache_dir {str(root)!r} cannot be written: {error.strerror}; name another") from error
    for layer, tensor in (compute(missing) if missing else {}).items():
        _write(paths[layer], headers[layer], tensor)
        found[layer] = tensor
    return {layer: found[layer].to(model.device) for layer in layers}


def _file_name(header: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(header.items()))).encode()).hexdigest()[:20]
    return f"{header['what']}-L{header['layer']}-{digest}.safetensors"


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().cpu().numpy().tobytes()).hexdigest()


def _write(path: Path, header: Mapping[str, str], tensor: Tensor) -> None:
    from safetensors.torch import save_file

    held = tensor.detach().double().cpu().contiguous()
    with replacing(path) as part:
        save_file({"values": held}, part, metadata={**header, "sha256": _digest(held)})


def _read(path: Path, header: Mapping[str, str]) -> Tensor | None:
    """The tensor of a sound file; None, and a warning that names it, where the file is damaged or of other origin."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            said, tensor = file.metadata() or {}, file.get_tensor("values")
        sound = said == {**header, "sha256": _digest(tensor)}
    except (OSError, SafetensorError):
        sound, tensor = False, None
    if not sound:
        warnings.warn(f"{str(path)!r} is damaged or stale: computed anew", stacklevel=4)
        return None
    return tensor
