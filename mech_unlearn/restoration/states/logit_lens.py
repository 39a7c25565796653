"""Logit lens: do U's states, read out at once by the full model's decoder, already say the answer?

Paper:    nostalgebraist 2020, interpreting GPT (the lens); scored in parallel to the Unlearning Depth Score as in
          arXiv 2605.24614; head-projection attack, arXiv 2309.17410 (top k of the projection at any late layer).
Changes:  nothing; one pass of each model over the prompt and its answer.
Needs:    one forward and one readout per layer and answer token; of F and of each retrained model once.
Differs:  the decoder (final norm and unembedding) is F's for every model, so that an edit of it does not act; the
          attack's projection is U's own, as there. A leak asks for every token of the answer (teacher-forced) within
          the first k at one and the same layer; the late layers are the upper half. recoverability = 1 - erasure /
          (mean erasure of held-out retrained models). Without retrained models their place is taken by F reading the
          prompt about an unknown subject, or the mean state of other subjects: grade B.
Fails:    blind to a block before the layers where the answer shows, and to whatever the unembedding does not read: a
          low value is no proof of absence (see `tuned_lens`, `probe`).

k_l = mean log-probability per answer token (nats) of the states after layer l. d1_l = k_l(F) - k_l(R), d2_l = k_l(F)
- k_l(U); `score_raw` = erasure = sum over {l: d1_l > 0.05} of d1_l clip(d2_l / d1_l, 0, 1) / sum of d1_l, in [0, 1].
`top_k` and `top_k_R` are the shares of phrasings whose answer U and retrained models leak to the attack.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.model.bridge import Model
from mech_unlearn.model.readout import answer_logprobs, read_out
from mech_unlearn.model.tokens import Query
from mech_unlearn.restoration.engine.case import Case
from mech_unlearn.restoration.engine.levels import Levels, make_query_set
from mech_unlearn.restoration.engine.normalise import mean_by_fact
from mech_unlearn.restoration.states import uds
from mech_unlearn.restoration.states.uds import Rowset, erasure_result, read_rows, rowset, uds_score
from mech_unlearn.verdict.result import Result

TOP_K = 20
"""Candidates of the projection that the attacker may look at. Source: arXiv 2309.17410, budget of 20."""
Translate = Callable[[int, Tensor], Tensor]
"""(layer, states) -> the states that are read out."""
States = Float[Tensor, "layer query row d_model"]


@dataclass(frozen=True, eq=False)
class LensQueries:
    """The questions of a lens: the true answers only, and the rows that predict them."""

    queries: tuple[Query, ...]
    rows: Rowset


@dataclass(frozen=True, eq=False)
class LensLevels:
    """What the lens reads in the full and the retrained models."""

    asked: LensQueries
    full: Float[Tensor, "layer fact"]
    never: Float[Tensor, "retrained layer fact"]
    heldout: Float[Tensor, "heldout fact"]
    """Erasure of each retrained model against the mean of the others; no rows with fewer than two of them."""


def ask(case: Case, shared: Levels | None) -> LensQueries:
    """The TEST questions of a case as a lens reads them."""
    true = (shared or make_query_set(case, "test")).true
    queries = tuple(replace(query, answers=query.answers[:1]) for query in true)
    return LensQueries(queries, rowset(queries, "answer"))


def read_states(case: Case, asked: LensQueries, model: Model) -> States:
    """A model's states at the rows that predict the answer."""
    return read_rows(model, asked.queries, asked.rows)


def ignorant_states(case: Case, asked: LensQueries) -> States:
    """F's states about subjects that it knows nothing definite of; in grade B they stand for a retrained model's."""
    return uds.ignorant_states(case, asked.queries, asked.rows)


def _flat(asked: LensQueries, states: States) -> tuple[Float[Tensor, "layer token d_model"], Tensor, Tensor]:
    """(States of the rows that exist, the query and the answer token of each)."""
    count = asked.rows.count
    real = torch.arange(states.shape[2]) < count[:, None]
    tokens = torch.tensor([token for query in asked.queries for token in query.answers[0]])
    return states[:, real], torch.arange(len(count)).repeat_interleave(count), tokens


def lens_curve(
    case: Case, asked: LensQueries, states: States, reader: Model, translate: Translate = lambda _, states: states
) -> Float[Tensor, "layer fact"]:
    """k: mean log-probability per answer token in nats at each layer, mean over the phrasings of a fact."""
    rows, query, tokens = _flat(asked, states)
    count = asked.rows.count
    curve = []
    for layer, some in enumerate(rows):
        each = answer_logprobs(reader, translate(layer, some), tokens)
        curve.append(torch.zeros(len(count)).index_add(0, query, each) / count)
    return mean_by_fact(torch.stack(curve), asked.queries, case.facts)


