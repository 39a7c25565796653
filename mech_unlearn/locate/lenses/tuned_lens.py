"""Tuned lens: how likely the answer already is after a layer, read through a translator trained for that layer.

Paper:    Belrose et al. 2023, Eliciting latent predictions from transformers with the tuned lens, arXiv 2303.08112,
          section 3: logits = readout(h + A h + b), trained by KL(final || lens).
Needs:    running text, one forward pass over it, and per step one readout per layer; d_model^2 numbers per layer.
Differs:  the readout is the model's own code behind the last layer. Translators sit behind each layer, not before it,
          so the embedding has none and the last is fixed at the identity. Adam with a rate that falls linearly to zero
          instead of SGD with Nesterov momentum: its step does not depend on the scale of the gradients; no weight
          decay. States of special tokens are left out: those of BOS are outliers. A few hundred steps on what text
          there is, not 2^18 tokens a step.
Fails:    a lens knows the text it was trained on; on few texts it stays close to the logit lens. A translator may add
          what the layer does not yet use: compare with a model that never saw the fact.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact, Site
from mech_unlearn.files import parse_json, read_tensors, replacing
from mech_unlearn.locate.lenses.logit_lens import lens_values
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.metrics.intervals import mean_ci
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import ordinary_positions, stream
from mech_unlearn.model.pieces import token_rows
from mech_unlearn.model.readout import readout

FORMAT = "mech_unlearn.tuned_lens/1"


@dataclass(frozen=True, eq=False, kw_only=True)
class TunedLens:
    """A translator per layer, in float32 on the CPU: states h become h + h weight^T + bias; zero is the logit lens."""

    base: str
    """`Model.hash()` of the model it was trained on."""
    weight: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer d_model"]
    heldout: Attribution
    """KL(final || lens) on held-out texts, nats per token: axes (lens, layer), "logit lens" and "tuned lens"."""

    def translate(self, layer: int, states: Float[Tensor, "state d_model"]) -> Float[Tensor, "state d_model"]:
        """States after a layer as the final norm is to read them, in float32."""
        x = states.float()
        return x + x @ self.weight[layer].T.to(x.device) + self.bias[layer].to(x.device)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, atomically; the held-out KL travels in its JSON header."""
        from safetensors.torch import save_file

        header = {"format": FORMAT, "base": self.base, "heldout": json.dumps(self.heldout.to_json())}
        with replacing(path) as part:
            save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, part, metadata=header)

    @classmethod
    def load(cls, path: str | os.PathLike, model: Model | None = None) -> "TunedLens":
        """Read a lens; with a model, refuse one that was trained on other weights.

        Raises:
            ValueError: not a tuned lens, a damaged one, or one of another model.
        """
        header, tensors = read_tensors(path, "tuned lens")
        if header.get("format") != FORMAT:
            raise ValueError(f"{os.fspath(path)!r} is a safetensors file but not a tuned lens")
        try:
            heldout = Attribution.from_json(parse_json(header.get("heldout", "")))
            lens = cls(base=header.get("base", ""), heldout=heldout, **_parts(tensors))
        except ValueError as error:
            raise ValueError(f"tuned lens {os.fspath(path)!r} is damaged: {error}; train it anew") from error
        if model is not None:
            _check_base(lens, model)
        return lens


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    weight = shapes.get("weight", ())
    if shapes.keys() != {"weight", "bias"} or len(weight) != 3 or weight[1:] != 2 * shapes["bias"][1:]:
        raise ValueError(
            f"its tensors are {shapes}, not a weight [layer, d_model, d_model] and a bias [layer, d_model]"
        )
    if weight[0] != shapes["bias"][0] or not all(
        x.is_floating_point() and x.isfinite().all() for x in tensors.values()
    ):
        raise ValueError("its tensors have other numbers of layers, or hold NaN or infinite values")
    return dict(tensors)


def _check_base(lens: TunedLens, model: Model) -> None:
    if model.hash() != lens.base:
        raise ValueError(
            f"the tuned lens was trained on another model than {model.name!r} (hash {lens.base[:12]}, not "
            f"{model.hash()[:12]}); train one on it, or pass transfer=True to read it with this one"
        )


@dataclass(frozen=True, eq=False)
class _Pool:
    """States of running text after every layer, and the row of text that each comes from."""

    states: Float[Tensor, "layer state d_model"]
    row: Tensor


