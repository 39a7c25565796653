"""Tuned lens: is the answer in U's states, read through translators trained for each layer, F's or U's own?

Paper:    Belrose et al. 2023, arXiv 2303.08112 (the lens); scored in parallel to the Unlearning Depth Score, arXiv
          2605.24614.
Changes:  nothing; translators are trained on running text, beside the models.
Needs:    running text (`Case.texts`), one training of a lens for F; with decoder="self" also one for U and for each
          retrained model; then one forward of each.
Differs:  decoder="full": F's lens and F's readout for all models. decoder="self": each model's own lens and readout,
          which also reads what a model keeps in another code than F's; a fact that only this one sees carries the
          flag `re_encoded` (present, in another code). A few hundred steps on the texts at hand instead of generic
          text of a million tokens. Normalised as `logit_lens`, grade B as there.
Fails:    texts that do not talk about such facts teach no translation of them. decoder="self" reads through U's own
          unembedding, so an edit of that hides the fact from it; decoder="full" sees that one. A translator may add
          what the layer does not use; the same is done for retrained models and subtracted.

k_l, d1_l, d2_l, and `score_raw` = erasure in [0, 1], as in `logit_lens`, through the translators.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from mech_unlearn.locate.lenses.tuned_lens import TunedLens, train_tuned_lens
from mech_unlearn.model.bridge import Model
from mech_unlearn.restoration.engine.case import Case
from mech_unlearn.restoration.engine.levels import Levels
from mech_unlearn.restoration.states.logit_lens import (
    LensLevels,
    States,
    ask,
    ignorant_states,
    lens_curve,
    lens_result,
    make_lens_levels,
    read_states,
)
from mech_unlearn.verdict.result import Result

STEPS = 250
"""Of Adam. Source: arXiv 2303.08112, section 3 (250 steps)."""
BATCH = 256
"""Token states of one step; small worlds have a few thousand in all."""
SEEN = 0.5
"""Recoverability from which a decoder is said to see a fact; the bound of `verdict.Thresholds.suppressed`."""
Decoder = Literal["full", "self"]


@dataclass(frozen=True, eq=False)
class TunedLevels:
    """Levels read through F's lens, and, with decoder="self", through each model's own."""

    decoder: Decoder
    steps: int
    lens: TunedLens
    """Of the full model."""
    frozen: LensLevels
    own: LensLevels | None
    retrained: tuple[Float[Tensor, "layer fact"], ...]
    """The retrained models through their own lenses."""


def _curve(case: Case, levels: LensLevels, states: States, reader: Model, lens: TunedLens) -> Tensor:
    return lens_curve(case, levels.asked, states, reader, lens.translate)


def _own_lens(case: Case, model: Model, steps: int) -> TunedLens:
    case.log(f"tuned lens of {model.name}")
    return train_tuned_lens(model, case.texts, steps=steps, batch=BATCH, seed=case.seed)


def prepare(case: Case, shared: Levels | None = None, *, decoder: Decoder = "full", steps: int = STEPS) -> TunedLevels:
    """Train F's lens (and those of the retrained models with decoder="self"), and read all of them.

    Raises:
        ValueError: an unknown decoder, fewer than two texts, or activation interventions in force on a model whose
            lens is to be trained.
    """
    if decoder not in get_args(Decoder):
        raise ValueError(f"unknown decoder {decoder!r}; choose from {', '.join(get_args(Decoder))}")
    if len(set(case.texts)) < 2:
        raise ValueError("a tuned lens is trained on running text: give Case(texts=...) two texts at least")
    asked, lens = ask(case, shared), _own_lens(case, case.full, steps)
    full = lens_curve(case, asked, read_states(case, asked, case.full), case.full, lens.translate)
    states = [read_states(case, asked, model) for model in case.retrained] or [ignorant_states(case, asked)]
    never = [lens_curve(case, asked, some, case.full, lens.translate) for some in states]
    frozen = make_lens_levels(asked, full, never)
    ready = TunedLevels(decoder, steps, lens, frozen, None, ())
    if decoder == "full":
        return ready
    if not case.retrained:
        return replace(ready, own=frozen)
    curves = tuple(
        _curve(case, frozen, some, model, _own_lens(case, model, steps))
        for some, model in zip(states, case.retrained, strict=True)
    )
    return replace(ready, own=make_lens_levels(asked, full, curves), retrained=curves)


def audit(case: Case, ready: TunedLevels, model: Model, name: str) -> Result:
    """Read the audited model through F's lens, and with decoder="self" through one trained on itself."""
    asked, frozen = ready.frozen.asked, ready.frozen
    states, fe = read_states(case, asked, model), len(asked.queries) / len(case.facts)
    read = _curve(case, frozen, states, case.full, ready.lens)
    through = lens_result(case, frozen, model, read, test="tuned_lens", name=name, cost_fe=fe, columns={})
    if ready.own is None:
        return through
    index = case.index_of(model)
    if index is not None:
        curve = ready.retrained[index]
    elif model is case.full:
        curve = ready.own.full
    else:
        curve = _curve(case, ready.own, states, model, _own_lens(case, model, ready.steps))
    fe += len(set(case.texts)) / len(case.facts)
    columns = {"frozen": through.recoverability}
    found = lens_result(case, ready.own, model, curve, test="tuned_lens_self", name=name, cost_fe=fe, columns=columns)
    hidden = (found.recoverability >= SEEN) & (through.recoverability < SEEN)
    flags = tuple((*f, *(("re_encoded",) if h else ())) for f, h in zip(found.flags, hidden.tolist(), strict=True))
    return replace(found, flags=flags)