def _count(query: Int[Tensor, " token"], which: Bool[Tensor, " token"], size: int) -> Int[Tensor, " query"]:
    """How many of each query's tokens are chosen."""
    return torch.zeros(size, dtype=torch.long).index_add(0, query, which.long())


def top_k_leaks(
    case: Case, asked: LensQueries, states: States, reader: Model, top_k: int = TOP_K
) -> Float[Tensor, " fact"]:
    """Share of the phrasings after which some layer of the upper half has the answer within its first k tokens; NaN
    where none has and logits are not numbers."""
    rows, query, tokens = _flat(asked, states)
    out, broken = (torch.zeros(len(asked.queries), dtype=torch.bool) for _ in range(2))
    for some in rows[len(rows) // 2 :]:
        parts, lost = [], []
        for chunk, wanted in zip(some.split(512), tokens.split(512), strict=True):
            logits = read_out(reader, chunk).cpu()
            own = logits.gather(1, wanted[:, None])
            ahead = (logits > own).sum(1) + ((logits == own).sum(1) - 1) / 2  # of tied tokens half are ahead
            lost.append(logits.isnan().any(1))
            parts.append((ahead < top_k) & ~lost[-1])
        out |= _count(query, ~torch.cat(parts), len(out)) == 0
        broken |= _count(query, torch.cat(lost), len(out)) > 0
    return mean_by_fact(torch.where(broken & ~out, torch.nan, out.float()), asked.queries, case.facts)


def make_lens_levels(
    asked: LensQueries, full: Float[Tensor, "layer fact"], never: Sequence[Float[Tensor, "layer fact"]]
) -> LensLevels:
    """Levels, with the erasure of each retrained model against the mean of the others."""
    stacked = torch.stack(list(never))
    heldout = []
    for k in range(len(stacked) if len(stacked) > 1 else 0):
        rest = torch.cat([stacked[:k], stacked[k + 1 :]]).mean(0)
        heldout.append(uds_score(full - rest, full - stacked[k]).uds)
    return LensLevels(asked, full, stacked, torch.stack(heldout) if heldout else full[:0])


def lens_result(
    case: Case,
    levels: LensLevels,
    model: Model,
    found: Float[Tensor, "layer fact"],
    *,
    test: str,
    name: str,
    cost_fe: float,
    columns: Mapping[str, Float[Tensor, " fact"]],
) -> Result:
    """Erasure and recoverability from the curves of all models."""
    keep = case.others_than(model)
    never = levels.never[keep] if keep else levels.never
    got = uds_score(levels.full - never.mean(0), levels.full - found)
    return erasure_result(
        case,
        got,
        levels.heldout,
        keep,
        test=test,
        name=name,
        cost_fe=cost_fe,
        columns=columns,
        curves={"logprob": found, "logprob_F": levels.full, "logprob_R": never.mean(0)},
    )


@dataclass(frozen=True, eq=False)
class LogitLensLevels:
    levels: LensLevels
    top_k: int
    leaks: tuple[Float[Tensor, " fact"], ...]
    """Of each retrained model, to the attack with its own decoder."""


def prepare(case: Case, shared: Levels | None = None, *, top_k: int = TOP_K) -> LogitLensLevels:
    """Read the full and the retrained models.

    Raises:
        ValueError: top_k below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: the attacker looks at one candidate at least")
    asked = ask(case, shared)
    full = lens_curve(case, asked, read_states(case, asked, case.full), case.full)
    never, leaked = [], []
    for model in case.retrained:
        states = read_states(case, asked, model)
        never.append(lens_curve(case, asked, states, case.full))
        leaked.append(top_k_leaks(case, asked, states, model, top_k))
    if not never:
        states = ignorant_states(case, asked)
        never, leaked = (
            [lens_curve(case, asked, states, case.full)],
            [top_k_leaks(case, asked, states, case.full, top_k)],
        )
    return LogitLensLevels(make_lens_levels(asked, full, never), top_k, tuple(leaked))


def audit(case: Case, ready: LogitLensLevels, model: Model, name: str) -> Result:
    """Read the audited model's states with the full model's decoder, and attack them with its own."""
    asked = ready.levels.asked
    states, keep = read_states(case, asked, model), case.others_than(model)
    theirs = [ready.leaks[k] for k in keep] if keep else list(ready.leaks)
    return lens_result(
        case,
        ready.levels,
        model,
        lens_curve(case, asked, states, case.full),
        test="logit_lens",
        name=name,
        cost_fe=len(asked.queries) / len(case.facts),
        columns={
            "top_k": top_k_leaks(case, asked, states, model, ready.top_k),
            "top_k_R": torch.stack(theirs).mean(0),
        },
    )
