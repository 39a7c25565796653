"""Sparse autoencoders through sae-lens, tied to sites of a model.

Load, train and save SAEs in sae-lens's own formats; measure how well one explains a model (FVU) and whether it still
explains an edited one. Which latents tell known from unknown entities is for `locate.known_unknown` to say. One file
holds all that knows sae-lens.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Entity, Site
from mech_unlearn.files import follow_umask, read_json
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import capture, stream
from mech_unlearn.model.tokens import encode_all

TRANSFER_BOUND = 1.5
"""An SAE whose FVU on another model exceeds this multiple of its FVU on its own model is out of its domain there."""


BLOCK = 64
"""Latents of a block in `largest`."""


def largest(values: Float[Tensor, "row width"], k: int) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """The k largest values of each row and their places, in no order: `values.topk(k)`, faster for wide rows.

    They lie in the k blocks with the largest maxima: a block that holds one of them has a maximum at least as large as
    the k-th, and no more than k blocks have. Only these are searched.
    """
    if values.shape[1] % BLOCK or values.shape[1] // BLOCK <= k:
        found = values.topk(k, -1, sorted=False)
        return found.values, found.indices
    blocks = values.view(len(values), -1, BLOCK)
    best = blocks.amax(-1).topk(k, -1, sorted=False).indices
    inside, at = blocks.gather(1, best[..., None].expand(-1, -1, BLOCK)).flatten(1).topk(k, -1, sorted=False)
    return inside, best.gather(1, at // BLOCK) * BLOCK + at % BLOCK


def _encode(sae: Any, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
    """`sae.encode`; where that is a matmul, a bias and ReLU or TopK, in one buffer of [state, d_sae]."""
    from sae_lens.saes.standard_sae import StandardSAE
    from sae_lens.saes.topk_sae import TopKSAE

    simple = type(sae) is StandardSAE or (type(sae) is TopKSAE and not sae.cfg.rescale_acts_by_decoder_norm)
    if not simple or any(point.fwd_hooks for point in (sae.hook_sae_acts_pre, sae.hook_sae_acts_post)):
        return sae.encode(x)
    given = sae.process_sae_in(x)
    acts = torch.addmm(sae.b_enc, given.reshape(-1, given.shape[-1]), sae.W_enc)
    if type(sae) is TopKSAE:
        top, index = largest(acts, sae.cfg.k)
        acts = acts.zero_().scatter_(-1, index, top.relu())
    else:
        acts = acts.relu_()
    return acts.reshape(*given.shape[:-1], -1)


@dataclass(frozen=True, eq=False)
class Sae:
    """An SAE of sae-lens tied to a site of a model, in float32 on the model's device.

    Splice changes of latents as a delta, `h + decode(new) - decode(old)`, so that what the SAE cannot explain
    (`h - reconstruct(h)`, the error term) is kept. For SAEs that normalise each activation (`layer_norm`,
    `constant_norm_rescale`) sae-lens decodes with the scale of the last `encode`.
    """

    site: Site
    sae: Any
    centered: bool = False
    """The SAE was trained on a residual stream whose mean over d_model is subtracted (TransformerLens's
    `center_writing_weights`); `encode` subtracts it and `reconstruct` puts it back."""

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Activations of the latents, zero where inactive."""
        x = x.float()
        return _encode(self.sae, x - x.mean(-1, keepdim=True) if self.centered else x)

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        """The activation that these latents stand for."""
        return self.sae.decode(acts)

    def reconstruct(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The part of an activation that the SAE explains; `x - reconstruct(x)` is the error term."""
        out = self.decode(self.encode(x))
        return out + x.float().mean(-1, keepdim=True) if self.centered else out

    @property
    def w_dec(self) -> Float[Tensor, "d_sae d_model"]:
        """Decoder directions, one row per latent, as stored (not normalised)."""
        return self.sae.W_dec

    @property
    def d_sae(self) -> int:
        return self.sae.cfg.d_sae

    @property
    def mean_l0(self) -> float | None:
        """Latents active per token: k of a TopK SAE, else the mean that sae-lens stored at the end of training; None
        where the SAE has neither, as most pretrained ones (measure it on tokens of your own)."""
        k = getattr(self.sae.cfg, "k", None)
        value = k if k is not None else self.sae.cfg.metadata.l0
        return None if value is None else float(value)


def _site_of(sae: Any, model: Model, source: str) -> Site | None:
    """The site that the SAE's metadata names, if it names one that `Site` can spell."""
    name = sae.cfg.metadata.hook_name
    if not name:
        return None
    kinds = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_post")
    for site in (Site(layer, kind) for layer in range(model.n_layers) for kind in kinds):
        point = model.points.get(site.hook)  # parallel blocks have no resid_mid
        if point is not None and name in (site.hook, point.name):
            return site
    where = f"no site of {model.name!r} ({model.n_layers} layers)"
    raise ValueError(f"SAE {source!r} was trained at {name!r}, which is {where}")


def _tie(sae: Any, model: Model, site: Site | None, source: str) -> Sae:
    named = _site_of(sae, model, source)
    if site is None and named is None:
        raise ValueError(f"SAE {source!r} does not say where it was trained; pass site=Site(layer, kind)")
    site = site or named
    assert site is not None
    try:
        hook = model.resolve(site)
    except KeyError as error:
        raise ValueError(f"SAE {source!r}: {error.args[0]}") from error
    if named is not None and model.resolve(named) != hook:
        raise ValueError(f"SAE {source!r} was trained at {named}, not at {site}")
    width = model.d_model
    if site.kind == "mlp_post":
        width = model.held[model.w_out(site.layer)[0]].numel() // model.d_model
    if sae.cfg.d_in != width:
        raise ValueError(f"SAE {source!r} reads {sae.cfg.d_in} dimensions, {site} of {model.name!r} has {width}")
    for name, weight in sae.named_parameters():
        if not torch.isfinite(weight).all():
            raise ValueError(f"SAE {source!r}: weight {name!r} holds NaN or infinite values")
    try:
        sae.to(device=model.device, dtype=torch.float32).eval().requires_grad_(False)
        kwargs = sae.cfg.metadata.model_from_pretrained_kwargs or {}
        tied = Sae(site, sae, centered=bool(kwargs.get("center_writing_weights", False)))
        _require_works(tied, torch.zeros(1, width, device=model.device))
    except Exception as error:  # of many kinds, by what its settings hold
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"SAE {source!r}: its settings and weights do not fit each other: {reason}") from error
    return tied


