"""Direct logit attribution: what each layer's attention, heads and MLP write straight into the answer's logit.

Paper:    Elhage et al. 2021, A mathematical framework for transformer circuits; Wang et al. 2022, arXiv 2211.00593,
          section 3.1 and appendix on the logit difference.
Needs:    one forward pass per phrasing; for heads one product with W_O per head.
Differs:  norms are not folded into the weights: their gain, bias and centring are measured by calling them, and their
          scale is frozen at the state they saw, so the parts add up to the logit difference exactly. Where a norm
          stands behind attention (Gemma 2, OLMo 2) a head's part goes through that norm's frozen scale. Logits are
          those of the unembedding, before soft-capping or scaling.
Fails:    only direct paths count: a component that works through later layers has a small value here. The frozen scale
          hides components that act by changing the norm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact, Site
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import stream
from mech_unlearn.model.tokens import Query, make_queries

TOLERANCE = 1e-3
"""Largest share of a state that its parts may miss before an architecture is refused (float32: about 1e-6)."""


@dataclass(frozen=True)
class _Norm:
    """A norm as y = gain * (x - mean if centred) * scale + bias, where the scale depends on x."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    tolerance: float
    """Largest relative error that rounding explains."""

    def apply(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The part that is linear in x, without scale and bias."""
        return self.gain * (x - x.mean(-1, keepdim=True) if self.centred else x)

    def scale(self, x: Float[Tensor, "state d_model"], y: Float[Tensor, "state d_model"]) -> Float[Tensor, "state 1"]:
        """The scale that made y of x.

        Raises:
            ValueError: no scale does: it is no LayerNorm or RMSNorm.
        """
        linear, wanted = self.apply(x), y - self.bias
        scale = (linear * wanted).sum(-1, keepdim=True) / linear.square().sum(-1, keepdim=True).clamp(min=1e-30)
        if (linear * scale - wanted).norm() > self.tolerance * wanted.norm():
            raise ValueError("a norm of this architecture is neither a LayerNorm nor an RMSNorm; its scale is unknown")
        return scale


def _norm(module: Any, width: int, like: Tensor) -> _Norm:
    """Gain, bias and centring of a norm, from what it makes of zero, of a constant and of alternating signs."""
    sign = torch.ones(width, device=like.device)
    sign[1::2] = -1
    inputs = torch.stack([torch.zeros_like(sign), 100 * torch.ones_like(sign), 100 * sign]).to(like.dtype)
    with torch.no_grad():
        zero, constant, signs = module(inputs[:, None])[:, 0].double().cpu()
    gain = (signs - zero) * sign.double().cpu()
    centred = bool((constant - zero).norm() < 1e-3 * gain.norm())
    return _Norm(gain, zero, centred, max(TOLERANCE, 4 * torch.finfo(like.dtype).eps))


@dataclass(frozen=True)
class _Target:
    """A direction of the unembedding at one position of a prompt; its weight in the fact's mean."""

    position: int
    plus: int
    minus: int | None
    """Token whose logit is subtracted; None: the mean over the vocabulary."""
    weight: float


def _targets(query: Query, against: str) -> list[_Target]:
    start, answer = len(query.prompt) - 1, query.answers[0]
    if against == "vocabulary":
        return [_Target(start + t, token, None, 1 / len(answer)) for t, token in enumerate(answer)]
    found = []
    for wrong in query.answers[1:]:
        parts = [t for t, (a, b) in enumerate(zip(answer, wrong)) if a != b]
        if parts:  # else one is the beginning of the other: they never part
            found.append((start + parts[0], answer[parts[0]], wrong[parts[0]]))
    if not found:
        raise ValueError(
            f"fact {query.fact.id!r} has no distractor to compare with; add some or use against='vocabulary'"
        )
    return [_Target(position, plus, minus, 1 / len(found)) for position, plus, minus in found]


@dataclass(frozen=True)
class _Reader:
    """What turns parts of the final residual stream into logits, in float64 on the CPU."""

    norm: _Norm
    unembed: Float[Tensor, "d_vocab d_model"]
    bias: Float[Tensor, " d_vocab"]
    mean: Float[Tensor, " d_model"]
    """Mean over the vocabulary of the unembedding."""

    def direction(self, targets: Sequence[_Target]) -> tuple[Float[Tensor, "target d_model"], Float[Tensor, " target"]]:
        """The unembedding direction of each target, and the unembedding's bias along it."""
        plus = torch.tensor([t.plus for t in targets])
        offset = self.bias.double().mean()
        minus = torch.stack([self.mean if t.minus is None else self.unembed[t.minus].double() for t in targets])
        offsets = torch.stack([offset if t.minus is None else self.bias[t.minus].double() for t in targets])
        return self.unembed[plus].double() - minus, self.bias[plus].double() - offsets


def _component(model: Model, name: str) -> Any:
    """The Hugging Face module of a part; ValueError where the model has none of that name."""
    try:
        return model.component(name).original_component
    except KeyError as error:
        raise ValueError(f"model {model.name!r} has no {name!r}: its logits cannot be taken apart") from error


def _reader(model: Model) -> _Reader:
    linear = _component(model, "unembed")
    weight = linear.weight.detach().cpu()
    if weight.shape[1] != model.d_model:
        raise ValueError(f"the unembedding of {model.name!r} is {tuple(weight.shape)}; expected [d_vocab, d_model]")
    bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach().cpu()
    example = next(iter(model.held.values()))
    norm = _norm(_component(model, "ln_final"), model.d_model, example)
    return _Reader(norm, weight, bias, weight.mean(0, dtype=torch.float64))


def _split_heads(model: Model, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of (z, the output of W_O, attn_out), all [state, ...], that gives each head's part of attn_out and,
    last, that of the biases: [state, head + 1, d_model]."""
    heads = model.n_heads
    project = _component(model, f"blocks.{layer}.attn.o")
    name = model.resolve(Site(layer, "attn_out")).removesuffix(".hook_out")
    behind = (
        None if name.endswith(".attn") else _norm(_component(model, name), model.d_model, next(project.parameters()))
    )

    def split(z: Tensor, raw: Tensor, out: Tensor) -> Tensor:
        z = z.flatten(1).unflatten(1, (heads, -1)).to(model.device, model.dtype)
        alone = z.new_zeros(len(z), heads + 1, *z.shape[1:])
        for head in range(heads):
            alone[:, head, head] = z[:, head]
        with torch.no_grad():
            parts = project(alone.flatten(2)).cpu().double()
        bias = parts[:, -1:].clone()
        parts[:, :-1] -= bias
        if behind is None:
            return parts
        parts = behind.apply(parts) * behind.scale(raw, out)[:, None]
        parts[:, -1] += behind.bias
        return parts

    return split


def _places(model: Model, heads: bool) -> list[Site | str]:
    layers = range(model.n_layers)
    places: list[Site | str] = [Site(0, "resid_pre"), "ln_final.hook_in", "ln_final.hook_out"]
    places += [Site(layer, kind) for layer in layers for kind in ("attn_out", "mlp_out")]
    if heads:
        places += [f"blocks.{layer}.attn.o.hook_{side}" for layer in layers for side in ("in", "out")]
    return places


def _project(x: Float[Tensor, "state *part d_model"], pull: Float[Tensor, "state d_model"]) -> Tensor:
    return torch.einsum("s...d,sd->s...", x.double(), pull)


def direct_logit_attribution_per_fact(
    model: Model,
    facts: Sequence[Fact],
    *,
    by: str = "layer",
    against: str = "distractors",
    max_tokens: int = 8192,
) -> Attribution:
    """Parts of each fact's logit difference, logits: axes (fact, layer, component) or (fact, layer, head).

    By layer, the row of layer -1 holds "embed" (the residual stream before layer 0) and "constant" (the biases of final
    norm and unembedding); the other rows "attn" and "mlp". All parts together are the logit difference. By head, the
    heads of a layer and "bias" (that of W_O, and of a norm behind it) together are its "attn".

    The logit difference is logit(answer) - mean over distractors of logit(distractor), each read at the first token
    where the two part; or, against the vocabulary, logit(token) minus the mean logit, the mean over the answer's tokens
    (teacher-forced). The mean over the phrasings that a method may see.

    Raises:
        ValueError: no facts, a fact without distractors, activation interventions in force, or an architecture whose
            residual stream is not the sum of these parts or whose norms are unknown.
    """
    if not facts:
        raise ValueError("no facts to locate: give at least one")
    if by not in ("layer", "head") or against not in ("distractors", "vocabulary"):
        raise ValueError(f"by={by!r}, against={against!r}: choose by layer or head, against distractors or vocabulary")
    if model.in_force.interventions:
        raise ValueError("activation interventions write to the residual stream too; attribute logits without them")
    queries = make_queries(model.tokenizer, facts, distractors=against == "distractors")
    targets = [_targets(query, against) for query in queries]
    reader, n_layers = _reader(model), model.n_layers
    columns = (*range(model.n_heads), "bias") if by == "head" else ("embed", "attn", "mlp", "constant")
    splits = [_split_heads(model, layer) for layer in range(n_layers)] if by == "head" else []
    total = torch.zeros(len(queries), n_layers + (by == "layer"), len(columns), dtype=torch.float64)
    rows = [query.full[:-1] for query in queries]
    at = [sorted({t.position for t in chosen}) for chosen in targets]
    for part in stream(model, rows, _places(model, by == "head"), at, max_tokens=max_tokens):
        states = {(q, p): i for i, (q, p) in enumerate(part.index.tolist())}
        wanted = [(q, t) for q in dict.fromkeys(part.index[:, 0].tolist()) for t in targets[q]]
        state = torch.tensor([states[q, t.position] for q, t in wanted])
        x: dict[Any, Tensor] = {place: kept.double()[state] for place, kept in part.at.items()}
        pull, constant = _pull(reader, x, [t for _, t in wanted])
        _check_sum(model, x)
        if by == "head":
            values = torch.stack([_project(s, pull) for s in _heads(splits, x)], 1)
        else:
            values = _layers(x, pull, constant, n_layers)
        weight = torch.tensor([t.weight for _, t in wanted], dtype=torch.float64)
        total.index_add_(0, torch.tensor([q for q, _ in wanted]), values * weight[:, None, None])
    wrong = "its distractors" if against == "distractors" else "all tokens"
    layers = tuple(range(n_layers)) if by == "head" else (-1, *range(n_layers))
    return Attribution(
        name=f"direct logit attribution by {by}",
        values=_over_phrasings(total, queries, facts),
        axes=("fact", "layer", "head" if by == "head" else "component"),
        labels={
            "fact": tuple(f.id for f in facts), "layer": layers, "head" if by == "head" else "component": columns
        },
        unit=f"logit of the answer minus the mean over {wrong}",
        n=len(facts),
        note=f"mean over {len(queries)} prompts; scale of the final norm frozen; before any soft-capping",
    )  # fmt: skip


def _pull(reader: _Reader, x: dict[Any, Tensor], targets: Sequence[_Target]) -> tuple[Tensor, Tensor]:
    """The direction in the final residual stream that the logit difference reads, and its constant part."""
    norm = reader.norm
    direction, offset = reader.direction(targets)
    scale = norm.scale(x["ln_final.hook_in"], x["ln_final.hook_out"])
    pull = direction * norm.gain
    if norm.centred:  # <g * (x - mean x), u> = <x, g * u - mean(g * u)>
        pull = pull - pull.mean(-1, keepdim=True)
    return pull * scale, direction @ norm.bias + offset


def _check_sum(model: Model, x: dict[Any, Tensor]) -> None:
    final = x["ln_final.hook_in"]
    parts = [value for place, value in x.items() if isinstance(place, Site)]
    missed = ((final - torch.stack(parts).sum(0)).norm() / final.norm()).item()
    if not missed <= max(TOLERANCE, 4 * torch.finfo(model.dtype).eps * len(parts) ** 0.5):
        raise ValueError(
            f"the residual stream of {model.name!r} is not the sum of its embedding, attention and MLP outputs "
            f"({missed:.0%} is missing): its logits cannot be taken apart"
        )


def _layers(x: dict[Any, Tensor], pull: Tensor, constant: Tensor, n_layers: int) -> Float[Tensor, "target layer 4"]:
    values = torch.full((len(pull), n_layers + 1, 4), float("nan"), dtype=torch.float64)
    values[:, 0, 0] = _project(x[Site(0, "resid_pre")], pull)
    values[:, 0, 3] = constant
    for layer in range(n_layers):
        values[:, layer + 1, 1] = _project(x[Site(layer, "attn_out")], pull)
        values[:, layer + 1, 2] = _project(x[Site(layer, "mlp_out")], pull)
    return values


def _heads(splits: Sequence[Callable[[Tensor, Tensor, Tensor], Tensor]], x: dict[Any, Tensor]):
    for layer, split in enumerate(splits):
        z, raw = (x[f"blocks.{layer}.attn.o.hook_{side}"] for side in ("in", "out"))
        yield split(z, raw, x[Site(layer, "attn_out")])


def _over_phrasings(total: Tensor, queries: Sequence[Query], facts: Sequence[Fact]) -> Float[Tensor, "fact layer part"]:
    order = {fact.id: i for i, fact in enumerate(facts)}
    index: Int[Tensor, " query"] = torch.tensor([order[query.fact.id] for query in queries])
    count = torch.bincount(index, minlength=len(facts)).double()
    sums = torch.zeros(len(facts), *total.shape[1:], dtype=torch.float64).index_add(0, index, total)
    return (sums / count[:, None, None]).float()


def direct_logit_attribution(
    model: Model,
    facts: Sequence[Fact],
    *,
    by: str = "layer",
    against: str = "distractors",
    max_tokens: int = 8192,
) -> Attribution:
    """Mean parts of the logit difference over facts, logits; see `direct_logit_attribution_per_fact`.

    Axes (layer, component) with layer -1 for the embedding, or (layer, head).
    """
    each = direct_logit_attribution_per_fact(model, facts, by=by, against=against, max_tokens=max_tokens)
    return each.mean(facts)
