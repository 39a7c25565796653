"""Residual patching of a twelve-token prompt: all twelve layers and twelve positions, an answer of one token.

Reference: `transformer_lens.patching.get_act_patch_resid_pre` on a TransformerBridge with the same weights, cache
of the other run included: one hooked forward pass per site, logits of every position.
"""

import contextlib
import io

import torch
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.locate.patching.activation_patching import activation_patching_per_fact
from mech_unlearn.locate.patching.pairs import make_pairs, record_pairs
from mech_unlearn.model.answers import answer_rows, answer_score
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.sweep import Patch, put, sweep
from speed.shapes import Shape, Way, fact

FACTS = (fact(), fact("w22 w23 w244"))


def _ids(model: Model) -> tuple[Tensor, Tensor, int]:
    """The other subject's prompt, the fact's own, and the answer's token."""
    pair = make_pairs(model, FACTS)[0]
    return torch.tensor([pair.other.prompt]), torch.tensor([pair.own.prompt]), pair.own.answers[0][0]


def plain(shape: Shape) -> Way:
    """Log-probability of the answer after each patch, nats: [layer, position]."""
    from transformer_lens import patching

    model = shape.model()
    other, own, answer = _ids(model)
    names = {f"blocks.{layer}.hook_resid_pre" for layer in range(shape.layers)}

    @torch.no_grad()
    def run() -> Tensor:
        _, cache = model.bridge.run_with_cache(own, names_filter=lambda name: name in names)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            return patching.get_act_patch_resid_pre(
                model.bridge, other, cache, lambda logits: logits[0, -1].log_softmax(-1)[answer]
            )

    return run


@torch.no_grad()
def swept(model: Model) -> Tensor:
    """The same from the parts that `activation_patching` is made of, one patch for each layer and position."""
    pair = make_pairs(model, FACTS)[0]
    base, source = record_pairs(model, [pair], "denoise", [])
    read = answer_rows([pair.own])
    one = torch.zeros(1, dtype=torch.long)
    sites = [Site(layer, "resid_pre") for layer in range(model.n_layers)]
    patches = [
        Patch(one, ((site, put(one + at, source.state(site)[:, at])),), at)
        for site in sites
        for at in range(base.width)
    ]
    states = torch.cat(sweep(base, patches, read))
    scores = answer_score(model, states, [pair.own.answers[0]] * len(patches), "logprob")
    return scores.unflatten(0, (model.n_layers, -1))


def ours(shape: Shape) -> Way:
    model = shape.model()
    return lambda: swept(model)


def classes(shape: Shape) -> Way:
    """`activation_patching_per_fact` over token classes at resid_pre: change of log-probability, [class, layer]."""
    model = shape.model()
    return lambda: activation_patching_per_fact(model, FACTS, kind="resid_pre").values[0]
