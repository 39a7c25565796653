"""Names in context, their keys and states, and closed-form writes into MLP output matrices.

A *mention* is a prompt cut right after a name; its *key* is the input of the MLP's second matrix there and its
*state* is the residual stream there. Statistics and solves are in float64. Over 300 lines, because what
a key is and how it is written share their definitions of names, contexts and means.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.core import Entity, Fact, ForgetSet, Site
from mech_unlearn.edit.edit import Edit, LowRank
from mech_unlearn.edit.interventions import Tokens
from mech_unlearn.model.bridge import Model, post_norm
from mech_unlearn.model.capture import Place, stream
from mech_unlearn.model.tokens import encode_all, token_span

OPENINGS = ("\n", ". ")
"""Neutral text in front of a name that would stand first: behind a line break, for most tokenizers, the name has the
tokens that it has there; the second serves those that read white space as nothing."""
OUTLYING = 3.0
"""Times the median norm from which a state counts as an attention sink's."""
LARGE = 1.0
"""Share of a weight's norm from which a write is a large one."""


def default_layers(n_layers: int) -> tuple[int, ...]:
    """Up to three layers that end at a third of the depth, or at a fifth from 28 layers on.

    Source: 2506.07795's code edits layers 4-6 of 32 (Llama 3 8B) and 4-8 of 28 to 32 elsewhere, 13-17 of 48 in
    GPT-2 XL: early-middle MLPs, relatively earlier in larger models.
    """
    end = n_layers // (5 if n_layers >= 28 else 3)
    return tuple(range(max(0, end - 2), end + 1))


def check_layers(model: Model, layers: Sequence[int], last: int) -> tuple[int, ...]:
    """The layers in ascending order.

    Raises:
        ValueError: no layer, a layer the model lacks, one given twice, or one above the layer of the target.
    """
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers {tuple(layers)}: give at least one layer, each once")
    for layer in (*layers, last):
        if not 0 <= layer < model.n_layers:
            raise ValueError(f"layer {layer} is not in {model.name!r}, whose layers are 0..{model.n_layers - 1}")
    if max(layers) > last:
        raise ValueError(f"layer {max(layers)} lies above the target's layer {last}: a write there cannot reach it")
    return tuple(sorted(layers))


def check_written(model: Model, layers: Sequence[int], last: int) -> tuple[int, ...]:
    """The layers in ascending order, each with one MLP output matrix to be written.

    Raises:
        ValueError: what `check_layers` refuses. KeyError: a layer without such a matrix (a mixture of experts).
    """
    checked = check_layers(model, layers, last)
    for layer in checked:
        model.w_out(layer)
    return checked


def contexts_of(facts: Sequence[Fact]) -> tuple[str, ...]:
    """The templates of the facts whose text in front of the name differs, in order of first appearance.

    In a causal model nothing behind the name reaches its last token, so templates with one prefix are one context.
    """
    first: dict[str, str] = {}
    for fact in facts:
        for template in fact.templates:
            first.setdefault(template.split("{}")[0], template)
    return tuple(first.values())


def own_contexts(names: Sequence[str], facts: Sequence[Fact], contexts: Sequence[str]) -> Bool[Tensor, "name context"]:
    """Which contexts are those of each name's own facts (an alias shares them); all where none is.

    Over these a name's keys and states are averaged: in the context of a question that is never asked about
    somebody the state is an accident, and a mean over all would drown the others.
    """
    asked: dict[str, set[str]] = {}
    for fact in facts:
        for name in (fact.subject, *fact.aliases):
            asked.setdefault(name, set()).update(template.split("{}")[0] for template in fact.templates)
    own = torch.tensor([[c.split("{}")[0] in asked.get(name, ()) for c in contexts] for name in names])
    return own | ~own.any(1, keepdim=True)


def mean_over(states: Float[Tensor, "name context width"], own: Bool[Tensor, "name context"]) -> Tensor:
    """Mean over each name's own contexts, [name, width]."""
    weight = (own / own.sum(1, keepdim=True)).to(states)
    return torch.einsum("ncd,nc->nd", states, weight)


