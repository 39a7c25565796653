"""How an attack's training moves the weights of a clone: all of them, or only low-rank factors beside them (LoRA).

Source: AdamW, arXiv 1711.05101; LoRA, arXiv 2106.09685: W + (alpha / rank) B A with B = 0 at first, without dropout.
The factors' gradients follow from the weight's, G: (alpha / rank) G A^T and (alpha / rank) B^T G, so that they are
those of the plain model also where TransformerBridge reads a joint matrix in parts.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mech_unlearn.model.bridge import Model
from mech_unlearn.model.gradients import gradient_of
from mech_unlearn.restoration.weights.quantize import linear_weights

Step = Callable[[Tensor], None]
"""One optimiser step down the gradient of a loss; gradients are clipped to norm 1."""
ALPHA = 32.0
"""Source: the attack of arXiv 2410.08827."""
FASTER = 10.0
"""Learning rate of the factors over that of all weights: the best rates differ by about so much, at any rank.
Source: Schulman et al. 2025, LoRA without regret."""


def every_weight(model: Model, lr: float) -> Step:
    """Train all held weights."""
    gradients, weights = gradient_of(model), list(model.held.values())
    optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)

    def step(loss: Tensor) -> None:
        found = gradients(loss)
        for name, weight in model.held.items():
            weight.grad = found.get(name)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        model.require_live(model.held)

    return step


def low_rank(model: Model, lr: float, rank: int, seed: int) -> Step:
    """Train LoRA factors of the linear layers, the output matrix left out.

    Raises:
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"LoRA needs a rank of at least 1, got {rank}")
    axes, scale = linear_weights(model), ALPHA / rank
    generator = torch.Generator().manual_seed(seed)
    before = {name: model.held[name].detach().clone() for name in axes}
    factors = {name: _factors(weight, axes[name], rank, generator) for name, weight in before.items()}
    trained = [factor for pair in factors.values() for factor in pair]
    gradients = gradient_of(model, axes)
    optimiser = torch.optim.AdamW(trained, lr=FASTER * lr, weight_decay=0.0)

    def step(loss: Tensor) -> None:
        found: Mapping[str, Tensor] = gradients(loss)
        for name, (left, right) in factors.items():
            g = found.get(name)
            left.grad, right.grad = (None, None) if g is None else (scale * g @ right.T, scale * left.T @ g)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        with torch.no_grad():
            for name, (left, right) in factors.items():
                model.held[name].copy_(before[name] + scale * left @ right)
        model.require_live(axes)

    return step


def _factors(weight: Tensor, out_axis: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(rows x rank, rank x columns): uniform in +-1 / sqrt(inputs) on the side of the inputs, 0 on the other."""
    inputs, outputs = weight.shape[1 - out_axis], weight.shape[out_axis]
    drawn = ((2 * torch.rand(rank, inputs, generator=generator) - 1) / inputs**0.5).to(weight)
    zero = torch.zeros(outputs, rank).to(weight)
    return (zero, drawn) if out_axis == 0 else (drawn.T.contiguous(), zero.T.contiguous())
