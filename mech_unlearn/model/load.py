"""Loading a causal language model by hub id, folder or object, and booting it into a bridge.

Booting replaces modules; one short forward pass before and one after show that the model is still the same.
"""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mech_unlearn.model.bridge import Model, _hf_path
from mech_unlearn.model.checkpoint import MERGED, guarded, read_checkpoint, read_tokenizer, require_plain_text_model
from mech_unlearn.model.in_force import InForce

TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits before and after booting, as a share of the largest logit; 1e-4 in other dtypes. Some
attention is written anew by the bridge and adds in another order: over fifty tiny architectures the share is at most
2e-6 in float32, 3e-3 in float16 and 2.4e-2 in bfloat16; Cohere, which the bridge gets wrong, differs by 0.7."""
LISTED = "docs/architectures.md lists what loads"


def _buffers(hf: Any) -> dict[str, Tensor]:
    """The buffers of an unbooted model that are saved with its weights."""
    return {key: x for key, x in hf.state_dict(keep_vars=True).items() if not isinstance(x, nn.Parameter)}


def _quiet_imports():
    """Import TransformerBridge without the warnings that it makes of image processors it never uses."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        from transformer_lens.model_bridge import TransformerBridge
    finally:
        logging.set_verbosity(before)
    return TransformerBridge


def _require_adapter(name: str, hf: Any) -> None:
    """Check that the bridge knows this very class; it would take a like one by its config."""
    _quiet_imports()
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    kind = type(hf).__name__
    hf.config.architectures = [kind]
    try:
        chosen = determine_architecture_from_hf_config(hf.config)
    except ValueError:
        chosen = None
    if chosen != kind:
        raise ValueError(f"model {name!r}: transformer-lens has no adapter for {kind}; {LISTED}")


def _boot(name: str, hf: Any, tokenizer: Any, device: torch.device) -> Any:
    bridge_class = _quiet_imports()
    # The bridge edits the tokenizer it is given and may reload it from a hub: it gets a copy that says it has a BOS.
    clone = copy.deepcopy(tokenizer)
    clone.init_kwargs |= {"name_or_path": name, "add_bos_token": True}
    bridge = bridge_class.boot_transformers(name, hf_model=hf, tokenizer=clone, device=str(device))
    if getattr(bridge, "_weights_processed", False):
        raise RuntimeError(f"model {name!r}: the bridge folded its weights; edits and exports would be wrong")
    for block in bridge.blocks:
        # GPT-1 layers give a list, which the bridge (3.9) shows to no hook; a tuple it does.
        block.original_component.register_forward_hook(lambda _, __, out: tuple(out) if isinstance(out, list) else out)
        # Rotary angles are float32 in OLMo 2: HF casts rotated queries and keys back, the bridge (3.9) does not.
        for point in (getattr(getattr(block, "attn", None), key, None) for key in ("hook_rot_q", "hook_rot_k")):
            if isinstance(point, nn.Module):
                point.register_forward_hook(lambda _, __, rotated, dtype=hf.dtype: rotated.to(dtype))  # pyright: ignore
    return bridge


def _module_hooks(bridge: Any, points: dict[str, Any], paths: dict[int, str]) -> dict[str, str]:
    """HF module path -> canonical name of the hook on its output."""
    places = {}
    for point in points.values():
        if point.name.endswith("hook_out"):
            component = bridge.get_submodule(point.name.removesuffix(".hook_out"))
            if path := _hf_path(component, paths):
                places[path] = point.name
    return places


@dataclass(frozen=True, eq=False)
class _Before:
    """What a model said before it was booted, to two rows that differ in their last token."""

    ids: Int[Tensor, "2 pos"]
    logits: Float[Tensor, "2 pos d_vocab"]

    @property
    def size(self) -> float:
        return self.logits.abs().max().item()

    def differs(self, logits: Float[Tensor, "*row d_vocab"], of: Float[Tensor, "*row d_vocab"]) -> float | None:
        """The difference as a share of the largest logit, where it is more than rounding; None elsewhere."""
        share = (logits.float() - of).abs().max().item() / (self.size or 1.0)
        return None if share <= TOLERANCE.get(logits.dtype, 1e-4) else share