def stands_first(tokenizer: Any, names: Sequence[str], contexts: Sequence[str]) -> bool:
    """Whether some name is the first token of some context, and no more than that: an attention sink."""
    spans = _spanned(tokenizer, [(context, name) for name in names for context in contexts])
    return any(end == 1 for _, _, end in spans)


def mention(tokenizer: Any, template: str, name: str) -> tuple[Tokens, Tokens]:
    """(Tokens up to and with the last token of the name, tokens of the name) in the template's full text.

    A name of one token that would stand first stands behind one of `OPENINGS` instead: the state of a first token is an
    attention sink, and neither a key nor a target.
    """
    return _mentions(tokenizer, [(template, name)])[0]


def _mentions(tokenizer: Any, asked: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
    found = _spanned(tokenizer, asked)
    read = found
    for opening in OPENINGS:
        first = [pair for pair, (_, _, end) in zip(asked, read, strict=True) if end == 1]
        behind = iter(_spanned(tokenizer, [(opening + template, name) for template, name in first]))
        read = [next(behind) if end == 1 else (ids, a, end) for ids, a, end in read]
    return [(row[:end], ids[a:b]) for (row, _, end), (ids, a, b) in zip(read, found, strict=True)]


def _spanned(tokenizer: Any, asked: Sequence[tuple[str, str]]) -> list[tuple[Tokens, int, int]]:
    """(Tokens of the text, where those of the name begin and end)."""
    known = encode_all(tokenizer, [template.replace("{}", name) for template, name in asked])
    out = []
    for template, name in asked:
        encoding, start = known[template.replace("{}", name)], template.index("{}")
        out.append((encoding.ids, *token_span(encoding, start, start + len(name))))
    return out


def mention_rows(tokenizer: Any, names: Sequence[str], contexts: Sequence[str]) -> list[Tokens]:
    """The mention of each name in each context, names outermost."""
    return [row for row, _ in _mentions(tokenizer, [(context, name) for name in names for context in contexts])]


def spellings(tokenizer: Any, name: str, contexts: Sequence[str]) -> tuple[Tokens, ...]:
    """The token sequences a name has at the start of a text, after a space and in each context, each once."""
    return tuple(dict.fromkeys(mention(tokenizer, template, name)[1] for template in ("{}", "- {}", *contexts)))


def names_of(entities: Sequence[Entity]) -> tuple[str, ...]:
    """Every name and alias, each once."""
    return tuple(dict.fromkeys(name for entity in entities for name in (entity.name, *entity.aliases)))


def require_new(earlier: Sequence[str], forget: ForgetSet) -> None:
    """Check that no name of an earlier request is to be forgotten now.

    Raises:
        ValueError: one that is.
    """
    if twice := set(earlier) & set(names_of(forget.entities)):
        raise ValueError(f"earlier names {sorted(twice)}, which are to be forgotten now; leave them out of one")


@contextmanager
def count_forwards(model: Model) -> Iterator[list[int]]:
    """A one-element list that counts the batched forward passes of the model begun inside the block."""
    count = [0]
    handle = model.hf.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    try:
        yield count
    finally:
        handle.remove()


def end_states(
    model: Model, rows: Sequence[Tokens], places: Sequence[Place]
) -> dict[Place, Float[Tensor, "row width"]]:
    """The activation at the last token of each row at each place, float64 on the model's device."""
    out: dict[Place, Tensor] = {}
    for part in stream(model, rows, places, "last"):
        for place, states in part.at.items():
            if place not in out:
                out[place] = torch.zeros(len(rows), states.shape[1], dtype=torch.float64, device=model.device)
            out[place][part.index[:, 0]] = states.to(out[place])
    return out


def name_states(
    model: Model, names: Sequence[str], contexts: Sequence[str], site: Site
) -> Float[Tensor, "name context d_model"]:
    """The state at the last token of each name in each context, float64."""
    return end_states(model, mention_rows(model.tokenizer, names, contexts), [site])[site].unflatten(
        0, (len(names), -1)
    )


def project(basis: Float[Tensor, "d_mlp kept"] | None, keys: Float[Tensor, "d_mlp n"]) -> Float[Tensor, "d_mlp n"]:
    """P k = B B^T k; the keys themselves where there is no basis (P = I)."""
    return keys if basis is None else basis @ (basis.T @ keys)


def closed_form(
    keys: Float[Tensor, "d_mlp n"],
    residuals: Float[Tensor, "d_model n"],
    basis: Float[Tensor, "d_mlp kept"] | None,
    ridge: float,
    earlier: Float[Tensor, "d_mlp t"] | None = None,
    moment: Float[Tensor, "d_mlp d_mlp"] | None = None,
) -> tuple[Float[Tensor, "d_mlp m"], Float[Tensor, "m d_model"]]:
    """(M A, (ridge I + A^T M A)^-1 E R^T) with A = [keys, earlier]; their product is the delta of W_out.

    With M = P it solves (P (K K^T + T) + ridge I) X = P K R^T with T = earlier earlier^T, with M = C^-1 for a `moment`
    C it solves (K K^T + T + ridge C) X = K R^T: by the push-through identity, with one system of as many unknowns as
    there are keys where the originals solve one of d_mlp x d_mlp. `earlier` are keys that must keep their output.

    Source: the normal equations with P are those of AlphaEdit (2410.02355, eq. 9 with the ridge of its code) that
    2506.07795 uses; those with C are eq. 14 of MEMIT (2210.07229), lambda as `ridge`.

    Raises:
        ValueError: a basis and a moment together.
    """
    if basis is not None and moment is not None:
        raise ValueError("a write is either confined to a basis or weighed by a moment, not both")
    joint = keys if earlier is None else torch.cat([keys, earlier], 1)
    wanted = torch.zeros(joint.shape[1], residuals.shape[0], dtype=joint.dtype, device=joint.device)
    wanted[: keys.shape[1]] = residuals.T
    projected = project(basis, joint) if moment is None else solve_moment(moment, joint)
    gram = joint.T @ projected
    gram.diagonal().add_(ridge)
    return projected, torch.linalg.solve(gram, wanted)


def solve_moment(moment: Float[Tensor, "d_mlp d_mlp"], keys: Float[Tensor, "d_mlp n"]) -> Float[Tensor, "d_mlp n"]:
    """C^-1 k, by Cholesky.

    Raises:
        ValueError: C is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(moment)
    if failed.item():
        raise ValueError("the key statistics C have no inverse: give more retained text, or raise damping=")
    return torch.cholesky_solve(keys, factor)


def low_rank(left: Float[Tensor, "d_mlp m"], right: Float[Tensor, "m d_model"], stored_in_first: bool) -> LowRank:
    """The product as float32 factors in the orientation the weight is stored in.

    The left factor is made orthonormal first, so that large coefficients of nearly equal keys cancel in float64.
    """
    q, r = torch.linalg.qr(left)
    a, b = q.float().cpu(), (r @ right).float().cpu()
    return LowRank(a, b) if stored_in_first else LowRank(b.T.contiguous(), a.T.contiguous())


def delta_norm(delta: LowRank) -> float:
    """Frobenius norm of a low-rank delta, without making it dense."""
    left, right = delta.left.double(), delta.right.double()
    return ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt().item()


def rms_pre_image(
    x: Float[Tensor, "row d_model"], wanted: Float[Tensor, "row d_model"], gain: Float[Tensor, " d_model"]
) -> Float[Tensor, "row d_model"]:
    """The input of an RMSNorm whose output points at `wanted`, with the norm of the present input x.

    RMSNorm(x) = gain * x / rms(x) has one length per direction: the output's direction (in units of the gain) can be
    chosen, its length cannot. A gain of zero lets nothing through and is left alone (pseudo-inverse).
    """
    inverse = torch.where(gain == 0, torch.zeros_like(gain), 1 / gain)
    direction = torch.where(gain == 0, x, wanted * inverse)
    return direction * (x.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True).clamp(min=1e-30))


def write_states(
    model: Model,
    rows: Sequence[Tokens],
    targets: Float[Tensor, "row d_model"],
    site: Site,
    *,
    layers: Sequence[int],
    bases: Mapping[int, Float[Tensor, "d_mlp kept"]],
    ridge: float,
    own: Bool[Tensor, "name context"],
    moments: Mapping[int, Float[Tensor, "d_mlp d_mlp"]] = MappingProxyType({}),
    weight: float | None = None,
    earlier: Sequence[Tokens] = (),
) -> tuple[dict[str, LowRank], dict[str, Any]]:
    """(Deltas, report) that move the state at the last token of each row to its target, by closed-form writes into
    the MLP output matrices of some layers.

    Each layer takes 1 / (layers left) of what is still missing, measured anew after the layer below was written.
    A name's rows (one per context, names outermost) are averaged over its own contexts into one key and residual.

    Args:
        site: where the states and targets are taken; at or above the last layer.
        bases: layer -> directions the write may use; a layer without one is written without protection.
        own: the contexts that count for each name.
        ridge: lambda as a share of the mean k^T M k, which is ||P k||^2 or k^T C^-1 k.
        moments: layer -> C, for a layer without a basis: average keys weigh against the write.
        weight: lambda itself; `ridge` then counts for nothing.
        earlier: mentions whose keys must keep their output (those of names written before).

    Raises:
        ValueError: a layer whose keys lie wholly in what is protected, or a C that has no inverse.
    """
    deltas: dict[str, LowRank] = {}
    gains, ranks = {}, {}
    before: Tensor | None = None
    for i, layer in enumerate(layers):
        norm = post_norm(model, layer)
        places = [Site(layer, "mlp_post"), site, *((norm[0], Site(layer, "mlp_out")) if norm else ())]
        with Edit(name="partial", base="", deltas=deltas).on(model):
            states = end_states(model, rows, places)
            fixed = end_states(model, earlier, places[:1])[places[0]].T if earlier else None
        missing = targets.to(states[site]) - states[site]
        if before is None:
            before = missing.norm(dim=-1)[own.flatten()].mean()
            _warn_of_sinks(states[site], targets.to(states[site]))
        step = missing / (len(layers) - i)
        if norm:
            x = states[norm[0]]
            step = rms_pre_image(x, states[Site(layer, "mlp_out")] + step, norm[1]) - x
        keys, residuals = (mean_over(t.unflatten(0, own.shape), own).T for t in (states[Site(layer, "mlp_post")], step))
        basis, moment = bases.get(layer), moments.get(layer)
        squared = (keys * (project(basis, keys) if moment is None else solve_moment(moment, keys))).sum(0)
        if not squared.mean() > 0:
            raise ValueError(f"layer {layer}: the keys to be rewritten lie wholly in the protected span; raise energy=")
        strength = (ridge * squared.mean()).item() if weight is None else weight
        left, right = closed_form(keys, residuals, basis, strength, fixed, moment)
        name, stored_in_first = model.w_out(layer)
        deltas[name] = low_rank(left, right, stored_in_first)
        gains[layer] = (squared / (strength + squared)).mean().item()
        ranks[layer] = None if basis is None else basis.shape[1]
    with Edit(name="partial", base="", deltas=deltas).on(model):
        after = (targets.to(missing) - end_states(model, rows, [site])[site]).norm(dim=-1)[own.flatten()].mean()
    sizes = {name: delta_norm(delta) for name, delta in deltas.items()}
    shares = {name: size / model.held[name].norm().item() for name, size in sizes.items()}
    if large := [f"{name} ({share:.1f})" for name, share in shares.items() if share > LARGE]:
        warnings.warn(
            f"the write is longer than what is there, ||delta|| / ||W||: {', '.join(large)}; other texts will drift, "
            "protect less (energy=) or take other layers=",
            stacklevel=3,
        )
    report = {
        "layers": list(layers),
        "free_rank": [ranks[layer] for layer in layers],
        "gain": [gains[layer] for layer in layers],
        "distance_before": None if before is None else before.item(),
        "distance_after": after.item(),
        "delta_norm": sizes,
        "delta_share": shares,
    }
    return deltas, report


def _warn_of_sinks(states: Float[Tensor, "row d_model"], targets: Float[Tensor, "row d_model"]) -> None:
    """Source: massive activations, arXiv 2402.17762."""
    norms = torch.cat([states, targets]).norm(dim=-1)
    if (factor := (norms.max() / norms.median()).item()) > OUTLYING:
        warnings.warn(
            f"a state to be rewritten is {factor:.0f} times as long as the median: an attention sink, into which a "
            "write does harm everywhere; give contexts= with text in front of the name",
            stacklevel=4,
        )
