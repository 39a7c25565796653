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
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mech_unlearn.core import Site
from mech_unlearn.model.in_force import InForce

Write = Callable[[Tensor], Tensor | None]
"""Reads an activation and gives back its replacement, or None to leave it as it is."""


MLP_WRITER = (
    r"((mlp|ffn|feed_forward|mlp_block|block_sparse_moe)\.)?((shared_)?experts?\.(\d+\.)?)?"
    r"(c_proj|down_proj|dense_4h_to_h|fc_out|fc2|w2)(\.weight)?"
)
"""Names of the matrices that write an MLP's output, below the layer's."""


JOINT = (("attn", "split_qkv_matrix", "qkv"), ("mlp", "split_gate_up_matrix", ("gate", "in")))
"""In a block of TransformerBridge: the component with a joint matrix, what splits it, and its parts."""


def _undrawn(make: Callable[[Any], tuple[Any, ...]], module: Any) -> tuple[Any, ...]:
    """Parts made by the bridge, which begins them with random weights: the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        return make(module)


@dataclass(frozen=True, eq=False)
class JointMatrix:
    """A module with a joint matrix that TransformerBridge reads in parts."""

    path: str
    """HF path of the module."""
    module: Any
    make: Callable[[Any], tuple[Any, ...]]
    """Makes the parts of a module like this one."""
    parts: tuple[Any, ...]
    """The linear layers that the forward pass reads: views of the joint matrix, or copies."""


class _Seen(Exception):
    """Ends the forward pass of one token once the first layer has shown what a layer returns."""


def _noted(fired: list[bool], i: int, write: Write, x: Tensor, hook: Any) -> Tensor | None:
    """What a write makes of an activation, noted as having been called."""
    fired[i] = True
    return write(x)


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
    keeps_prefix: bool = field(kw_only=True)
    """Whether keys and values of a prefix, one pair a layer, are all that later tokens read of it; else every pass
    reads whole rows (state-space and convolution layers, some ALiBi models)."""
    in_force: InForce = field(kw_only=True)
    """What acts on the forward pass beside the weights."""

    def __repr__(self) -> str:
        acts = f", {len(self.in_force.interventions)} interventions in force" if self.in_force.interventions else ""
        return f"Model({self.name!r}, {self.n_layers} layers of {self.d_model}, {self.dtype}, {self.device}{acts})"

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

    def state_hash(self) -> str:
        """`hash()`, and over the interventions in force where there are any."""
        if not self.in_force.interventions:
            return self.hash()
        digest = hashlib.sha256(self.hash().encode())
        self.in_force.update(digest)
        return digest.hexdigest()

    @cached_property
    def layer_rest(self) -> tuple[None, ...] | None:
        """What a decoder layer returns behind the hidden states: None if it returns only these, and not in a tuple."""
        seen: list[Any] = []

        def look(module: Any, args: tuple, out: Any) -> None:
            seen.append(out)
            raise _Seen

        handle = self.bridge.blocks[0].register_forward_hook(look)
        try:
            with torch.no_grad():
                self.logits(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        except _Seen:
            pass
        finally:
            handle.remove()
        return tuple(None for _ in seen[0][1:]) if isinstance(seen[0], tuple) else None

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
        names = [self.resolve(place) for place, _ in writes]
        handles = []
        try:
            for i, (name, (_, write)) in enumerate(zip(names, writes, strict=True)):
                point = self.points[name]
                point.add_hook(partial(_noted, fired, i, write))
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
        for joint in self.joints():
            if not any(name.startswith(f"{joint.path}.") for name in names):
                continue
            with torch.no_grad():
                for part, fresh in zip(joint.parts, joint.make(joint.module), strict=True):
                    for key, weight in part.named_parameters():
                        if (new := getattr(fresh, key)).data_ptr() != weight.data_ptr():
                            weight.copy_(new)

    def joints(self) -> list[JointMatrix]:
        """Every module whose joint matrix (QKV, or gate and up) the forward pass reads in parts."""
        found = []
        for block in self.bridge.blocks:
            for joint, maker, names in JOINT:
                bridge: Any = getattr(block, joint, None)
                make, path = getattr(bridge, maker, None), _hf_path(bridge, self.hf_paths)
                if make is not None and path is not None:
                    parts = tuple(getattr(bridge, name).original_component for name in names)
                    found.append(JointMatrix(path, bridge.original_component, partial(_undrawn, make), parts))
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

    @property
    def n_heads(self) -> int:
        """Attention heads of a layer."""
        return self.bridge.cfg.n_heads

    def component(self, name: str) -> Any:
        """The part of the network that TransformerLens calls so (`ln_final`, `unembed`, `blocks.0.attn.o`).

        Raises:
            KeyError: the model has no such part.
        """
        try:
            return self.bridge.get_submodule(name)
        except AttributeError as error:
            raise KeyError(f"model {self.name!r} has no part {name!r}") from error

    def require_unprocessed(self) -> None:
        """Check that the weights are those of the checkpoint.

        Raises:
            RuntimeError: they were folded into one another, so that an edit of them would be another.
        """
        if getattr(self.bridge, "_weights_processed", False):
            raise RuntimeError(f"the weights of {self.name!r} were folded; load the model anew")

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
            KeyError: no such layer, an MLP without one output matrix (a mixture of experts), or no MLP.
        """
        name, *further = self.mlp_writers(layer)
        if further or self.held[name].ndim > 2:
            raise KeyError(
                f"model {self.name!r}: layer {layer} of {type(self.hf).__name__} is a mixture of experts ({name} "
                f"{list(self.held[name].shape)}), of which each token takes its own, so that there is no one MLP "
                "output matrix; methods that train work on it (npo, grad_diff, rmu)"
            )
        return name, self.transposed(name)

    def mlp_writers(self, layer: int) -> tuple[str, ...]:
        """Names in `held` of all matrices that write the MLP's output: one, or those of experts and of what they share.

        Raises:
            KeyError: no such layer, or no MLP in it (state-space and recurrent layers).
        """
        pattern = re.compile(rf"{re.escape(self.block(layer))}\.{MLP_WRITER}")
        names = tuple(name for name in self.held if pattern.fullmatch(name))
        if not names:
            raise KeyError(
                f"model {self.name!r}: layer {layer} of {type(self.hf).__name__} has no MLP output matrix; methods "
                "that train work on it (npo, grad_diff)"
            )
        return names

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


def require_positions(model: Model) -> None:
    """Check that position t of a prompt is position t of the states.

    Raises:
        ValueError: an intervention in force puts tokens in front of prompts.
    """
    if model.in_force.moves_positions:
        raise ValueError(
            f"an in-context edit is in force on {model.name!r}: it puts tokens in front of prompts, so states have "
            "other positions than the prompt; leave the edit (it changes no weight)"
        )


POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
"""Names of an RMSNorm between the MLP and the residual stream (Gemma 2 and 3, OLMo 2; GLM 4)."""


@torch.no_grad()
def post_norm(model: Model, layer: int) -> tuple[str, Float[Tensor, " d_model"]] | None:
    """(HF path of the MLP, gain of the norm behind it), or None where the MLP writes to the residual stream itself.

    Source: with such a norm a residual shift is no linear function of W_out, so that a write has to aim at the
    norm's input.
    """
    block = model.block(layer)
    for norm in POST_NORMS:
        if f"{block}.{norm}.weight" in model.held:
            ones = torch.ones(1, 1, model.d_model, device=model.device, dtype=model.dtype)
            return f"{block}.mlp", model.hf.get_submodule(f"{block}.{norm}")(ones).flatten().double()
    return None
