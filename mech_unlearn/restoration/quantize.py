"""Quantisation: does rounding the weights bring the fact back?

Paper:    Does unlearning truly unlearn? arXiv 2410.16454: an unlearning step smaller than half a rounding step is
          undone by rounding.
Changes:  a clone of the audited model; its linear layers are rounded to nearest, per output channel.
Needs:    one rounding and one scoring of U and of each retrained model.
Differs:  round-to-nearest instead of GPTQ or NF4 (runs anywhere). Embeddings, the output matrix (lm_head), norms and
          biases stay as they are. Activation interventions of an edit stay in force.
Fails:    per-channel 4-bit rounding of a small model may break the knowledge itself; its effect on retrained models
          is subtracted, and silence of this test is no evidence of deletion.

`score_raw` is the margin after rounding, in nats; recoverability is rho (difference in differences).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mech_unlearn.edit import clone
from mech_unlearn.model import Model
from mech_unlearn.restoration.case import Case, Result
from mech_unlearn.restoration.levels import Levels, make_levels


def codes(
    weight: Float[Tensor, "row column"], bits: int, out_axis: int = 0
) -> tuple[Int[Tensor, "row column"], Float[Tensor, "..."]]:
    """Integer codes and the step per output channel: w ~ code * step, step = max|w| / (2^(bits-1) - 1).

    Computed in float64. Source: symmetric round-to-nearest, arXiv 2210.17323 section 3.

    Raises:
        ValueError: fewer than 2 bits.
    """
    if bits < 2:
        raise ValueError(f"rounding needs at least 2 bits, got {bits}")
    top = 2 ** (bits - 1) - 1
    wide = weight.detach().double()
    step = (wide.abs().amax(1 - out_axis, keepdim=True) / top).clamp(min=1e-300)
    return (wide / step).round().clamp(-top - 1, top).long(), step


def round_to_nearest(weight: Float[Tensor, "row column"], bits: int, out_axis: int = 0) -> Float[Tensor, "row column"]:
    """The weight rounded to `bits` bits per output channel; off by half a step at the most."""
    code, step = codes(weight, bits, out_axis)
    return (code * step).to(weight.dtype)


def linear_weights(model: Model) -> dict[str, int]:
    """Held name -> axis of the output channels, for each linear layer except the output matrix.

    `nn.Linear` stores [out, in]; the Conv1D of GPT-2 stores [in, out].
    """
    kinds = {}
    for module in model.hf.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            kinds[id(module.weight)] = 1 if type(module).__name__ == "Conv1D" else 0
    vocab = {id(p.weight) for p in (model.hf.get_input_embeddings(), model.hf.get_output_embeddings()) if p is not None}
    return {
        name: kinds[id(weight)]
        for name, weight in model.held.items()
        if weight.ndim == 2 and id(weight) in kinds and id(weight) not in vocab
    }


def quantize_(model: Model, bits: int) -> None:
    """Round the linear layers of this model in place."""
    axes = linear_weights(model)
    with torch.no_grad():
        for name, axis in axes.items():
            model.held[name].copy_(round_to_nearest(model.held[name], bits, axis))
    model.require_live(axes)


def code_agreement(full: Model, unlearned: Model, bits: int) -> float:
    """phi: the share of linear weights whose code is the same in both models; near 1 foretells recovery."""
    same = total = 0
    for name, axis in linear_weights(full).items():
        equal = codes(full.held[name], bits, axis)[0] == codes(unlearned.held[name], bits, axis)[0]
        same, total = same + int(equal.sum()), total + equal.numel()
    return same / total


@dataclass(frozen=True, eq=False)
class QuantizeLevels:
    levels: Levels
    bits: int
    retrained: Float[Tensor, "retrained fact"]
    """Margins of the retrained models after rounding; no rows in grade B."""


def _margins(case: Case, levels: Levels, model: Model, bits: int) -> Float[Tensor, "kind fact"]:
    with clone(model) as copy:
        quantize_(copy, bits)
        return levels.probe.margins(copy)


def prepare(case: Case, shared: Levels | None = None, *, bits: int) -> QuantizeLevels:
    """Score full and retrained models before, and the retrained ones after rounding."""
    levels = shared or make_levels(case, "test")
    after = [_margins(case, levels, model, bits)[0] for model in case.retrained]
    return QuantizeLevels(levels, bits, torch.stack(after) if after else torch.zeros(0, len(case.facts)))


def audit(case: Case, ready: QuantizeLevels, model: Model, name: str) -> Result:
    """Round a clone of the audited model and score it."""
    keep, levels = case.others_than(model), ready.levels
    before = levels.probe.margins(model)
    after = _margins(case, levels, model, ready.bits)
    found = levels.rho(before, after, ready.retrained, keep)
    phi = code_agreement(case.full, model, ready.bits)
    return Result(
        test=f"int{ready.bits}",
        model_id=name,
        facts=case.facts,
        recoverability=found,
        score_raw=after[0],
        score_full=levels.full,
        score_retrained=ready.retrained[keep] if keep else levels.never,
        null=levels.null(ready.retrained),
        rho=found,
        grade=case.grade,
        n_paraphrases=case.prompts,
        seed=case.seed,
        cost_fe=2.0 * len(levels.probe.queries) / len(case.facts),
        columns={"before": before[0], "code_agreement": torch.full((len(case.facts),), phi)},
    )
