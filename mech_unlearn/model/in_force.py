"""What is in force on a model beside its weights: interventions of edits, hooks, and forward passes put in place of
its own. One object a model, `Model.in_force`; whoever must know whether the plain forward pass is all there is asks it.

Hooks count by identity: those that loading gave the model are known from the start. Others were hung on later, by the
bridge itself where it wires its layers in the first forward pass, or by somebody else.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

BRIDGE = "transformer_lens.model_bridge."
"""Where the bridge's own hooks are written."""


def _hooks(module: Any) -> Iterator[tuple[int, Any]]:
    """torch's numbers of a module's forward hooks, no two of which are the same, and the hooks."""
    yield from module._forward_hooks.items()
    yield from module._forward_pre_hooks.items()


@dataclass(frozen=True, eq=False)
class InForce:
    """What acts on one model's forward pass. Made by `load`; edits write to `interventions`, `saved` and
    `own_hooks`."""

    hf: Any = field(repr=False)
    layers: tuple[Any, ...] = field(repr=False)
    """The bridge's decoder layers."""
    points: Mapping[str, Any] = field(repr=False)
    """Every name of a hook point -> the point."""
    interventions: list[Any] = field(default_factory=list)
    """Activation interventions of the edits that are on, in order; a clone carries them too."""
    saved: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """What each edit that is on puts back when it is left, in order: HF parameter name -> the weight before it."""
    own_hooks: set[int] = field(default_factory=set)
    """ids of the hook handles at points that belong to these interventions."""
    given: frozenset[int] = field(init=False, repr=False)
    """Numbers of the hooks that loading gave the model."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "given", frozenset(n for module in self.hf.modules() for n, _ in _hooks(module)))

    def handles(self) -> set[int]:
        """ids of the hook handles that hang at points now."""
        return {id(handle) for point in self.points.values() for handle in point.fwd_hooks}

    def foreign_hooks(self) -> bool:
        """Whether a hook at a point belongs to no intervention."""
        return bool(self.handles() - self.own_hooks)

    def hooked(self, under: str = "") -> bool:
        """Whether a hook hangs at a point whose name begins so."""
        return any(point.fwd_hooks for name, point in self.points.items() if name.startswith(under))

    def as_loaded(self, *modules: Any) -> bool:
        """Whether these modules have no hook but those that loading or the bridge itself gave."""
        return all(
            number in self.given or (getattr(hook, "__module__", None) or "").startswith(BRIDGE)
            for module in modules
            for number, hook in _hooks(module)
        )

    @property
    def layers_bypassed(self) -> bool:
        """Whether the first decoder layer's forward was replaced: states are read out without any layer."""
        return "forward" in self.layers[0].__dict__

    @property
    def forward_replaced(self) -> bool:
        """Whether something answers in place of the model's own forward pass: a prefix, or models that join in."""
        return "forward" in self.hf.__dict__

    @property
    def moves_positions(self) -> bool:
        """Whether an intervention puts tokens in front of prompts, so that states stand elsewhere than their tokens."""
        return any(intervention.moves_positions for intervention in self.interventions)

    def nothing(self) -> bool:
        """Whether nothing but the weights acts: no intervention, no hook anywhere, no forward pass replaced."""
        replaced = any("forward" in module.__dict__ for module in (self.hf, *self.layers))
        return not (self.interventions or replaced or self.hooked()) and self.as_loaded(*self.hf.modules())

    def update(self, digest: Any) -> None:
        """Feed settings and tensors of the interventions to a hash."""
        for intervention in self.interventions:
            digest.update(repr(intervention.settings).encode())
            for tensor in intervention.tensors.values():
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())

    def digest(self) -> str | None:
        """SHA-256 over the interventions; None where there is none."""
        if not self.interventions:
            return None
        digest = hashlib.sha256()
        self.update(digest)
        return digest.hexdigest()
