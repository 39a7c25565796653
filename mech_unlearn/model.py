"""A language model, ready to be looked into: the HF model, its TransformerBridge and its tokenizer.

The only file that knows the quirks of TransformerBridge, which is why it is over 300 lines:

* the HF parameters and buffers are held before the bridge is booted, because booting renames them; edit
  through `held`, export from `held`, train a `plain_copy`;
* weights are never processed (no folding, no centring), so they stay those of the HF checkpoint;
* text is tokenized with the HF tokenizer, never by the bridge, which would prepend a second BOS;
* transformer-lens 3.9 ignores an unknown hook name; `Model.resolve` refuses it and names the nearest.
"""

import copy
import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mech_unlearn.core import Site

Write = Callable[[Tensor], Tensor | None]
"""Reads an activation and gives back its replacement, or None to leave it as it is."""


JOINT = (("attn", "split_qkv_matrix", "qkv"), ("mlp", "split_gate_up_matrix", ("gate", "in")))
"""In a block of TransformerBridge: the component with a joint matrix, what splits it, and its parts."""


@dataclass(frozen=True, eq=False)
class Split:
    """A module with a joint matrix that TransformerBridge reads in parts."""

    path: str
    """HF path of the module."""
    module: Any
    make: Callable[[Any], tuple[Any, ...]]
    """Makes the parts of a module like this one."""
    parts: tuple[Any, ...]
    """The linear layers that the forward pass reads: views of the joint matrix, or copies."""