def _pool(model: Model, texts: Sequence[str], limit: int) -> _Pool:
    """About the first `limit` states of the texts, special tokens left out."""
    rows = token_rows(model, texts)
    at = ordinary_positions(model, rows)
    count = 0
    for i, places in enumerate(at):
        at[i] = places[: max(0, limit - count)]
        count += len(at[i])
    if not count:
        raise ValueError(f"{len(texts)} texts hold no ordinary token: nothing to train a lens on")
    sites = [Site(layer, "resid_post") for layer in range(model.n_layers)]
    parts = list(stream(model, rows, sites, at))
    states = torch.stack([torch.cat([part.at[site] for part in parts]) for site in sites])
    return _Pool(states, torch.cat([part.index[:, 0] for part in parts]))


def _kl(final: Float[Tensor, "state d_vocab"], lens: Float[Tensor, "*layer state d_vocab"]) -> Tensor:
    """KL(final || lens) of each state, nats; `final` holds log-probabilities and `lens` logits."""
    return (final.exp() * (final - lens.log_softmax(-1))).sum(-1)


def _train(
    model: Model, pool: _Pool, steps: int, batch: int, rate: float, max_rows: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    width, translated = model.d_model, model.n_layers - 1
    weight = torch.zeros(translated, width, width, device=model.device, requires_grad=True)
    bias = torch.zeros(translated, width, device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=rate)
    at_once = max(1, max_rows // batch)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        chosen = torch.randperm(len(pool.row), generator=generator)[:batch]
        x = pool.states[:, chosen].to(model.device, torch.float32)
        with torch.no_grad():
            final = readout(model, x[-1]).log_softmax(-1)
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        for layers in torch.arange(translated).split(at_once):
            some = slice(int(layers[0]), int(layers[-1]) + 1)
            h = x[some]
            shifted = h + torch.einsum("lsd,led->lse", h, weight[some]) + bias[some, None]
            logits = readout(model, shifted.flatten(0, 1)).unflatten(0, h.shape[:2])
            loss = _kl(final, logits).mean(1).sum()  # each layer's term moves that layer's translator only
            # not backward(): the model's own weights get no gradient
            for parameter, gradient in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
                assert parameter.grad is not None
                parameter.grad += gradient
        optimizer.step()
    last = torch.zeros(1, width, width), torch.zeros(1, width)
    return torch.cat([weight.detach().cpu(), last[0]]), torch.cat([bias.detach().cpu(), last[1]])


@torch.no_grad()
def _heldout(model: Model, weight: Tensor, bias: Tensor, pool: _Pool, max_rows: int) -> Attribution:
    table = torch.zeros(2, model.n_layers, 3)
    for layer in range(model.n_layers):
        logit, tuned = [], []
        for x, last in zip(pool.states[layer].split(max_rows), pool.states[-1].split(max_rows), strict=True):
            x = x.float()
            final = readout(model, last).log_softmax(-1)
            logit.append(_kl(final, readout(model, x)).cpu())
            tuned.append(_kl(final, readout(model, x + x @ weight[layer].T + bias[layer])).cpu())
        for i, values in enumerate((logit, tuned)):
            mean = mean_ci(torch.cat(values), "nats per token", pool.row.tolist())
            table[i, layer] = torch.tensor([mean.value, *mean.ci])
    return Attribution(
        name="tuned lens on held-out text",
        values=table[..., 0],
        axes=("lens", "layer"),
        labels={"lens": ("logit lens", "tuned lens"), "layer": tuple(range(model.n_layers))},
        unit="KL(final || lens), nats per token",
        n=len(pool.row),
        low=table[..., 1],
        high=table[..., 2],
        note="n counts tokens; 95 % bootstrap interval over texts",
    )


def train_tuned_lens(
    model: Model,
    texts: Sequence[str],
    *,
    steps: int = 250,
    batch: int = 512,
    rate: float = 1e-3,
    heldout: float = 0.2,
    max_states: int = 16_384,
    max_rows: int = 4096,
    seed: int = 0,
) -> TunedLens:
    """Translators that minimise KL(final || lens) on running text (arXiv 2303.08112, section 3), from the identity.

    Args:
        texts: running text, for example `RetainSet.texts`; each counts once.
        steps: of Adam (250 steps of SGD in the paper); 0 gives the logit lens.
        batch: token states of one step.
        rate: of Adam at the first step; falls linearly to zero.
        heldout: share of the texts that only test.
        max_states: token states to train on at the most, and as many to test; layers x states x d_model are in memory.
        max_rows: states read out at once; bounds memory.

    Raises:
        ValueError: fewer than two different texts, settings out of range, or activation interventions in force.
    """
    if model.in_force.interventions:
        raise ValueError("a tuned lens is tied to weights; train it without activation interventions")
    if steps < 0 or rate <= 0 or not 0 < heldout < 1 or min(batch, max_states, max_rows) < 1:
        raise ValueError(
            f"steps={steps}, batch={batch}, rate={rate}, heldout={heldout}, max_states={max_states}, "
            f"max_rows={max_rows}: steps may be 0, the share lies between 0 and 1, all others are positive"
        )
    unique = list(dict.fromkeys(texts))
    if len(unique) < 2:
        raise ValueError(f"{len(unique)} different texts: a lens needs one to train and one to test")
    generator = torch.Generator().manual_seed(seed)
    mixed = [unique[i] for i in torch.randperm(len(unique), generator=generator).tolist()]
    test = min(len(mixed) - 1, max(1, round(len(mixed) * heldout)))
    pools = _pool(model, mixed[test:], max_states), _pool(model, mixed[:test], max_states)
    weight, bias = _train(model, pools[0], steps, batch, rate, max_rows, generator)
    found = _heldout(model, weight.to(model.device), bias.to(model.device), pools[1], max_rows)
    return TunedLens(base=model.hash(), weight=weight, bias=bias, heldout=found)


def tuned_lens_per_fact(
    model: Model,
    facts: Sequence[Fact],
    *,
    lens: TunedLens | None = None,
    texts: Sequence[str] = (),
    transfer: bool = False,
    max_tokens: int = 8192,
    **training: Any,
) -> Attribution:
    """Log-probability of each fact's answer at each layer, read through the translators: axes (fact, layer), nats.

    Mean over the tokens of the answer (teacher-forced) and over the phrasings that a method may see.

    Args:
        lens: a trained lens; else one is trained on `texts` with the settings of `train_tuned_lens`.
        transfer: allow a lens of other weights, for example of the model before an edit.

    Raises:
        ValueError: no facts, both a lens and texts or neither, or a lens of another model.
    """
    if not facts:
        raise ValueError("no facts to locate: give at least one")
    if (lens is None) == (not texts) or (lens is not None and training):
        raise ValueError("give a trained lens, or texts (and settings) to train one on")
    if lens is None:
        lens = train_tuned_lens(model, texts, **training)
    elif lens.bias.shape != (model.n_layers, model.d_model):
        raise ValueError(
            f"the lens has {tuple(lens.bias.shape)} (layers, d_model), {model.name!r} {(model.n_layers, model.d_model)}"
        )
    elif not transfer:
        _check_base(lens, model)
    values, n_prompts = lens_values(model, facts, model, lens.translate, max_tokens)
    gain = (lens.heldout.values[0] - lens.heldout.values[1])[:-1]
    better = f"closer to the output at {int((gain > 0).sum())} of {len(gain)} layers"
    return Attribution(
        name="tuned lens",
        values=values,
        axes=("fact", "layer"),
        labels={"fact": tuple(f.id for f in facts), "layer": tuple(range(model.n_layers))},
        unit="log-probability of the answer (nats)",
        n=len(facts),
        note=f"mean per answer token over {n_prompts} prompts; held-out text: {better} than the logit lens",
    )


@takes_settings_of(train_tuned_lens)
def tuned_lens(
    model: Model,
    facts: Sequence[Fact],
    *,
    lens: TunedLens | None = None,
    texts: Sequence[str] = (),
    transfer: bool = False,
    max_tokens: int = 8192,
    **training: Any,
) -> Attribution:
    """Mean log-probability of the answers at each layer through the translators: axis (layer,), nats, over facts.

    See `tuned_lens_per_fact`.
    """
    how: dict[str, Any] = dict(lens=lens, texts=texts, transfer=transfer, max_tokens=max_tokens, **training)
    return tuned_lens_per_fact(model, facts, **how).mean(facts)
