"""RRome: ROME with one and the same key in both places of its update, so that no edit explodes.

Paper:    Gupta et al. 2024, Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing,
          arXiv 2403.07175; the rest as in ROME, arXiv 2202.05262.
Changes:  the MLP output matrix of one layer; rank at most one per name (and alias).
Needs:    what `Rome` needs.
Differs:  as `Rome` does.
Fails:    the value is reached at the averaged key and only nearly at the key of one phrasing; else as `Rome`.
"""

from dataclasses import dataclass

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit import Edit
from mech_unlearn.methods.protect import PARTS, Part
from mech_unlearn.methods.rewriting import Optimize
from mech_unlearn.methods.rome import Projection, rank_one_edit
from mech_unlearn.model import Model


@dataclass(frozen=True, kw_only=True)
class RRome:
    """Settings of the edit, as those of `Rome`; `fit` computes it."""

    layer: int | None = None
    """Layer whose MLP output matrix is written; by default a third of the depth, see `Rome.layer`."""
    optimize: Optimize = Optimize()
    """How the values are found."""
    project: Projection = "none"
    """"null_space": the write is confined to directions that retained keys hardly use, as in AlphaEdit."""
    energy: float = 0.1
    """For "null_space": see `Rocr.energy`."""
    damping: float = 1e-4
    """Added to C's diagonal, as a share of its mean."""
    protect: tuple[Part, ...] = PARTS
    """What C, or the null space, is taken from; see `Rocr.protect`."""
    cache_dir: str | None = None
    """Folder that keeps the key statistics for the next time; None: no disk."""
    seed: int = 0
    """Draws prefixes and unknown entities."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Edit:
        """The edit of the forget set's names.

        Raises:
            ValueError: as `Rome.fit`.
        """
        return rank_one_edit("r_rome", self, model, forget, retain, same_key=True)
