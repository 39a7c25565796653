"""Files that are read with the place of what is wrong or written whole, folders that are empty or ours, and hashes."""

import hashlib
import json
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def parse_json(text: str) -> Any:
    """The value of a JSON text; a key that stands twice in one object is refused.

    Raises:
        ValueError: not JSON, a key given twice, or nested too deep to read.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice!r} stands twice in one object")
    return found


def first_error(error: Any) -> str:
    """The first thing that pydantic has against some data, in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return (f"field {where!r}: " if where else "") + " ".join(first["msg"].split())


def read_json(file: Path) -> Any:
    """The value of a JSON file, plain or gzipped.

    Raises:
        ValueError: no such file, not UTF-8, or not JSON.
    """
    text = read_text(file)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None


def read_text(file: Path) -> str:
    """The text of a file, unpacked where it is gzipped, without a byte-order mark.

    Raises:
        ValueError: no such file, not UTF-8, or not gzip though its name ends in .gz.
    """
    import gzip
    import zlib

    try:
        data = file.read_bytes()
        packed = file.name.endswith(".gz") or data[:2] == b"\x1f\x8b"
        return (gzip.decompress(data) if packed else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error


def require_empty(path: str | os.PathLike) -> Path:
    """The folder as a Path if it can be written and is empty or absent.

    Raises:
        ValueError: a file, a folder with something in it, or a place that cannot be written.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output folder {str(folder)!r} exists and is not empty; name another or empty it")
    parent = folder if folder.exists() else next(p for p in folder.absolute().parents if p.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=parent))
    except OSError as error:
        raise ValueError(
            f"output folder {str(folder)!r} cannot be written: {error.strerror} in {str(parent)!r}"
        ) from error
    return folder


def read_tensors(path: str | os.PathLike, what: str) -> tuple[dict[str, str], dict[str, Any]]:
    """(Header, tensors by name) of a safetensors file.

    Raises:
        ValueError: it cannot be read; `what` is the file called.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{what} {os.fspath(path)!r} cannot be read: {error}") from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A new file to write, which takes the place of `path` when the block ends and is gone when it fails.

    No two writers share one, no link is followed, and its mode follows the umask, whoever writes it.
    """
    whole = Path(path)
    whole.parent.mkdir(parents=True, exist_ok=True)
    part = whole.with_name(f".{whole.stem}.{secrets.token_hex(4)}.partial{whole.suffix}")
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = part.stat().st_mode
    try:
        yield part
        part.chmod(mode)
        os.replace(part, whole)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def follow_umask(folder: Path) -> None:
    """Open the files of a folder to whom the umask allows: safetensors writes weights for their owner alone."""
    umask = os.umask(0o022)
    os.umask(umask)
    for file in folder.iterdir():
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~umask)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it is either whole or absent."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically; NaN and infinity become null, since JSON has neither."""
    write_atomic(path, json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if data == data and abs(data) != float("inf") else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


def files_hash(source: str | os.PathLike) -> str:
    """SHA-256 over names and contents of the files of a folder, or of one file; of a hub id, the id itself."""
    path = Path(source)
    if not path.exists():
        return str(source)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                for block in iter(lambda: stream.read(1 << 20), b""):
                    digest.update(block)
    return digest.hexdigest()


def claim(folder: Path, manifest: dict) -> Path:
    """The folder, with the manifest in it; refuses one that holds something else."""
    path = folder / "manifest.json"
    if path.exists():
        found = read_json(path)
        differ = [key for key in manifest if not isinstance(found, dict) or found.get(key) != manifest[key]]
        if differ:
            raise ValueError(
                f"folder {str(folder)!r} was made from something else ({', '.join(differ)} differ); name another"
            )
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder {str(folder)!r} exists, is not empty and has no manifest.json; name another")
    write_json(path, manifest)
    return folder


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder.

    Raises:
        ValueError: a link or `..` that leads out of the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{str(path)!r} leads out of {str(folder)!r}: put the file itself there")
    return path
