"""Integrated gradients of the answer's probability over every MLP neuron of every layer, in one suffix sweep.

Paper:    Dai, Dong, Hao, Sui, Chang, Wei 2022, Knowledge neurons in pretrained transformers, arXiv 2104.08696, 3.2.
          A neuron is an entry of the input of the second MLP matrix (`mlp_post`): act(x W_in), in a gated MLP
          act(gate) * up. The whole layer's vector is scaled from zero at the position that predicts the answer.
Needs:    per prompt one forward pass and a suffix sweep of layers x steps one-token rows, and its backward pass.
Differs:  a causal model, so the position is the last of the prompt; each token of a longer answer is attributed at its
          own position behind the true prefix, and these are summed (ports append the model's own guess). The sum runs
          over k = 0..steps-1 as in the official code; the paper prints 1..steps. Attributions are signed.
          `activation="pre"` scales the pre-activation (in a gated MLP the gate's) as public ports do, not the paper.
Fails:    where P is near 1 its gradient vanishes (use target="logit"); a layer's neurons are scaled together, and an
          attribution is no proof that a neuron alone matters: check with `neuron_effects`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Fact, Site, SiteKind
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.model.answers import answer_rows, equal_shape
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.readout import readout
from mech_unlearn.model.sweep import Patch, Recording, put, record, refuse_interventions, sweep
from mech_unlearn.model.tokens import Query

TARGETS = {
    "probability": "P(answer)",
    "logprob": "log-probability of the answer (nats)",
    "logit": "logit of the answer",
}
CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("integrated_gradients", "activation"),
    "rule": ("left", "right", "midpoint", "trapezoid"),
    "target": tuple(TARGETS),
    "activation": ("post", "pre"),
}
READ_ROWS = 256
"""States read out at a time; bounds the memory of the logits and of their gradient."""


def check_facts(facts: Sequence[Fact]) -> None:
    """Refuse an empty list of facts, or two of one id."""
    if not facts:
        raise ValueError("no facts to locate: give at least one")
    ids = [fact.id for fact in facts]
    if len(set(ids)) < len(ids):
        raise ValueError(f"fact {next(i for i in ids if ids.count(i) > 1)!r} is given twice: give each id once")


def width(model: Model) -> int:
    """Neurons of a layer.

    Raises:
        KeyError: an MLP without one output matrix (a mixture of experts).
    """
    return model.held[model.w_out(0)[0]].numel() // model.d_model


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How neurons are scored.

    Raises:
        ValueError: a setting out of range.
    """

    method: str = "integrated_gradients"
    """Or "activation": the raw activation, the paper's baseline (section 4.2)."""
    steps: int = 20
    """Points of the path (20 in the paper)."""
    rule: str = "left"
    """Riemann sum: "left" (the official code), "right", "midpoint" or "trapezoid" (steps + 1 points)."""
    target: str = "probability"
    """Of the answer's token; or "logprob" (nats), or "logit"."""
    activation: str = "post"
    """"post": the neurons of the paper; "pre": before the activation function (in a gated MLP, the gate)."""
    max_tokens: int = 1024
    """Rows of one sweep at the most, each of one token; bounds memory."""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {', '.join(choices)}")
        if self.steps < 1 or self.max_tokens < 1:
            raise ValueError(f"steps={self.steps}, max_tokens={self.max_tokens}: both must be positive")

    @property
    def points(self) -> tuple[Float[Tensor, " point"], Float[Tensor, " point"]]:
        """Points of the path in [0, 1] and their weights, which add up to 1."""
        n = self.steps
        if self.rule == "trapezoid":
            weights = torch.full((n + 1,), 1 / n)
            weights[[0, -1]] /= 2
            return torch.arange(n + 1) / n, weights
        shift = {"left": 0.0, "right": 1.0, "midpoint": 0.5}[self.rule]
        return (torch.arange(n) + shift) / n, torch.full((n,), 1 / n)

    @property
    def unit(self) -> str:
        return "activation" if self.method == "activation" else f"share of {TARGETS[self.target]}"


def _until(recording: Recording, end: int) -> Recording:
    """The first positions of a recording: later ones cannot be seen from there."""
    cache = recording.cache
    return replace(
        recording,
        ids=recording.ids[:, :end],
        resid=recording.resid[:, :, :end],
        kept={site: x[:, :end] for site, x in recording.kept.items()},
        cache=None if cache is None else tuple((k[:, :, :end], v[:, :, :end]) for k, v in cache),
        calls={},
    )


def _pull(
    model: Model, states: Float[Tensor, "row d_model"], gold: Int[Tensor, " row"], target: str
) -> Float[Tensor, "row d_model"]:
    """Gradient of each row's target with respect to its final residual state."""
    out = []
    for some, wanted in zip(states.detach().split(READ_ROWS), gold.split(READ_ROWS), strict=True):
        leaf = some.requires_grad_()
        logits = readout(model, leaf)
        at = wanted[:, None]
        with torch.no_grad():  # dP/dlogits = P (one_hot - softmax), dlogP/dlogits = one_hot - softmax
            slope = torch.zeros_like(logits) if target == "logit" else logits.softmax(-1)
            p = slope.gather(1, at)
            slope.mul_(-p if target == "probability" else -1)
            slope.scatter_add_(1, at, p if target == "probability" else torch.ones_like(p))
        out += torch.autograd.grad(logits, leaf, slope)
    return torch.cat(out)


