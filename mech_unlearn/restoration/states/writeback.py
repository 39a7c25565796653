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
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.model.bridge import Model, require_positions
from mech_unlearn.model.scores import Batch, RowWrite, score
from mech_unlearn.model.tokens import Query
from mech_unlearn.restoration.engine.case import Case
from mech_unlearn.restoration.engine.levels import Levels, make_levels
from mech_unlearn.restoration.engine.result import Result

Where = Literal["prompt", "subject"]


@dataclass(frozen=True, eq=False)
class Copied:
    """F's states of each prompt, as a write function for one site."""

    states: dict[int, Float[Tensor, "pos d_model"]]
    where: Where

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
    where: Where
    retrained: Float[Tensor, "retrained layer fact"]
    """Margins after writing, in nats."""


def sites(n_layers: int) -> tuple[Site, ...]:
    """The embeddings, and the residual stream after each layer."""
    return (Site(0, "resid_pre"), *(Site(layer, "resid_post") for layer in range(n_layers)))


def copied(full: Model, queries: Sequence[Query], where: Where) -> tuple[dict[Site, RowWrite], ...]:
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


def prepare(case: Case, shared: Levels | None = None, *, where: Where = "prompt") -> WritebackLevels:
    """Read the full model's states, and write them into the retrained models."""
    levels = shared or make_levels(case, "test")
    require_positions(case.full)
    arms = copied(case.full, levels.probe.queries, where)
    never = [levels.probe.margins_each(model, arms)[:, 0] for model in case.retrained]
    empty = torch.zeros(0, len(arms), len(case.facts))
    return WritebackLevels(levels, arms, where, torch.stack(never) if never else empty)


def audit(case: Case, ready: WritebackLevels, model: Model, name: str) -> Result:
    """Write the full model's states into the audited model, layer by layer."""
    require_positions(model)
    keep, levels = case.others_than(model), ready.levels
    index = next((k for k, retrained in enumerate(case.retrained) if retrained is model), None)
    before = levels.probe.margins(model)
    after = levels.probe.margins_each(model, ready.arms) if index is None else ready.retrained[index].unsqueeze(1)
    found = levels.rho(before, after, ready.retrained, keep)
    if not keep:
        found = torch.full_like(found, torch.nan)
    best = found.nan_to_num(nan=-1.0).argmax(0)
    axis = tuple(float(layer) for layer in range(-1, case.full.n_layers))
    picked = torch.arange(len(case.facts))
    return Result(
        test="writeback" if ready.where == "prompt" else "writeback_subject",
        model_id=name,
        facts=case.facts,
        recoverability=found.amax(0),
        score_raw=after[best, 0, picked],
        score_full=levels.full,
        score_retrained=ready.retrained[keep][:, best, picked] if keep else levels.never,
        null=levels.null(ready.retrained).amax(1),
        rho=found.amax(0),
        grade=case.grade,
        n_paraphrases=case.prompts,
        seed=case.seed,
        cost_fe=float(len(ready.arms) + 1),
        flags=() if keep else (("needs_retrained",),) * len(case.facts),
        columns={"before": before[0], "best_layer": best.float() - 1},
        curves={"rho": found},
        curve_axes={"rho": axis},
    )
