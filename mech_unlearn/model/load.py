"""Loading a causal language model by hub id, folder or object, and booting it into a bridge."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mech_unlearn.model.bridge import Model, _hf_path
from mech_unlearn.model.in_force import InForce


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


def _boot(name: str, hf: Any, tokenizer: Any, device: torch.device) -> Any:
    bridge_class = _quiet_imports()
    # The bridge edits the tokenizer it is given and may reload it from a hub: it gets a copy that says it has a BOS.
    clone = copy.deepcopy(tokenizer)
    clone.init_kwargs |= {"name_or_path": name, "add_bos_token": True}
    bridge = bridge_class.boot_transformers(name, hf_model=hf, tokenizer=clone, device=str(device))
    if getattr(bridge, "_weights_processed", False):
        raise RuntimeError(f"model {name!r}: the bridge folded its weights; edits and exports would be wrong")
    for block in bridge.blocks:
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


def _read_checkpoint(source: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    local = Path(source).expanduser()
    if local.exists() and not (local / "config.json").exists():
        raise ValueError(f"model {source!r}: the folder holds no config.json; give a folder made by save_pretrained")
    if not local.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ValueError(f"model {source!r}: no such folder")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {source!r}: not a local folder, and not to be had from the hub ({str(error).splitlines()[0]})"
        ) from error
    remote = trust_remote_code and hasattr(config, "auto_map")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise ValueError(f"model {source!r} is a {config.model_type!r} model, not a causal language model")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        attn_implementation="eager",
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    hf, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"model {source!r}: weights missing from the checkpoint: {sorted(report['missing_keys'])[:5]}")
    return hf.to(device)


def load(
    source: Any,
    *,
    tokenizer: Any = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Model:
    """Load a causal language model by hub id, local folder or as an in-memory HF model.

    The model is put into evaluation mode and booted into a TransformerBridge without any processing of weights.
    An in-memory model keeps its own device and dtype.

    Raises:
        ValueError: no such model, not a causal language model, no tokenizer, missing or non-finite weights, or a model
            that somebody else booted into a bridge.
    """
    from transformers import AutoTokenizer, PreTrainedModel

    in_memory = isinstance(source, PreTrainedModel)
    name = (source.config.name_or_path or type(source).__name__) if in_memory else os.fspath(source)
    if tokenizer is None:
        if in_memory:
            raise ValueError("an in-memory model needs its tokenizer: load(model, tokenizer=...)")
        hf = _read_checkpoint(name, torch.device(device), dtype, trust_remote_code)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"model {name!r} has no tokenizer; save one into the folder or pass tokenizer=") from error
    else:
        hf = source if in_memory else _read_checkpoint(name, torch.device(device), dtype, trust_remote_code)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"model {name!r}: its tokenizer gives no character offsets; a fast tokenizer is needed")
    hf.eval()
    if not hf.config.architectures:
        hf.config.architectures = [type(hf).__name__]  # the bridge picks its adapter by this name
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
    object.__setattr__(hf, "_mech_unlearn", (held, buffers, paths))
    bridge = _boot(name, hf, tokenizer, next(iter(held.values())).device)
    points = bridge.hook_dict
    hooks = _module_hooks(bridge, points, paths)
    in_force = InForce(hf, tuple(bridge.blocks), points)
    return Model(name, hf, bridge, tokenizer, held, paths, hooks, points, buffers, in_force=in_force)