def _require_works(sae: Sae, x: Float[Tensor, "row d_in"]) -> None:
    """Encode and decode once: sae-lens takes settings of any type and size."""
    acts = sae.encode(x)
    if acts.shape != (len(x), sae.d_sae) or sae.decode(acts).shape != x.shape or not (sae.mean_l0 or 0) >= 0:
        raise ValueError(f"{tuple(acts.shape)} latents, mean L0 {sae.mean_l0}")


def load_sae(source: str | os.PathLike, model: Model, site: Site | None = None) -> Sae:
    """Load an SAE from a folder that sae-lens wrote, or a pretrained one as "release/sae_id", and tie it to a site.

    A release is a name of sae-lens's directory ("gemma-scope-2b-pt-res-canonical/layer_9/width_16k/canonical") or a
    hub repository ("owner/name/sae_id").

    Args:
        site: where to use it; by default the place its metadata names.

    Raises:
        ValueError: no such SAE, another width or layer than the model's, trained at another place than `site`,
            weights that are not finite.
    """
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    text, folder = os.fspath(source), Path(source).expanduser()
    if folder.exists():
        if not (folder / "cfg.json").is_file():
            raise ValueError(f"SAE {text!r}: the folder holds no cfg.json; give one written by sae-lens or save_sae")
        read_json(folder / "cfg.json")
        try:
            sae = SAE.load_from_disk(folder, device=str(model.device), dtype="float32")
        except Exception as error:  # of many kinds, by what is broken
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"SAE {text!r} cannot be read by sae-lens: {reason}") from error
        return _tie(sae, model, site, text)
    parts = text.split("/")
    release = parts[:1] if parts[0] in get_pretrained_saes_directory() else parts[:2]
    if text.startswith((".", "/", "~")) or len(parts) <= len(release):
        raise ValueError(f"SAE {text!r}: no such folder, and not of the form release/sae_id")
    try:
        sae = SAE.from_pretrained("/".join(release), "/".join(parts[len(release) :]), device=str(model.device))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"SAE {text!r}: sae-lens cannot load it ({str(error).splitlines()[0]})") from error
    return _tie(sae, model, site, text)


def save_sae(sae: Sae, folder: str | os.PathLike) -> None:
    """Write the SAE as sae-lens does: cfg.json and sae_weights.safetensors."""
    sae.sae.save_model(Path(folder))
    follow_umask(Path(folder))


@torch.no_grad()
def fvu(model: Model, sae: Sae, rows: Sequence[Sequence[int]]) -> float:
    """Fraction of variance unexplained, sum ||h - h^||^2 / sum ||h - mean h||^2, over all ordinary tokens of the rows.

    Sums in float64; special tokens (BOS) and first ones are left out. Rows are token ids.

    Raises:
        ValueError: fewer than two ordinary tokens, or states that do not vary.
    """
    error, square, total, count = 0.0, 0.0, torch.zeros(1, dtype=torch.float64), 0
    for part in stream(model, rows, [sae.site], "ordinary"):
        h = part.at[sae.site].to(model.device).float()
        error += (h - sae.reconstruct(h)).double().square().sum().item()
        square += h.double().square().sum().item()
        total = total + h.double().sum(0).cpu()
        count += len(h)
    variance = square - total.square().sum().item() / max(count, 1)
    if count < 2 or variance <= 0:
        raise ValueError(f"FVU needs states that vary; got {count} ordinary tokens")
    return error / variance


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Whether an SAE of one model still explains another."""

    fvu_full: float
    fvu_other: float

    @property
    def valid(self) -> bool:
        """False (flag `sae_ood`) when FVU on the other model is more than 1.5 times that on the full one."""
        return self.fvu_other <= TRANSFER_BOUND * self.fvu_full


def sae_still_valid(full: Model, other: Model, sae: Sae, rows: Sequence[Sequence[int]]) -> Transfer:
    """FVU of an SAE on the model it was made for and on another (edited, unlearned) one, same rows."""
    return Transfer(fvu_full=fvu(full, sae, rows), fvu_other=fvu(other, sae, rows))


def entity_states(
    model: Model, entities: Sequence[Entity], templates: Sequence[str], site: Site
) -> Float[Tensor, "entity context d_model"]:
    """Activations at the last token of each name, in each template cut right after the name's slot.

    Templates that become equal when cut count once. On the CPU.

    Raises:
        ValueError: no entity, no template, or a template without exactly one {}.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} must hold exactly one {{}} for the entity")
    prefixes = list(dict.fromkeys(template.split("{}")[0] for template in templates))
    if not prefixes or not entities:
        raise ValueError(f"{len(entities)} entities and {len(templates)} templates: give at least one of each")
    texts = [prefix + entity.name for entity in entities for prefix in prefixes]
    known = encode_all(model.tokenizer, texts)
    rows = [known[text].ids for text in texts]
    return capture(model, rows, [site], "last")[site].unflatten(0, (len(entities), len(prefixes)))
