"""What each restoration test gives back: a number per fact, and what it was computed from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import as_table
from mech_unlearn.core import Fact

Grade = Literal["A", "B", "C"]


def _number(x: float) -> float | None:
    return None if x != x or x in (float("inf"), float("-inf")) else x


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """One test on one model: a number per fact, and what it was computed from. NaN where undefined."""

    test: str
    model_id: str
    facts: tuple[Fact, ...]
    recoverability: Float[Tensor, " fact"]
    """0 = like a model that never saw the fact, 1 = like the full model. The number that a verdict reads."""
    score_raw: Float[Tensor, " fact"]
    """The test's own score, in the unit of its file's docstring."""
    score_full: Float[Tensor, " fact"]
    score_retrained: Float[Tensor, "retrained fact"]
    """Per retrained model; with none, one row of sham scores."""
    null: Float[Tensor, "heldout fact"]
    """Recoverability of each retrained model against the other ones: what this test says of models that never knew.
    No rows with fewer than two retrained models."""
    grade: Grade
    n_paraphrases: int
    seed: int
    cost_fe: float
    """Forward passes of one prompt per fact, a backward pass counted as two."""
    layer: int | None = None
    alpha: float | None = None
    kappa: Float[Tensor, " fact"] | None = None
    rho: Float[Tensor, " fact"] | None = None
    p_null: Float[Tensor, " fact"] | None = None
    flags: tuple[tuple[str, ...], ...] = ()
    columns: Mapping[str, Float[Tensor, " fact"]] = field(default_factory=dict)
    """Further numbers per fact, by name."""
    curves: Mapping[str, Float[Tensor, "point fact"]] = field(default_factory=dict)
    """Numbers per layer, strength or step, and fact; `curve_axes` names the points."""
    curve_axes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        mean = self.recoverability.nanmean().item()
        return f"Result({self.test!r} of {self.model_id!r}, {len(self.facts)} facts, recovered {mean:.2f} on average)"

    def _repr_html_(self) -> str:
        """Fact by fact what the test recovers, for Jupyter."""
        rows = [
            (fact.id, f"{self.recoverability[i]:.2f}", f"{self.score_raw[i]:.3g}", ", ".join(self.flags_of(i)))
            for i, fact in enumerate(self.facts)
        ]
        return as_table(("fact", "recovered", "own score", "flags"), rows, repr(self))

    def flags_of(self, i: int) -> tuple[str, ...]:
        return self.flags[i] if self.flags else ()

    def records(self) -> list[dict[str, Any]]:
        """One JSON object per fact; None for what does not apply."""
        spread = self.score_retrained.std(0) if len(self.score_retrained) > 1 else None
        center = self.score_retrained.mean(0)

        def at(values: Tensor | None, i: int) -> float | None:
            return None if values is None else _number(values[i].item())

        return [
            {
                "test": self.test,
                "version": version("mech_unlearn"),
                "model_id": self.model_id,
                "fact_id": fact.id,
                "group": fact.group or fact.subject,
                "relation": fact.relation,
                "layer": self.layer,
                "alpha": self.alpha,
                "score_raw": at(self.score_raw, i),
                "score_F": at(self.score_full, i),
                "score_R_mean": at(center, i),
                "score_R_sd": at(spread, i),
                "kappa": at(self.kappa, i),
                "rho": at(self.rho, i),
                "p_null": at(self.p_null, i),
                "recoverability": at(self.recoverability, i),
                "n_paraphrases": self.n_paraphrases,
                "grade": self.grade,
                "flags": list(self.flags_of(i)),
                "cost_fe": self.cost_fe,
                "seed": self.seed,
                **{name: at(values, i) for name, values in self.columns.items()},
            }
            for i, fact in enumerate(self.facts)
        ]