@torch.enable_grad()
def _integrate(
    recording: Recording, sites: Sequence[Site], gold: Int[Tensor, " query"], setting: Scoring
) -> Float[Tensor, "query layer neuron"]:
    """Integrated gradients at the last position of a recording, all layers in as few sweeps as the bound allows."""
    model, place, n = recording.model, recording.width - 1, len(gold)
    alphas, weights = (x.to(model.device) for x in setting.points)
    states = [recording.state(site)[:, place].float() for site in sites]
    slopes = torch.zeros(len(sites), *states[0].shape, device=model.device)
    size = max(1, setting.max_tokens // n)
    pieces = [(i, part) for i in range(len(sites)) for part in torch.arange(len(alphas)).split(size)]
    while pieces:
        rows, chunk = 0, []
        while pieces and (not chunk or rows + n * len(pieces[0][1]) <= setting.max_tokens):
            chunk.append(pieces.pop(0))
            rows += n * len(chunk[-1][1])
        leaves = [(alphas[part, None, None] * states[i]).flatten(0, 1).requires_grad_() for i, part in chunk]
        patches = [
            Patch(
                torch.arange(n, device=model.device).repeat(len(part)),
                ((sites[i], put(torch.full((n * len(part),), place, device=model.device), leaf)),),
                place,
            )
            for (i, part), leaf in zip(chunk, leaves, strict=True)
        ]
        final = torch.cat(sweep(recording, patches, [place], max_tokens=rows))[:, 0]
        pull = _pull(model, final, gold.repeat(rows // n), setting.target)
        for (i, part), slope in zip(chunk, torch.autograd.grad(final, leaves, pull), strict=True):
            slopes[i] += torch.einsum("p,pqn->qn", weights[part], slope.unflatten(0, (len(part), n)))
    return (slopes * torch.stack(states)).transpose(0, 1)


def _score_group(
    model: Model, queries: Sequence[Query], sites: Sequence[Site], setting: Scoring
) -> Float[Tensor, "query layer neuron"]:
    """Scores of queries of equal shape, summed over the answer's tokens (raw activations: their mean)."""
    places = answer_rows(queries)
    ids = torch.tensor([query.full[:-1] for query in queries], device=model.device)
    gold = torch.tensor([query.answers[0] for query in queries], device=model.device)
    integrate = setting.method == "integrated_gradients"
    whole = record(model, ids, keep=sites, cache=integrate)
    if odd := [site for site, x in whole.kept.items() if x.ndim != 3 or x.shape != whole.kept[sites[0]].shape]:
        raise ValueError(f"{model.name!r} has no single layer of neurons at {odd[0]} (a mixture of experts?)")
    if not integrate:
        return torch.stack([whole.state(site)[:, places].float().mean(1) for site in sites], 1)
    parts = [_integrate(_until(whole, place + 1), sites, gold[:, t], setting) for t, place in enumerate(places)]
    return torch.stack(parts).sum(0)


def neuron_batches(
    model: Model, queries: Sequence[Query], setting: Scoring
) -> Iterator[tuple[list[int], Float[Tensor, "query layer neuron"]]]:
    """Scores of all neurons for one batch of queries after the other: (their indices, scores on the CPU, float32).

    Only one batch is held. The batches are those of equal prompt and answer length.

    Raises:
        ValueError: no queries, activation interventions in force, or an MLP without one layer of neurons.
        KeyError: the model has no such neurons (a mixture of experts).
    """
    refuse_interventions(model)
    if not queries:
        raise ValueError("no queries to attribute: give at least one")
    kind: SiteKind = "mlp_post" if setting.activation == "post" else "mlp_pre"
    sites = [Site(layer, kind) for layer in range(model.n_layers)]
    rows = model.n_layers * len(setting.points[0]) if setting.method == "integrated_gradients" else 1
    shapes = [replace(query, span=(0, 1)) for query in queries]  # where the subject stands does not matter
    size = max(1, setting.max_tokens // rows)
    for members in equal_shape(shapes, setting.max_tokens):
        for start in range(0, len(members), size):
            some = members[start : start + size]
            yield some, _score_group(model, [queries[i] for i in some], sites, setting).detach().cpu()


@takes_settings_of(Scoring)
def neuron_attribution(model: Model, queries: Sequence[Query], **settings: Any) -> Float[Tensor, "query layer neuron"]:
    """Attribution of every neuron to the answer of each query, in the unit of the target (by default probability).

    Attr_j = w_j * sum_k weight_k dP(alpha_k w) / dw_j, where w is the layer's vector at the position that predicts the
    answer and P is a function of what stands in its place. With the trapezoid rule and many steps a layer's sum tends
    to P(w) - P(0). All queries are held: use `neuron_scores` for many.

    Args:
        settings: fields of `Scoring`: steps, rule, target, activation, max_tokens.

    Raises:
        ValueError: no queries, a setting out of range, or activation interventions in force.

    Source: arXiv 2104.08696, section 3.2.
    """
    parts = list(neuron_batches(model, queries, Scoring(**settings)))
    order = torch.tensor([i for members, _ in parts for i in members])
    return torch.cat([values for _, values in parts])[order.argsort()]
