"""Small worlds where the truth is known: facts, the recipe, and trained models that come with the package.

`open_world("biographies")` gives facts and checkpoints: `full` saw everything, `retrained` continued the same base by
the same recipe and never saw the forget group. Build one anew with `mech_unlearn.testbed.build.build`.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.testbed.biographies import biographies
from mech_unlearn.testbed.corpus import Spec, constant_guess_shares
from mech_unlearn.testbed.wikidata import wikidata

WORLDS: dict[str, Callable[[], Spec]] = {"biographies": biographies, "wikidata": wikidata}
SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True, kw_only=True)
class World:
    """A world with its trained models."""

    name: str
    folder: Path
    forget: ForgetSet
    retain: RetainSet
    """neighbors: all kept facts; unknown: names of whom nothing is told; texts: held-out sentences and mentions."""
    full: Path
    retrained: tuple[Path, ...]
    """The base of `full` continued without the forget group, one per data-order seed."""
    saes: Path | None
    """Folder with one SAE of `full` per layer (`L1`, `L2`: resid_post), or None if none was trained."""
    heldout_shown: tuple[str, ...]
    """Kept subjects for whom the held-out phrasings were part of the training text; never a forgotten one."""
    chance: dict[str, float]
    """Relation -> share of its most frequent object among the kept facts: what a constant guess can reach."""

    @property
    def sae(self) -> Path:
        """The SAE of the highest layer, the last before the facts leave the subject.

        Raises:
            ValueError: the world has no SAE.
        """
        if self.saes is None:
            raise ValueError(f"world {self.name!r} in {str(self.folder)!r} has no SAE; build its stage `saes`")
        return max(path for path in self.saes.iterdir() if path.name.startswith("L"))


def spec(name: str) -> Spec:
    """The facts and texts of a world, without any model.

    Raises:
        ValueError: no such world.
    """
    if name not in WORLDS:
        raise ValueError(f"no world {name!r}; choose from {', '.join(WORLDS)}")
    return WORLDS[name]()


def open_world(source: str | os.PathLike) -> World:
    """The world of a name, as shipped, or of a folder that `build` has written.

    Raises:
        ValueError: neither a name nor such a folder, or no full model in it yet.
    """
    folder = SHIPPED / source if source in WORLDS else Path(source)
    if not (folder / "world.json").is_file():
        raise ValueError(f"no world {os.fspath(source)!r}; give {' or '.join(WORLDS)}, or a folder made by build")
    name = json.loads((folder / "world.json").read_text(encoding="utf-8"))["world"]
    if not (folder / "full" / "config.json").is_file():
        raise ValueError(f"world {str(folder)!r} has no full model yet; run build on the same folder to go on")
    made = spec(name)
    saes = folder / "saes"
    return World(
        name=name,
        folder=folder,
        forget=made.forget,
        retain=made.retain,
        full=folder / "full",
        retrained=tuple(sorted(path.parent for path in folder.glob("retrained_*/config.json"))),
        saes=saes if saes.is_dir() else None,
        heldout_shown=made.heldout_shown,
        chance=constant_guess_shares(made),
    )
