"""Knowledge-neuron attribution of one prompt of twelve tokens: all neurons of all layers, twenty steps.

Reference: the paper's way (arXiv 2104.08696) on plain hooks of a bare Hugging Face model: layer by layer one forward
pass for the activations, one of twenty scaled copies of the whole prompt, and its backward pass to the activations.
"""

from typing import Any

import torch
from torch import Tensor

from mech_unlearn.locate.neurons.neuron_attribution import neuron_attribution
from speed.shapes import Shape, Way, query_of

TOKENS, STEPS = 12, 20


def prompt(shape: Shape) -> tuple[list[int], int]:
    """Token ids and the answer."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.vocabulary - 2, (TOKENS,), generator=generator).tolist(), shape.vocabulary // 3


def plain(shape: Shape) -> Way:
    """Attributions [layer, neuron]."""
    hf, (row, target) = shape.bare(), prompt(shape)
    ids = torch.tensor([row])
    seconds = [m for name, m in hf.named_modules() if name.endswith(("mlp.c_proj", "mlp.down_proj"))]

    def run() -> Tensor:
        out = []
        for second in seconds:
            kept: list[Tensor] = []
            handle = second.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][0, -1].detach()))
            with torch.no_grad():
                hf(ids, use_cache=False)
            handle.remove()
            scaled = (torch.arange(STEPS)[:, None] / STEPS * kept[0]).requires_grad_()

            def write(_: Any, args: tuple, scaled: Tensor = scaled) -> tuple:
                x = args[0].clone()
                x[:, -1] = scaled
                return (x,)

            handle = second.register_forward_pre_hook(write)
            p = hf(ids.expand(STEPS, -1), use_cache=False).logits[:, -1].softmax(-1)[:, target]
            handle.remove()
            (gradient,) = torch.autograd.grad(p.sum(), scaled)
            out.append(gradient.mean(0) * kept[0])
        return torch.stack(out)

    return run


def ours(shape: Shape) -> Way:
    """`neuron_attribution`: one suffix sweep of layers x steps one-token rows, and its backward pass."""
    model, (row, target) = shape.model(), prompt(shape)
    query = query_of(row, [target])
    return lambda: neuron_attribution(model, [query], steps=STEPS)[0]