@torch.no_grad()
def _ask(name: str, hf: Any, positions: int = 12) -> _Before:
    """A forward pass over tokens from all over the vocabulary.

    Raises:
        ValueError: it fails, gives no numbers, or the last token changes what the model says before it.
    """
    vocabulary, limit = hf.config.vocab_size, getattr(hf.config, "max_position_embeddings", None) or positions
    row = torch.arange(1, min(positions, limit) + 1) * max(1, vocabulary // (positions + 2)) % vocabulary
    ids = torch.stack([row, row]).to(next(hf.parameters()).device)
    ids[1, -1] = (ids[1, -1] + 1) % vocabulary
    with guarded(name, "its own forward pass fails", LISTED):
        asked = _Before(ids, hf(input_ids=ids, use_cache=False).logits.float())
        if not asked.logits.isfinite().all():
            raise ArithmeticError("logits that are no numbers")
    first, second = asked.logits[:, :-1]
    if asked.differs(first.to(hf.dtype), second):
        raise ValueError(f"model {name!r}: {type(hf).__name__} reads what follows a token; a causal model is needed")
    return asked


@torch.no_grad()
def _require_same(name: str, hf: Any, before: _Before) -> None:
    """Check that a booted model says what it said before.

    Raises:
        ValueError: its logits differ.
    """
    with guarded(name, f"transformer-lens cannot run {type(hf).__name__}", LISTED):
        after = hf(input_ids=before.ids, use_cache=False).logits
    if share := before.differs(after, before.logits):
        raise ValueError(
            f"model {name!r}: {type(hf).__name__} is another model within transformer-lens: logits differ by "
            f"{share:.0%} of the largest; {LISTED}"
        )


@torch.no_grad()
def _keeps_prefix(hf: Any, layers: int, before: _Before) -> bool:
    """Whether keys and values of a prefix, one pair a layer, are all that later tokens read of it.

    Not so in state-space and convolution layers, nor where the bridge lays ALiBi out without the prefix.
    """
    from transformers import DynamicCache

    prefix, last, store = before.ids[:, :-1], before.ids[:, -1:], DynamicCache()
    try:
        hf(input_ids=prefix, past_key_values=store, use_cache=True)
        kept = [getattr(layer, "keys", None) for layer in store.layers]
        if len(kept) != layers or any(keys is None or keys.shape[2] != prefix.shape[1] for keys in kept):
            return False
        after = hf(input_ids=last, past_key_values=store, use_cache=True).logits
    except (IndexError, RuntimeError, TypeError, AttributeError, ValueError, KeyError):  # of a cache that does not fit
        return False
    return before.differs(after[:, -1], before.logits[:, -1]) is None


def _opened(
    source: Any, tokenizer: Any, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[str, Any, Any]:
    """(name, unbooted model, tokenizer)."""
    from transformers import PreTrainedModel

    if not isinstance(source, PreTrainedModel):
        if not isinstance(source, str | os.PathLike):
            merge = f"; {MERGED}" if hasattr(source, "merge_and_unload") else ""
            raise ValueError(f"{type(source).__name__} is neither a hub id, a folder nor a transformers model{merge}")
        name = os.fspath(source)
        hf = read_checkpoint(name, device, dtype, trust_remote_code)
        return name, hf, read_tokenizer(name, trust_remote_code) if tokenizer is None else tokenizer
    name = source.config.name_or_path or type(source).__name__
    if tokenizer is None:
        raise ValueError("an in-memory model needs its tokenizer: load(model, tokenizer=...)")
    return name, source, tokenizer


def _require_usable(name: str, hf: Any, tokenizer: Any) -> None:
    require_plain_text_model(name, hf.config)
    if getattr(hf, "_hf_peft_config_loaded", False):
        raise ValueError(f"model {name!r} holds a PEFT adapter beside its weights; {MERGED}")
    if hf.get_output_embeddings() is None:
        raise ValueError(f"model {name!r}: {type(hf).__name__} has no language-model head")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"model {name!r}: its tokenizer gives no character offsets; a fast tokenizer is needed")


def load(
    source: Any,
    *,
    tokenizer: Any = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Model:
    """Load a causal language model by hub id, local folder (of a model or of an adapter on one), GGUF file, or as an
    in-memory HF model.

    The model is put into evaluation mode and booted into a TransformerBridge without any processing of weights.
    An in-memory model keeps its own device and dtype.

    Raises:
        ValueError: no such model, not a causal language model of text alone, quantized weights, no
            tokenizer, missing, broken or non-finite weights, a model that TransformerBridge does not know or that is
            another one within it, or one that somebody else booted into a bridge.
    """
    name, hf, tokenizer = _opened(source, tokenizer, torch.device(device), dtype, trust_remote_code)
    _require_usable(name, hf, tokenizer)
    hf.eval()
    # Booting wraps the modules in place; a model that was booted before still shows its parameters by their HF names.
    before = getattr(hf, "_mech_unlearn", None)
    held, buffers, paths = before or (
        dict(hf.named_parameters()), _buffers(hf), {id(module): path for path, module in hf.named_modules()}
    )  # fmt: skip
    if any("._original_component" in key for key in held):
        raise ValueError(f"model {name!r} lies in a TransformerBridge already: give the HF model before it is booted")
    for key, weight in held.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"model {name!r}: weight {key!r} holds NaN or infinite values")
    _require_adapter(name, hf)
    asked = _ask(name, hf)
    object.__setattr__(hf, "_mech_unlearn", (held, buffers, paths))
    with guarded(name, f"transformer-lens cannot take {type(hf).__name__}", LISTED):
        bridge = _boot(name, hf, tokenizer, next(iter(held.values())).device)
    _require_same(name, hf, asked)
    points = bridge.hook_dict
    hooks = _module_hooks(bridge, points, paths)
    keeps = _keeps_prefix(hf, len(bridge.blocks), asked)
    in_force = InForce(hf, tuple(bridge.blocks), points)
    return Model(
        name, hf, bridge, tokenizer, held, paths, hooks, points, buffers, keeps_prefix=keeps, in_force=in_force
    )
