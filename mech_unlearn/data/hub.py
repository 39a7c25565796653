"""Datasets of the hub: over the network, or from a folder that is a snapshot of one.

Of a snapshot are read `CONFIG/SPLIT-00000-of-00003.parquet` and `CONFIG/SPLIT.parquet`; the default configuration lies
in `data/`, in `default/` or in the folder itself. Source: how the library `datasets` lays out what it pushes to the hub
(huggingface.co/docs/hub/datasets-file-names-and-splits).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SHARD = re.compile(r"(?P<split>.+?)(-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]{8,})?)?\.parquet")


def shards(root: Path, config: str | None, split: str) -> tuple[Path, ...]:
    """The files of one split in the order of its rows; empty where the folder has no such split.

    Args:
        config: None for the default configuration.

    Raises:
        ValueError: a shard that is missing, or that is there twice.
    """
    places = [root / "data", root / "default", root] if config in (None, "default") else [root / str(config)]
    for place in places:
        if found := _by_split(place).get(split):
            return _complete(place, split, found)
    return ()


def _by_split(place: Path) -> dict[str, list[tuple[int, int, Path]]]:
    """Split -> (number, count, file) of each of its shards, as the names say."""
    found: dict[str, list[tuple[int, int, Path]]] = {}
    for file in sorted(place.glob("*.parquet")) if place.is_dir() else ():
        if match := _SHARD.fullmatch(file.name):
            shard = (int(match["number"] or 0), int(match["count"] or 1), file)
            found.setdefault(match["split"], []).append(shard)
    return found


def _complete(place: Path, split: str, found: list[tuple[int, int, Path]]) -> tuple[Path, ...]:
    found = sorted(found)
    count = found[0][1]
    if {other for _, other, _ in found} != {count} or len({number for number, *_ in found}) < len(found):
        names = ", ".join(file.name for *_, file in found)
        raise ValueError(f"folder {str(place)!r} holds two versions of split {split!r}: {names}; keep one")
    missing = sorted(set(range(count)) - {number for number, *_ in found})
    if missing:
        name = f"{split}-{missing[0]:05d}-of-{count:05d}.parquet"
        raise ValueError(f"folder {str(place)!r} lacks {name}; split {split!r} has {count} files, fetch them all")
    return tuple(file for *_, file in found)


def held(root: Path) -> list[str]:
    """`CONFIG/SPLIT` of each split in the folders of a snapshot; those in the folder itself are files like others."""
    return sorted(f"{place.name}/{split}" for place in root.iterdir() if place.is_dir() for split in _by_split(place))


def from_hub(source: str, config: str | None, split: str) -> Sequence[Any]:
    """The rows of one split, through the library `datasets`.

    Raises:
        ValueError: the library is not installed, or the dataset, configuration or split is not to be had.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"reading {source!r} from the hub needs the package datasets: pip install datasets") from error
    try:
        return list(load_dataset(source, config, split=split))
    except Exception as error:  # of many kinds: network, unknown id, unknown configuration
        reason = f"{config!r} of the hub dataset cannot be read: {reason_of(error)}"
        raise ValueError(f"no folder {source!r}, and {reason}") from error


def reason_of(error: Exception) -> str:
    """An error of another library in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
