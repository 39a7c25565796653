"""DirectionalAblation: project the direction that tells forgotten names from others out of the residual stream.

Paper:    Arditi, Obeso, Syed, Paleka, Panickssery, Gurnee, Nanda 2024, Refusal in language models is mediated by a
          single direction, arXiv 2406.11717: x <- x - r r^T x with r the normalised difference of means; equivalently
          every matrix that writes to the residual stream is made orthogonal to r.
Changes:  mode "hook": states at the chosen sites; mode "weights": token and position embeddings, attention output and
          MLP output matrices (and biases) of all layers up to the site, rank at most `rank` each.
Needs:    states of the forgotten and of unknown (or retained) names in every context.
Differs:  the direction is that of names to be forgotten, read at their last token; by default only their states are
          changed and not every token's. Further directions (`rank`) are the leading ones in which the forgotten names
          differ among each other. In the weights, where every token is changed, the parts along the mean state and
          along first tokens (attention sinks) are taken out of the direction: with them SmolLM2 drifts by 2.75 nats per
          token, without by .03. center="reference" moves the component to the reference's mean, not to zero. In the
          weights only what writes at or below the site is changed, the paper changes all layers. Behind a norm
          (Gemma 2, OLMo 2) matrices are made orthogonal to gain * r, so that what the norm lets through is orthogonal.
Fails:    one direction says that a name is known, not what is known about it. The direction is also used by other
          names: in the weights, and with where="all", they lose it too. Tied embeddings lose it as unembedding, too.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.edit.edit import Edit, LowRank
from mech_unlearn.edit.interventions import Where
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.columns import outcome
from mech_unlearn.methods.writing.protect import KEY_SOURCES, protected_rows
from mech_unlearn.methods.writing.state_maps import Against, Map, fitted, groups, mean_distance, orthonormal, sites_of
from mech_unlearn.model import bridge
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import stream

EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|wpe|embed_in|word_embeddings|embed_positions)\.weight$")
ATTENTION = r"(^|\.){layer}\.(self_attn|attn|attention|self_attention)\.(o_proj|c_proj|dense|out_proj)\.(weight|bias)$"


@dataclass(frozen=True, kw_only=True)
class DirectionalAblation:
    """Settings of the ablation; `fit` computes it."""

    mode: Literal["hook", "weights"] = "hook"
    layers: tuple[int, ...] | None = None
    """Layers whose residual stream is projected; by default up to three that end at a third of the depth. In the
    weights: the direction is that of the highest."""
    kind: str = "resid_post"
    """Or "resid_pre"."""
    rank: int = 1
    """Directions: the difference of means first."""
    center: Literal["zero", "reference"] = "zero"
    """What the component becomes: zero (the paper), or that of the mean reference state (mode "hook")."""
    against: Against = "unknown"
    """The reference: names the model knows nothing about, or names of retained facts."""
    where: Where | None = None
    """At the name's last token, from there on, or at every token; None is "last" for a hook, "all" in the weights."""
    skip_first: bool = True
    """Mode "hook", where="all": leave position 0 as it is."""
    seed: int = 0
    """Nothing is drawn; kept with the result."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Edit:
        """The ablation.

        Raises:
            ValueError: no names to compare with, a layer the model lacks, settings that contradict each other, or, in
                the weights, an intervention in force or a matrix that is not to be found.
        """
        start = time.perf_counter()
        where = self._where(model)
        sites, (names, others) = sites_of(model, self.layers, self.kind), groups(forget, retain, self.against)
        if self.rank < 1 or self.rank > min(model.d_model, len(names)):
            raise ValueError(f"rank={self.rank}: choose 1 to {min(model.d_model, len(names))} (names, dimensions)")
        contexts = keys.contexts_of(forget.facts)
        sites = sites if self.mode == "hook" else sites[-1:]
        with keys.count_forwards(model) as forwards:
            aside = bystanders(model, retain, contexts, sites[-1]) if self.mode == "weights" else None
            fit = partial(self._map, aside=aside)
            maps = fitted(model, names, others, contexts, sites, fit, where, self.skip_first)
            change: dict[str, Any] = {"interventions": maps}
            if self.mode == "weights":
                change = {"deltas": orthogonal_writers(model, maps[0].right, sites[0])}
            edit = Edit(name="directional_ablation", base=model.hash(), **change)
            report = outcome(model, edit, forget.facts)
        report |= {"sites": [str(site) for site in sites], "names": len(names), "others": len(others)}
        report |= {"n_forward": forwards[0], "n_backward": 0, "seconds": time.perf_counter() - start}
        recipe = {"method": "directional_ablation", "settings": asdict(self), "seed": self.seed, "report": report}
        return Edit(name=edit.name, base=edit.base, recipe=recipe, **change)

    def _where(self, model: Model) -> Where:
        if self.mode == "hook":
            return self.where or "last"
        if self.where not in (None, "all") or self.center != "zero":
            raise ValueError(
                f'mode="weights" with where={self.where!r}, center={self.center!r}: weights act at every token and '
                'cannot move a component to a mean; leave where= and center= out, or use mode="hook"'
            )
        if model.in_force.interventions:
            raise ValueError(f"{model.name!r} has an edit of activations in force; leave it before changing weights")
        return "all"

    def _map(self, own: Tensor, other: Tensor, aside: Tensor | None) -> Map:
        if aside is not None:
            own, other = (x - x @ aside.T @ aside for x in (own, other))
        directions = difference_directions(own, other, self.rank)
        center = other.mean((0, 1)) if self.center == "reference" else torch.zeros_like(other[0, 0])
        return directions.T, directions, center


def bystanders(
    model: Model, retain: RetainSet, contexts: Sequence[str], site: Site
) -> Float[Tensor, "direction d_model"]:
    """Orthonormal directions of the mean state of what must stay: of its ordinary tokens, and of first tokens.

    A first token is an attention sink and longer than all others; what every token has in common is no name's own.
    """
    rows = [ids for group, _ in protected_rows(model, retain, contexts, KEY_SOURCES) for ids in group]
    places = ("ordinary", [[0]] * len(rows))
    means = [torch.cat([part.at[site].double() for part in stream(model, rows, [site], at)]).mean(0) for at in places]
    return orthonormal(torch.stack(means))


def difference_directions(
    own: Float[Tensor, "name context d_model"], other: Float[Tensor, "other context d_model"], rank: int
) -> Float[Tensor, "rank d_model"]:
    """The normalised difference of means, then the directions of largest spread of the names' mean states.

    Raises:
        ValueError: equal means.
    """
    first = mean_distance(own, other)
    if not first.norm() > 1e-12 * own.norm():
        raise ValueError(
            "the names' states do not differ in the mean from the others': there is no direction to ablate"
        )
    first = first / first.norm()
    means = own.mean(1)
    spread = means - means.mean(0)
    spread = spread - spread @ first[:, None] * first
    return torch.cat([first[None], orthonormal(spread)[: rank - 1]])


def orthogonal_writers(
    model: Model, directions: Float[Tensor, "rank d_model"], site: Site
) -> dict[str, LowRank | Tensor]:
    """Deltas by which nothing that writes to the residual stream up to a site has a component along the directions.

    Raises:
        ValueError: a layer whose attention or MLP output matrix is not to be found.
    """
    deltas: dict[str, LowRank | Tensor] = {}
    for name in model.held:
        if EMBEDDINGS.search(name):
            deltas[name] = _projected_out(model.held[name], directions, columns=True)
    if not deltas:
        raise ValueError(f"model {model.name!r}: found no embedding matrix by its name")
    for layer in range(site.layer + (site.kind == "resid_post")):
        for name, gain in _writers(model, layer):
            conv = model.transposed(name) or name.endswith("bias")
            basis = directions if gain is None else orthonormal(directions.to(gain) * gain)
            deltas[name] = _projected_out(model.held[name], basis, columns=conv)
    return deltas


def _writers(model: Model, layer: int) -> list[tuple[str, Tensor | None]]:
    """(Name of a weight or bias that writes to the residual stream, gain of the norm behind it or None)."""
    found = [name for name in model.held if re.search(ATTENTION.replace("{layer}", str(layer)), name)]
    if sum(name.endswith("weight") for name in found) != 1:
        raise ValueError(f"model {model.name!r}: found no single attention output matrix in layer {layer}")
    behind = bridge.post_norm(model, layer)
    gain = None
    if behind is not None:  # where a norm lies behind the MLP, this name is that of the norm behind the attention
        block = behind[0].removesuffix(".mlp")
        ones = torch.ones(1, 1, model.d_model, device=model.device, dtype=model.dtype)
        with torch.no_grad():
            gain = model.hf.get_submodule(f"{block}.post_attention_layernorm")(ones).flatten().double()
    out = [(name, gain) for name in found]
    weight = model.w_out(layer)[0]
    names = [name for name in (weight, weight.removesuffix("weight") + "bias") if name in model.held]
    return out + [(name, None if behind is None else behind[1]) for name in names]


def _projected_out(weight: Tensor, directions: Tensor, columns: bool) -> LowRank | Tensor:
    """-W r r^T for a weight whose last axis is d_model (`columns`), -r r^T W where it is the first."""
    w, r = weight.detach().double(), directions.to(weight.device).double()
    if w.ndim == 1:
        return -(r.T @ (r @ w)).float().cpu()
    if columns:
        return LowRank((-(w @ r.T)).float().cpu(), r.float().cpu())
    return LowRank((-r.T).float().cpu().contiguous(), (r @ w).float().cpu())
