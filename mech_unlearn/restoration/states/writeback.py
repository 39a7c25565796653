"""Writeback: with the full model's states of the prompt, can U's own later layers still give the answer?

Paper:    the mirror of UDS (arXiv 2605.24614), ours: there U's states go into F, here F's states go into U. It is the
          "full" arm of the restoration test of arXiv 2602.18505 at every layer instead of one.
Changes:  nothing kept; at one layer after another, U's residual stream at the prompt's tokens (or at the subject's
          only, `writeback_subject`) is written over with F's of the same prompt. Answer tokens are left alone.
Needs:    one forward of F per phrasing, and one suffix sweep over the layers of U and of each retrained model.
Differs:  late in the network F's states carry the answer into any model with an intact read-out, and so they "restore"
          a retrained model too. Its gain at the same layer is subtracted (difference in differences), which leaves
          what U's own layers above know. Recoverability is the largest over layers, because the block may sit
          anywhere; the nulls are maxima too.
          Without retrained models that gain is unknown and the test is silent (NaN, flag `needs_retrained`).
Fails:    blind to a block behind the layer, for example in the last ones (U's states there are F's: nothing to write).
          UDS sees that one. Of knowledge that lies in one layer alone and was taken out there, nothing comes back,
          as in a retrained model.

`score_raw` is the margin in nats at the best layer; recoverability is rho there. The curve `rho` has every layer, the
first one the embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.model.bridge import Model, require_positions
from mech_unlearn.model.scores import Batch, RowWrite, score
from mech_unlearn.model.tokens import Query
from mech_unlearn.restoration.engine.case import Case
from mech_unlearn.restoration.engine.gain import gain_result, margins_after, measure_gain
from mech_unlearn.restoration.engine.levels import Levels, make_levels
from mech_unlearn.verdict.result import Result

Positions = Literal["prompt", "subject"]


@dataclass(frozen=True, eq=False)
class Copied:
    """F's states of each prompt, as a write function for one site."""

    states: dict[int, Float[Tensor, "pos d_model"]]
    where: Positions

    def __call__(self, x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Tensor:
        out = x.clone()
        for row, query in enumerate(batch.query.tolist()):
            start, end = batch.span[row].tolist() if self.where == "subject" else (0, int(batch.end[row]) + 1)
            out[row, start:end] = self.states[query][start:end].to(x)
        return out


@dataclass(frozen=True, eq=False)
class WritebackLevels:
    """What to write, and what it does to the retrained models."""

    levels: Levels
    arms: tuple[dict[Site, RowWrite], ...]
    where: Positions
    retrained: Float[Tensor, "retrained layer fact"]
    """Margins after writing, in nats."""


def sites(n_layers: int) -> tuple[Site, ...]:
    """The embeddings, and the residual stream after each layer."""
    return (Site(0, "resid_pre"), *(Site(layer, "resid_post") for layer in range(n_layers)))


def copied(full: Model, queries: Sequence[Query], where: Positions) -> tuple[dict[Site, RowWrite], ...]:
    """One write per site of `sites`, with the full model's states of these prompts."""
    places = sites(full.n_layers)
    kept: dict[Site, dict[int, Tensor]] = {site: {} for site in places}

    def reader(site: Site) -> RowWrite:
        def read(x: Tensor, batch: Batch) -> None:
            for row, query in enumerate(batch.query.tolist()):
                kept[site].setdefault(query, x[row, : int(batch.end[row]) + 1].clone())

        return read

    score(full, queries, {site: reader(site) for site in places})
    return tuple({site: Copied(kept[site], where)} for site in places)


def prepare(case: Case, shared: Levels | None = None, *, where: Positions = "prompt") -> WritebackLevels:
    """Read the full model's states, and write them into the retrained models."""
    levels = shared or make_levels(case, "test")
    require_positions(case.full)
    arms = copied(case.full, levels.query_set.queries, where)
    shape = (len(arms), len(case.facts))
    retrained = margins_after(case, lambda model: levels.query_set.margins_each(model, arms), shape)
    return WritebackLevels(levels, arms, where, retrained)


def audit(case: Case, ready: WritebackLevels, model: Model, name: str) -> Result:
    """Write the full model's states into the audited model, layer by layer."""
    require_positions(model)
    levels, facts = ready.levels, torch.arange(len(case.facts))
    found = measure_gain(case, levels, ready.retrained, model, lambda m: levels.query_set.margins_each(m, ready.arms))
    rho = found.rho if found.keep else torch.full_like(found.rho, torch.nan)
    best = rho.nan_to_num(nan=-1.0).argmax(0)
    largest = replace(
        found,
        after=found.after[best, facts],
        rho=rho.amax(0),
        ignorant=found.ignorant[:, best, facts] if found.keep else levels.never,
        null=found.null.amax(1),
    )
    return gain_result(
        case,
        largest,
        test="writeback" if ready.where == "prompt" else "writeback_subject",
        name=name,
        cost_fe=float(len(ready.arms) + 1),
        flags=() if found.keep else (("needs_retrained",),) * len(case.facts),
        columns={"best_layer": best.float() - 1},
        curves={"rho": rho},
        axis=range(-1, case.full.n_layers),
    )
