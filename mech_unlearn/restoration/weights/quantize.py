"""Quantisation: does rounding the weights bring the fact back?

Paper:    Does unlearning truly unlearn? arXiv 2410.16454: an unlearning step smaller than half a rounding step is
          undone by rounding. NF4: QLoRA, arXiv 2305.14314.
Changes:  a clone of the audited model; its linear layers, and each expert of a mixture, are rounded to nearest, per
          output channel.
Needs:    one rounding and one scoring of U and of each retrained model. `nf4_bitsandbytes` needs the optional extra
          `mech_unlearn[bitsandbytes]` (0.46 or later; GPU or CPU).
Differs:  round-to-nearest instead of GPTQ (runs anywhere). `nf4` is plain rounding to its 16 values: the step per block
          stays in float32 (no double quantisation), blocks run along each output channel, and a channel's last block
          may be shorter. `nf4_bitsandbytes` is what people load models with: the library's own rounding, blocks of 64
          over the whole matrix, their steps rounded to 8 bits; multiplied in the model's dtype, as the library does.
          Embeddings, the output matrix (lm_head), norms and biases stay as they are. Activation interventions of an
          edit stay in force.
Fails:    per-channel 4-bit (and any 3-bit) rounding of a small model may break the knowledge itself; its effect on
          retrained models is subtracted, and silence of this test is no evidence of deletion.

`score_raw` is the margin after rounding, in nats; recoverability is rho (difference in differences). `covers:x` flags
a model of whose weights only the share x is rounded.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mech_unlearn.edit.edit import clone
from mech_unlearn.model.bridge import Model
from mech_unlearn.restoration.engine.case import Case
from mech_unlearn.restoration.engine.gain import gain_result, margins_after, measure_gain
from mech_unlearn.restoration.engine.levels import Levels, make_levels
from mech_unlearn.verdict.result import Result


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


Code = Literal["integer", "nf4", "bitsandbytes"]
"""Equal steps, our NF4, or NF4 by bitsandbytes with double quantisation."""
BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes has on every device."""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How a weight is rounded."""

    bits: int = 4
    group: int | None = None
    """Weights along an output channel that share one step; None: the whole channel. NF4 takes 64, GPTQ papers 128."""
    code: Code = "integer"

    def __post_init__(self) -> None:
        if self.bits < 2 or (self.group is not None and self.group < 1):
            raise ValueError(f"rounding needs at least 2 bits and a group of at least 1, got {self}")
        if self.code != "integer" and (self.bits != 4 or self.group is None):
            raise ValueError(f"NF4 has 4 bits and a block size (64 in the paper), got {self}")
        if self.code == "bitsandbytes" and self.group not in BLOCKS:
            raise ValueError(f"bitsandbytes has blocks of {', '.join(map(str, BLOCKS))}, not of {self.group}: 4 bits")

    def __str__(self) -> str:
        if self.code != "integer":
            name = "nf4" if self.code == "nf4" else "nf4_bitsandbytes"
            return name if self.group == 64 else f"{name}_block{self.group}"
        return f"int{self.bits}" + ("" if self.group is None else f"_group{self.group}")


@cache
def normal_quantiles() -> Float[Tensor, " value"]:
    """The 16 values of NF4 in [-1, 1]: quantiles of N(0, 1), eight from below and nine from above that share an exact
    zero, over the largest. Float64. Source: arXiv 2305.14314, appendix E; the outermost quantile is that of its code.
    """
    outer = 1 - (1 / 32 + 1 / 30) / 2  # 0.9677083
    above = torch.special.ndtri(torch.linspace(outer, 0.5, 9, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(outer, 0.5, 8, dtype=torch.float64))
    return torch.cat([below[:-1], above]).sort().values / above[0]


def _blocks(
    weight: Float[Tensor, "row column"], group: int | None, out_axis: int
) -> Float[Tensor, "channel block member"]:
    """Output channels cut into groups, in float64; a short last group is filled up with zeros."""
    rows = (weight if out_axis == 0 else weight.T).detach().double()
    size = rows.shape[1] if group is None else group
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % size)).unflatten(1, (-1, size))


def _unblocked(blocks: Tensor, weight: Float[Tensor, "row column"], out_axis: int) -> Tensor:
    rows = blocks.flatten(1)[:, : weight.shape[1 - out_axis]]
    return rows if out_axis == 0 else rows.T


def rounded(
    weight: Float[Tensor, "*expert row column"], how: Rounding, out_axis: int = 0
) -> tuple[Int[Tensor, "*expert row column"], Float[Tensor, "*expert row column"]]:
    """The code of each weight, and the weight rounded, in its own dtype; each expert of a mixture by itself.

    Integers: code x step with step = max|w| / (2^(bits-1) - 1) over the group. NF4: the nearest of 16 values times
    max|w| over the block (arXiv 2305.14314, section 3).

    Raises:
        ValueError: rounding by bitsandbytes, and it is not installed.
    """
    if weight.ndim == 3:
        index, near = zip(*(rounded(expert, how, out_axis) for expert in weight), strict=True)
        return torch.stack(index), torch.stack(near)
    if how.code == "bitsandbytes":
        return _by_bitsandbytes(weight, how, out_axis)
    if how.code == "integer" and how.group is None:
        code, step = codes(weight, how.bits, out_axis)
        return code, (code * step).to(weight.dtype)
    blocks = _blocks(weight, how.group, out_axis)
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    if how.code == "nf4":
        values = normal_quantiles().to(blocks.device)
        index = torch.bucketize((blocks / largest).contiguous(), (values[1:] + values[:-1]) / 2)
        near = values[index] * largest
    else:
        top = 2 ** (how.bits - 1) - 1
        index = (blocks / (largest / top)).round().clamp(-top - 1, top).long()
        near = index * (largest / top)
    return _unblocked(index, weight, out_axis), _unblocked(near, weight, out_axis).to(weight.dtype)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"rounding by bitsandbytes needs its package ({error.name or error} is missing): "
            "pip install 'mech_unlearn[bitsandbytes]'"
        ) from None
    return bitsandbytes.functional


def _by_bitsandbytes(weight: Float[Tensor, "row column"], how: Rounding, out_axis: int) -> tuple[Tensor, Tensor]:
    library = _bitsandbytes()
    rows = (weight if out_axis == 0 else weight.T).detach().contiguous()
    packed, state = library.quantize_4bit(rows, blocksize=how.group, quant_type="nf4", compress_statistics=True)
    near, pairs = library.dequantize_4bit(packed, state), packed.flatten()
    index = torch.stack([pairs >> 4, pairs & 15], 1).flatten()[: rows.numel()].view_as(rows).long()
    return (index, near) if out_axis == 0 else (index.T, near.T)


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


def expert_weights(model: Model) -> dict[str, int]:
    """Held name -> axis of the output channels within one expert, for weights [expert, ., .] of a mixture.

    Only modules that say how theirs are stored (`is_transposed` of transformers 5: [in, out] rather than [out, in]).
    """
    axes: dict[int, int] = {}
    for module in model.hf.modules():
        if isinstance(transposed := getattr(module, "is_transposed", None), bool):
            axes |= {id(w): int(transposed) for w in module.parameters(recurse=False) if w.ndim == 3}
    return {name: axes[id(weight)] for name, weight in model.held.items() if id(weight) in axes}


def _axes(model: Model) -> dict[str, int]:
    return linear_weights(model) | expert_weights(model)


def coverage_flags(model: Model, names: Iterable[str]) -> tuple[str, ...]:
    """`covers:x` where these weights are less than 99 % of the model's entries, vectors, embeddings and the output
    matrix left out."""
    aside = {id(m.weight) for m in model.hf.modules() if isinstance(m, nn.Embedding)}
    aside |= {id(p.weight) for p in (model.hf.get_output_embeddings(),) if p is not None}
    size = {name: w.numel() for name, w in model.held.items() if w.ndim >= 2 and id(w) not in aside}
    share = sum(size[name] for name in names) / sum(size.values())
    return () if share >= 0.99 else (f"covers:{share:.2f}",)


def _as_rounding(how: "Rounding | int") -> Rounding:
    return Rounding(bits=how) if isinstance(how, int) else how


def quantize_(model: Model, how: Rounding | int) -> None:
    """Round the linear layers of this model in place; a number means that many bits per output channel."""
    axes = _axes(model)
    with torch.no_grad():
        for name, axis in axes.items():
            model.held[name].copy_(rounded(model.held[name], _as_rounding(how), axis)[1])
    model.require_live(axes)


def code_agreement(full: Model, unlearned: Model, how: Rounding | int) -> float:
    """phi: the share of rounded weights whose code is the same in both models; near 1 foretells recovery."""
    same = total = 0
    for name, axis in _axes(full).items():
        ours, theirs = (rounded(m.held[name], _as_rounding(how), axis)[0] for m in (full, unlearned))
        equal = ours == theirs
        same, total = same + int(equal.sum()), total + equal.numel()
    return same / total


@dataclass(frozen=True, eq=False)
class QuantizeLevels:
    levels: Levels
    how: Rounding
    retrained: Float[Tensor, "retrained fact"]
    """Margins of the retrained models after rounding; no rows in grade B."""


def _margins(levels: Levels, model: Model, how: Rounding) -> Float[Tensor, "kind fact"]:
    with clone(model) as copy:
        quantize_(copy, how)
        return levels.query_set.margins(copy)


def prepare(
    case: Case,
    shared: Levels | None = None,
    *,
    bits: int,
    group: int | None = None,
    code: Code = "integer",
) -> QuantizeLevels:
    """Score full and retrained models before, and the retrained ones after rounding.

    Raises:
        ValueError: fewer than 2 bits, an empty group, NF4 with other than 4 bits or without a block size, or
            bitsandbytes where it is not installed.
    """
    how = Rounding(bits=bits, group=group, code=code)
    if code == "bitsandbytes":
        _bitsandbytes()
    levels = shared or make_levels(case, "test")
    return QuantizeLevels(levels, how, margins_after(case, lambda model: _margins(levels, model, how)))


def audit(case: Case, ready: QuantizeLevels, model: Model, name: str) -> Result:
    """Round a clone of the audited model and score it."""
    levels = ready.levels
    found = measure_gain(case, levels, ready.retrained, model, lambda m: _margins(levels, m, ready.how))
    return gain_result(
        case,
        found,
        test=str(ready.how),
        name=name,
        cost_fe=2.0 * len(levels.query_set.queries) / len(case.facts),
        flags=[coverage_flags(model, _axes(model))] * len(case.facts),
        columns={"code_agreement": code_agreement(case.full, model, ready.how)},
    )
