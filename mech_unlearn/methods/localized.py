"""Localized: only the layers, neurons or heads that a locator named are trained.

Paper:    Guo et al. 2024, Mechanistic Unlearning: Robust Knowledge Unlearning and Editing via Mechanistic Localization,
          arXiv 2410.12949: fine-tuning under a mask of located components.
Changes:  of a layer its MLP (or attention, or both); of neuron j row j of W_in and W_gate and column j of W_out; of a
          head its rows of W_Q and columns of W_O, and of W_K and W_V where all heads that share them are named.
Needs:    sites: given, or the largest entries of an `Attribution` (see `Localized.at`).
Differs:  which loss is minimised is the wrapped method's (the paper: a false target with retained facts and texts).
          Biases and norms are trained where whole layers are named, never for neurons or heads.
Fails:    no better than the locator: sites that read the answer out, rather than look it up, make a suppressor.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods.npo import Npo
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around, Trains
from mech_unlearn.training.wrapping import extended, require_trains, wrapped

BlockPart = Literal["mlp", "attention", "block"]
PART_NAMES = {
    "mlp": {"mlp", "feed_forward", "ffn", "block_sparse_moe"},
    "attention": {"attn", "self_attn", "attention", "self_attention"},
}
Masks = Mapping[str, Bool[Tensor, "..."]]


@dataclass(frozen=True, kw_only=True)
class Localized:
    """What is wrapped and where it trains; sites of all three kinds add up."""

    base: Trains = Npo()
    """A method that trains, with its own settings."""
    layers: tuple[int, ...] = ()
    """Layers that are trained as a whole."""
    part: BlockPart = "mlp"
    """What of these layers: "mlp" (the paper's lookup components), "attention" or the whole "block"."""
    neurons: tuple[tuple[int, int], ...] = ()
    """(layer, neuron)."""
    heads: tuple[tuple[int, int], ...] = ()
    """(layer, head)."""

    @classmethod
    def at(cls, attribution: Attribution, k: int, **settings: Any) -> "Localized":
        """The sites of the k largest entries; settings are those of the class.

        Raises:
            ValueError: no axis of layers, or labels that are not numbers.
        """
        return cls(**sites_of(attribution, k), **settings)

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes at the sites.

        Raises:
            ValueError: no sites, sites the model lacks, a base that does not train, or what the base refuses.
        """
        require_trains(self.base, "localized")
        if self.part not in get_args(BlockPart):
            raise ValueError(f"part must be 'mlp', 'attention' or 'block', got {self.part!r}")
        if not (self.layers or self.neurons or self.heads):
            raise ValueError(
                "localized has no sites: give layers=, neurons= or heads=, or Localized.at(attribution, k)"
            )
        whole = [re.escape(_prefix(model, layer, self.part)) for layer in sorted(set(self.layers))]
        masks = joined(neuron_masks(model, self.neurons), head_masks(model, self.heads))
        masks = {name: mask for name, mask in masks.items() if not any(re.match(path, name) for path in whole)}
        pattern = "|".join([f"^{path}" for path in whole] + [f"^{re.escape(name)}$" for name in masks])
        inner = extended(around, "localized", self, masks=(lambda _: masks,) if masks else (), trainable=pattern)
        return wrapped(self.base.fit(model, forget, retain, inner), "localized", self)


def sites_of(attribution: Attribution, k: int) -> dict[str, tuple]:
    """Fields of `Localized` for the k largest entries: neurons or heads where they are an axis, else layers.

    Entries that differ only along further axes (fact, token) name one site.

    Raises:
        ValueError: no axis of layers, labels that are not numbers, or a k that is not positive.
    """
    if "layer" not in attribution.axes:
        raise ValueError(f"{attribution.name} has axes {attribution.axes}, none of layers: it names no sites to train")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    kind = next((axis for axis in ("neuron", "head") if axis in attribution.axes), "layer")
    found = dict.fromkeys(tuple(labels[axis] for axis in dict.fromkeys(("layer", kind)))
                          for labels, _ in attribution.top(k))  # fmt: skip
    if not all(isinstance(label, int) for site in found for label in site):
        raise ValueError(f"{attribution.name}: {next(iter(found))} is not a numbered {kind}; give sites by number")
    return {f"{kind}s": tuple(site[0] if kind == "layer" else site for site in found)}


def joined(*masks: Masks) -> dict[str, Tensor]:
    """What any of the masks lets through."""
    out: dict[str, Tensor] = {}
    for some in masks:
        for name, mask in some.items():
            out[name] = out[name] | mask if name in out else mask
    return out


def neuron_masks(model: Model, neurons: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Entries of W_in, W_gate and W_out that belong to (layer, neuron) pairs, by the weight's name.

    Raises:
        ValueError: a layer or neuron the model lacks, or an MLP whose input matrices are not one row per neuron.
    """
    masks: dict[str, Tensor] = {}
    for layer, chosen in _by_layer(model, neurons).items():
        out, by_neuron = model.w_out(layer)
        d_mlp = model.held[out].shape[0 if by_neuron else 1]
        _require(chosen, d_mlp, "neuron", layer, model)
        into = [name for name in _matrices(model, out.removesuffix(".weight").rpartition(".")[0] + ".") if name != out]
        for name in (*into, out):
            rows = by_neuron if name == out else not by_neuron
            if model.held[name].shape[0 if rows else 1] != d_mlp:
                raise ValueError(f"weight {name!r} of {model.name!r} does not have one entry per neuron: name layers")
            masks[name] = _lines(model, name, chosen, rows)
    return masks


def head_masks(model: Model, heads: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Entries of the attention's matrices that belong to (layer, head) pairs, by the weight's name.

    Raises:
        ValueError: a layer or head the model lacks, or an attention of unknown shape.
    """
    masks: dict[str, Tensor] = {}
    config: Any = model.hf.config
    n, n_kv = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    for layer, chosen in _by_layer(model, heads).items():
        _require(chosen, n, "head", layer, model)
        shared = [kv for kv in range(n_kv) if {h for h in range(n) if h * n_kv // n == kv} <= chosen]
        for name in _matrices(model, _prefix(model, layer, "attention")):
            leaf = name.split(".")[-2]
            rows = True
            if leaf in ("q_proj", "k_proj", "v_proj"):
                count = n if leaf == "q_proj" else n_kv
                lines = _spans(chosen if leaf == "q_proj" else shared, model.held[name].shape[0] // count)
            elif leaf in ("o_proj", "dense"):
                rows, lines = False, _spans(chosen, model.held[name].shape[1] // n)
            elif leaf == "query_key_value":  # head by head: its q, k and v
                lines = _spans(chosen, model.held[name].shape[0] // n)
            elif leaf == "c_attn":  # [d_model, q k v]
                size = model.held[name].shape[1] // (3 * n)
                rows, lines = False, _spans([part * n + head for part in range(3) for head in chosen], size)
            elif leaf == "c_proj":
                lines = _spans(chosen, model.held[name].shape[0] // n)
            else:
                raise ValueError(f"attention weight {name!r} of {model.name!r} has an unknown layout: name layers")
            if lines:
                masks[name] = _lines(model, name, lines, rows)
    return masks


def _spans(items: Iterable[int], size: int) -> list[int]:
    return [i * size + j for i in items for j in range(size)]


def _lines(model: Model, name: str, lines: Iterable[int], rows: bool) -> Bool[Tensor, "rows columns"]:
    mask = torch.zeros(model.held[name].shape, dtype=torch.bool)
    at = torch.tensor(sorted(lines))
    mask[at if rows else (slice(None), at)] = True
    return mask


def _by_layer(model: Model, pairs: Sequence[tuple[int, int]]) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for layer, item in pairs:
        found.setdefault(layer, set()).add(item)
    _require(found, model.n_layers, "layer", None, model)
    return found


def _require(chosen: Iterable[int], count: int, what: str, layer: int | None, model: Model) -> None:
    where = "" if layer is None else f" in layer {layer}"
    for item in chosen:
        if not 0 <= item < count:
            raise ValueError(f"model {model.name!r} has no {what} {item}{where}; {what}s 0..{count - 1}")


def _matrices(model: Model, prefix: str) -> list[str]:
    return [name for name, weight in model.held.items() if name.startswith(prefix) and weight.ndim == 2]


def _prefix(model: Model, layer: int, part: BlockPart) -> str:
    """What the names of a part's weights begin with."""
    _require((layer,), model.n_layers, "layer", None, model)
    block = model.block(layer)
    if part == "block":
        return f"{block}."
    found = {name[len(block) :].split(".")[1] for name in model.held if name.startswith(f"{block}.")}
    names = sorted(found & PART_NAMES[part])
    if len(names) != 1:
        known = ", ".join(sorted(found))
        raise ValueError(
            f"model {model.name!r}: no {part} by name in {block!r}, which holds {known}; give neurons= or heads="
        )
    return f"{block}.{names[0]}."
