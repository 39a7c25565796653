"""What the model says when a residual-stream state is read out at once, without running any decoder layer.

Paper:    nostalgebraist 2020, interpreting GPT: the logit lens; Belrose et al. 2023, arXiv 2303.08112, section 2.
Needs:    the final norm and the unembedding on each state, and one layer on one token.
Differs:  the model's own forward pass runs with its decoder layers bypassed, so final norm, unembedding, scaling and
          soft-capping are the model's own code; gradients reach the states.
Fails:    a model that does anything but call its layers between the embedding and the final norm (none is known).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.model.bridge import Model


def _instead(layer: Any, number: int, rest: tuple[None, ...] | None, *args: Any, **kwargs: Any) -> Any:
    """What a bypassed decoder layer returns."""
    states = layer(number, args, kwargs)
    return states if rest is None else (states, *rest)


@contextmanager
def bypassed(model: Model, layer: Callable[[int, tuple, dict[str, Any]], Tensor]) -> Iterator[None]:
    """No decoder layer runs: each gives back `layer(its number, its positional, its named arguments)`.

    The hidden states are the first positional argument, or the one named `hidden_states`. Leaving restores the layers.
    """
    rest = model.layer_rest
    blocks: list[Any] = list(model.bridge.blocks)
    try:
        for number, block in enumerate(blocks):
            object.__setattr__(block, "forward", partial(_instead, layer, number, rest))
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def readout(model: Model, states: Float[Tensor, "state d_model"]) -> Float[Tensor, "state d_vocab"]:
    """Logits of residual-stream states through everything that follows the last layer, in float32.

    Differentiable in the states. Interventions at the layers do not act, for no layer runs: the states are read as
    they are. All states share one batch; the caller splits what is too large.

    Raises:
        ValueError: states of another width than the model's.
    """
    if states.shape[-1] != model.d_model:
        raise ValueError(f"states of {states.shape[-1]} dimensions; {model.name!r} has {model.d_model}")
    rows = torch.zeros(len(states), 1, dtype=torch.long, device=model.device)
    given = states.to(model.device, model.dtype)[:, None]
    with bypassed(model, lambda *_: given):
        return model.logits(rows)[:, 0].float()


@torch.no_grad()
def read_out(
    model: Model, states: Float[Tensor, "state d_model"], *, max_rows: int = 512
) -> Float[Tensor, "state d_vocab"]:
    """Logits of residual-stream states through everything that follows the last layer, a few rows at a time."""
    return torch.cat([readout(model, chunk) for chunk in states.split(max_rows)])


def answer_logprobs(
    reader: Model, states: Float[Tensor, "state d_model"], tokens: Int[Tensor, " state"]
) -> Float[Tensor, " state"]:
    """Log-probability of one token for each residual-stream state, read out by the model, nats; on the CPU."""
    parts = [
        read_out(reader, chunk).log_softmax(-1).cpu().gather(1, wanted[:, None])[:, 0]
        for chunk, wanted in zip(states.split(512), tokens.split(512), strict=True)
    ]
    return torch.cat(parts)
