"""What tests that do something to a model and score it again share: how much of the fact came back by it.

An *operator* (a prompt, rounding, training, states written in) is applied to the audited and to each retrained model.
What it gives to the retrained ones it injects; only what the audited model gains beyond that came back (difference in
differences, `normalise.rho`). Without retrained models sham facts of the audited model stand in for them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.model.bridge import Model
from mech_unlearn.restoration.engine.case import Case, make_result
from mech_unlearn.restoration.engine.levels import Levels
from mech_unlearn.restoration.engine.normalise import relation_mean
from mech_unlearn.verdict.result import Result

Operator = Callable[[Model], Float[Tensor, "*point kind fact"]]
"""A model's margins under the operator, in nats, at each of its points (steps, layers, settings)."""


def margins_after(
    case: Case, operator: Operator, shape: Sequence[int] | None = None
) -> Float[Tensor, "retrained *point fact"]:
    """The retrained models' margins under the operator; without any, no rows of the given shape (default: of facts)."""
    found = [operator(model)[..., 0, :] for model in case.retrained]
    return torch.stack(found) if found else torch.zeros(0, *(shape or (len(case.facts),)))


@dataclass(frozen=True, eq=False)
class Gain:
    """What an operator did to one model, at each of its points."""

    levels: Levels
    keep: tuple[int, ...]
    """The retrained models that it is compared with; none in grade B."""
    before: Float[Tensor, " fact"]
    after: Float[Tensor, "*point fact"]
    rho: Float[Tensor, "*point fact"]
    """What came back, in [0, 1]; NaN where full and retrained are too close."""
    ignorant: Float[Tensor, "never *point fact"]
    """What the operator makes of models that never knew."""
    null: Float[Tensor, "heldout *point fact"]
    """rho of each retrained model against the others."""

    def at(self, point: int) -> "Gain":
        """The gain at one of the points."""
        return replace(
            self,
            after=self.after[point],
            rho=self.rho[point],
            ignorant=self.ignorant[:, point],
            null=self.null[:, point],
        )

    def curves(self) -> dict[str, Float[Tensor, "point fact"]]:
        """rho and margins over the points."""
        return {"rho": self.rho, "margin": self.after, "margin_R": self.ignorant.mean(0)}


def ignorant(
    case: Case,
    keep: Sequence[int],
    retrained: Float[Tensor, "retrained *point fact"],
    after: Float[Tensor, "*point kind fact"],
) -> Float[Tensor, "never *point fact"]:
    """What an operator makes of models that never knew: the retrained ones, or in grade B one row, the relation's mean
    of the audited model's sham facts under the same operator."""
    return retrained[list(keep)] if keep else relation_mean(after[..., 1, :], case.facts)[None]


def measure_gain(
    case: Case,
    levels: Levels,
    retrained: Float[Tensor, "retrained *point fact"],
    model: Model,
    operator: Operator,
    before: Float[Tensor, "kind fact"] | None = None,
) -> Gain:
    """Apply the operator to the audited model and compare; a retrained model of the case is known already.

    Args:
        retrained: `margins_after` of the same operator.
        before: the audited model's margins as it is; scored here by default.
    """
    keep, index = case.others_than(model), case.index_of(model)
    start = levels.query_set.margins(model) if before is None else before
    after = operator(model) if index is None else retrained[index].unsqueeze(-2)
    return Gain(
        levels,
        tuple(keep),
        start[0],
        after[..., 0, :],
        levels.rho(start, after, retrained, keep),
        ignorant(case, keep, retrained, after),
        levels.null(retrained),
    )


def gain_result(
    case: Case,
    gain: Gain,
    *,
    test: str,
    name: str,
    cost_fe: float,
    columns: Mapping[str, Float[Tensor, " fact"] | float] | None = None,
    flags: Sequence[tuple[str, ...]] = (),
    curves: Mapping[str, Float[Tensor, "point fact"]] | None = None,
    axis: Sequence[float] | Sequence[int] | None = None,
) -> Result:
    """The result of a gain at one point; recoverability is rho. See `make_result`."""
    return make_result(
        case,
        test,
        name,
        score_raw=gain.after,
        score_full=gain.levels.full,
        score_retrained=gain.ignorant,
        null=gain.null,
        rho=gain.rho,
        cost_fe=cost_fe,
        flags=flags,
        columns={"before": gain.before, **(columns or {})},
        curves=curves,
        axis=axis,
    )
