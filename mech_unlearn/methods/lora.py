"""Lora: low-rank factors are trained in place of the weights, through peft.

Paper:    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 4.1; for
          unlearning as in the code of TOFU (arXiv 2401.06121).
Changes:  the linear layers of the decoder blocks that match `targets` and that the wrapped method would train, each by
          alpha / rank x B A, of rank at most `rank`; the edit keeps the two factors.
Needs:    peft.
Differs:  no dropout by default, so that a batch's loss does not depend on a random state (TOFU: 0.05). Embeddings,
          norms, biases and the output head are never adapted.
Fails:    a low-rank change is a suppressor that can be told apart and undone; masks of single weights cannot be kept,
          because the factors share them.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit, LowRank
from mech_unlearn.methods.npo import Npo
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around, Trains
from mech_unlearn.training.training import require_positive
from mech_unlearn.training.wrapping import extended, require_trains, wrapped


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What is wrapped and how it is adapted. Defaults: TOFU's code."""

    base: Trains = Npo()
    """A method that trains, with its own settings; rates are usually ten times those of full training."""
    rank: int = 8
    """Rank of each change."""
    alpha: float = 32.0
    """The change is alpha / rank x B A."""
    targets: str = ""
    """Regular expression for the names of the linear layers; empty matches all of the decoder blocks."""
    seed: int = 0
    """Draws the initial A; B begins at zero."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The low-rank change that training makes.

        Raises:
            ValueError: a base that does not train, a setting out of range, no layer to adapt, or what the base refuses.
        """
        require_trains(self.base, "lora")
        require_positive(self, "rank", "alpha")
        blocks = tuple(f"{model.block(layer)}." for layer in range(model.n_layers))
        adapter = Factors(self, model.name, blocks)
        inner = extended(around, "lora", self, adapter=adapter)
        edit = self.base.fit(model, forget, retain, inner)
        return wrapped(edit, "lora", self, adapted=len(adapter.factors()))


class Factors:
    """The adapter of one training run."""

    def __init__(self, settings: Lora, model_name: str, blocks: tuple[str, ...]) -> None:
        self.settings, self.model_name, self.blocks = settings, model_name, blocks
        self.merged: dict[str, LowRank] = {}

    def attach(self, hf: Any) -> Any:
        """The model with factors in place of the linear layers whose weight requires a gradient.

        Raises:
            ValueError: there is none that matches.
        """
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        names = [
            name
            for name, module in hf.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module.weight.requires_grad
            and name.startswith(self.blocks) and re.search(self.settings.targets, name)
        ]  # fmt: skip
        if not names:
            raise ValueError(
                f"no linear layer of the blocks of {self.model_name!r} matches targets={self.settings.targets!r} and "
                "is trained by the base: nothing would be adapted"
            )
        config = LoraConfig(
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=0.0,
            target_modules=names,
            fan_in_fan_out=isinstance(hf.get_submodule(names[0]), Conv1D),
        )
        device = next(hf.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            adapted = get_peft_model(hf, config)  # draws initial weights, which are drawn anew below
        generator = torch.Generator().manual_seed(self.settings.seed)
        with torch.no_grad():
            for layer in _adapted(adapted).values():
                a = layer.lora_A["default"].weight
                drawn = nn.init.kaiming_uniform_(torch.empty(a.shape), a=math.sqrt(5), generator=generator)
                a.copy_(drawn)
        return adapted.eval()

    def merge(self, hf: Any) -> Any:
        """The plain model with the change added."""
        self.merged = {f"{name}.weight": _factors(layer) for name, layer in _adapted(hf).items()}
        return hf.merge_and_unload()

    def factors(self) -> Mapping[str, LowRank]:
        """What was merged: weight -> alpha / rank x B A, in HF orientation."""
        return self.merged


def _adapted(hf: Any) -> dict[str, Any]:
    """Path in the plain model -> the adapted layer."""
    return {name: module for name, module in hf.get_base_model().named_modules() if hasattr(module, "lora_A")}


def _factors(layer: Any) -> LowRank:
    a, b = (side["default"].weight.detach().float().cpu().clone() for side in (layer.lora_A, layer.lora_B))
    b = layer.scaling["default"] * b
    return LowRank(a.T.contiguous(), b.T.contiguous()) if layer.fan_in_fan_out else LowRank(b, a)