@dataclass(frozen=True)
class Model:
    """A causal language model with held parameters, hooks by name and its own tokenizer.

    Make one with `load`. The weights in `held` are live: writing to them in place changes the model.
    """

    name: str
    hf: Any
    bridge: Any
    tokenizer: Any
    held: dict[str, nn.Parameter]
    """HF parameter name -> live parameter. Tied parameters appear once, under the first name."""
    hf_paths: dict[int, str] = field(repr=False)
    """id of an HF module -> its path before the bridge was booted."""
    hf_hooks: dict[str, str] = field(repr=False)
    """HF module path -> canonical hook name of its output."""
    points: dict[str, Any] = field(repr=False)
    """Every name of a hook point -> the point; the bridge makes this anew each time it is asked."""
    buffers: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """HF name -> buffer that is saved with the weights; no method changes one."""
    known: dict[str, Any] = field(default_factory=dict, repr=False)
    """What was found out about the model once and does not change."""
    active: list[Any] = field(default_factory=list, repr=False)
    """Activation interventions in force now; kept by `mech_unlearn.edit`, so that a clone can carry them too."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """All that a checkpoint holds: `held` and `buffers`."""
        return {**self.held, **self.buffers}

    @property
    def n_layers(self) -> int:
        return self.bridge.cfg.n_layers

    @property
    def d_model(self) -> int:
        return self.bridge.cfg.d_model

    @property
    def n_ctx(self) -> int | None:
        """Positions that the model has; None where its config gives no limit."""
        return getattr(self.hf.config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return next(iter(self.held.values())).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.held.values())).dtype

    def hash(self) -> str:
        """SHA-256 over the names, shapes, dtypes and bytes of weights and buffers: the identity of the checkpoint."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.weights.items()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def resolve(self, name: str | Site) -> str:
        """The canonical hook name for a `Site`, a TransformerLens alias or canonical name, or an HF module path.

        Raises:
            KeyError: the model has no such place; the message lists the nearest names that exist.
        """
        spelled = name.hook if isinstance(name, Site) else name
        if spelled in self.points:
            return self.points[spelled].name
        if spelled in self.hf_hooks:
            return self.hf_hooks[spelled]
        near = difflib.get_close_matches(spelled, [*self.points, *self.hf_hooks], n=3, cutoff=0.5)
        raise KeyError(
            f"model {self.name!r} has no hook {spelled!r}; nearest: {', '.join(near) or 'none'} "
            f"(layers 0..{self.n_layers - 1})"
        )

    @contextmanager
    def hooks(self, *writes: tuple[str | Site, Write]) -> Iterator[None]:
        """Run with functions attached to places; each may return a replacement for what it is given.

        Raises:
            KeyError: an unknown place (before anything runs).
            RuntimeError: a function was never called although the block ended normally.
        """
        fired = [False] * len(writes)

        def attach(i: int, write: Write):
            def run(x: Tensor, hook: Any) -> Tensor | None:
                fired[i] = True
                return write(x)

            return run

        names = [self.resolve(place) for place, _ in writes]
        handles = []
        try:
            for i, (name, (_, write)) in enumerate(zip(names, writes, strict=True)):
                point = self.points[name]
                point.add_hook(attach(i, write))
                handles.append((point, point.fwd_hooks[-1]))
            yield
        finally:
            for point, handle in handles:
                handle.hook.remove()
                point.fwd_hooks.remove(handle)
        if not all(fired):
            raise RuntimeError(f"hooks that never fired: {[names[i] for i, f in enumerate(fired) if not f]}")

    def logits(self, ids: Int[Tensor, "batch pos"], mask: Tensor | None = None) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the plain forward pass. `mask` is the attention mask of a padded batch (1 = real token).

        Raises:
            ValueError: more tokens than the model has positions.
        """
        if self.n_ctx is not None and ids.shape[1] > self.n_ctx:
            raise ValueError(f"a prompt of {ids.shape[1]} tokens; {self.name!r} has {self.n_ctx} positions")
        return self.hf(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def require_live(self, names: Iterable[str]) -> None:
        """Check that these held weights are the ones the forward pass reads, after writing to them in place.

        Where parts of a joint matrix are copies (an interleaved QKV matrix), those are brought up to date.

        Raises:
            RuntimeError: a parameter was replaced since loading, so that a write to it changes nothing.
        """
        names = list(names)
        live = {k.replace("._original_component", ""): w for k, w in self.hf.named_parameters(remove_duplicate=False)}
        for name in names:
            if name in live and live[name].data_ptr() != self.held[name].data_ptr():
                raise RuntimeError(
                    f"weight {name!r} of {self.name!r} is a copy, not the live weight; load the model anew"
                )
        for split in self.splits():
            if not any(name.startswith(f"{split.path}.") for name in names):
                continue
            with torch.no_grad():
                for part, fresh in zip(split.parts, split.make(split.module), strict=True):
                    for key, weight in part.named_parameters():
                        if (new := getattr(fresh, key)).data_ptr() != weight.data_ptr():
                            weight.copy_(new)

    def splits(self) -> list[Split]:
        """Every module whose joint matrix (QKV, or gate and up) the forward pass reads in parts."""
        found = []
        for block in self.bridge.blocks:
            for joint, maker, names in JOINT:
                bridge: Any = getattr(block, joint, None)
                make, path = getattr(bridge, maker, None), _hf_path(bridge, self.hf_paths)
                if make is not None and path is not None:
                    parts = tuple(getattr(bridge, name).original_component for name in names)
                    found.append(Split(path, bridge.original_component, make, parts))
        return found

    def plain_copy(self) -> Any:
        """A second, unbooted HF model with these weights, for training: this model is never touched.

        Train there and not here, because the bridge adds parameters that no checkpoint has (transformer-lens 3.9)
        and reads joint matrices in parts, where autograd leaves their gradients.

        Raises:
            RuntimeError: weights that a model made from the config does not hold; see `require_same`.
        """
        config = copy.deepcopy(self.hf.config)  # making a model writes its dtype and attention into the config
        with torch.random.fork_rng(devices=[]):  # the random weights it begins with are not the caller's
            hf = type(self.hf)._from_config(config, dtype=self.dtype, attn_implementation="eager")
        # Assigned, not copied into place: a weight kept in another dtype than the rest stays in it.
        hf.load_state_dict({k: w.detach().clone() for k, w in self.weights.items()}, strict=False, assign=True)
        hf.tie_weights()
        hf.generation_config = copy.deepcopy(self.hf.generation_config)
        self.require_same(hf, "the plain copy")
        return hf.to(self.device).eval()

    def require_same(self, hf: Any, what: str) -> None:
        """Check that an unbooted HF model has the values of these weights and buffers exactly, and no weights beside.

        A dtype that holds the same values may be wider: transformers keeps some weights in float32.

        Raises:
            RuntimeError: names the first that are missing, differ or are too many.
        """
        theirs = hf.state_dict(keep_vars=True)
        shared = {id(theirs[name]) for name in self.weights if name in theirs}
        wrong = [name for name, weight in theirs.items() if id(weight) not in shared]
        for name, weight in self.weights.items():
            if name in theirs:
                wide = torch.promote_types(theirs[name].dtype, weight.dtype)
                if torch.equal(theirs[name].to(weight.device, wide), weight.to(wide)):
                    continue
            wrong.append(name)
        if wrong:
            raise RuntimeError(f"{what} of {self.name!r} has other weights: {', '.join(sorted(wrong)[:3])}")

    def block(self, layer: int) -> str:
        """HF path of a decoder layer, for example `model.layers.3`.

        Raises:
            KeyError: no such layer.
        """
        if not 0 <= layer < self.n_layers:
            raise KeyError(f"model {self.name!r} has no layer {layer}; layers 0..{self.n_layers - 1}")
        return self.hf_paths[id(_unwrapped(self.bridge.blocks[layer]))]

    def w_out(self, layer: int) -> tuple[str, bool]:
        """Name in `held` of the matrix that writes the MLP's output, and whether it is stored [d_mlp, d_model].

        Raises:
            KeyError: no such layer, or an MLP without one output matrix (a mixture of experts).
        """
        inside = r"((mlp|ffn|feed_forward)\.)?(c_proj|down_proj|dense_4h_to_h|fc_out|fc2)\.weight"
        pattern = re.compile(rf"{re.escape(self.block(layer))}\.{inside}")
        names = [name for name in self.held if pattern.fullmatch(name)]
        if len(names) != 1:
            raise KeyError(f"model {self.name!r}: found {len(names)} MLP output matrices in layer {layer}, need one")
        return names[0], self.transposed(names[0])

    def transposed(self, name: str) -> bool:
        """Whether a weight of `held` is stored [d_in, d_out], as in GPT-1 and GPT-2."""
        from transformers.pytorch_utils import Conv1D

        return isinstance(_unwrapped(self.hf.get_submodule(name.rpartition(".")[0])), Conv1D)


def _unwrapped(component: Any) -> Any:
    """The HF module within a component of the bridge, or of bridges booted over each other; an HF module itself."""
    while getattr(component, "original_component", None) is not None:
        component = component.original_component
    return component


def _hf_path(component: Any, paths: dict[int, str]) -> str | None:
    """HF path of a component of the bridge; None for one that wraps no module."""
    inner = _unwrapped(component)
    return None if inner is component else paths.get(id(inner))


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
    return Model(name, hf, bridge, tokenizer, held, paths, _module_hooks(bridge, points, paths), points, buffers)
