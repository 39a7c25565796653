"""SaeShift: move a name's state, in the latents of an SAE, from where known names are to where unknown ones are.

Paper:    Yamashita et al. 2025, SAE-guided internal representation unlearning, arXiv 2509.15631.
          Its goal: the target's state cannot be told from an unknown entity's; its loss is not public. Known and
          unknown latents as in Ferrando et al. 2024, arXiv 2411.14257; written as in arXiv 2506.07795, untrained.
Changes:  mode "hook": one vector per name added at the SAE's site at the name's last token; mode "weights": the MLP
          output matrices of layers up to the site, rank at most one per name.
Needs:    an SAE at a layer where a probe tells known from unknown names (checked), and unknown names.
Differs:  no training: the target state is computed from the latents and written, because the paper's loss is unknown;
          each name goes to the code of an unknown name of its own: one mean code for all would put them on one point,
          which a probe tells from a cloud;
          by default all latents are moved and the reference's SAE error is taken over with them, so the target is the
          reference's own state in the same context: what an SAE leaves unexplained can carry facts too. `n_latents`
          moves only the latents that separate known from unknown, `error="keep"` leaves the name's own error;
          as an intervention each name has one vector for all contexts; `shared` also takes out what a context calls up
          about this name alone.
Fails:    as an intervention it holds only where the name is spelled as listed, and inside longer names that end in it;
          where facts are read from other tokens than the name's last; see `keys` for what limits the write.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.locate.lenses.probe_auc import probe_auc
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.anchors import draw_anchors, known_names, measured, unknown_names
from mech_unlearn.methods.writing.protect import KEY_SOURCES, KeySource, protected_bases
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.latents import Sae

ACTIVE = 1e-6
"""A latent counts as active above this. Source: 2411.14257's code."""


@dataclass(frozen=True, kw_only=True)
class SaeShift:
    """Settings of the shift; `fit` computes it."""

    sae: Sae
    mode: Literal["hook", "weights"] = "hook"
    target: Literal["matched", "mean"] = "matched"
    """"matched": the code of an unknown name of its own; "mean": the mean code of all unknown names."""
    n_latents: int | None = None
    """Move only this many latents that are most known and as many that are most unknown; None moves all."""
    error: Literal["reference", "keep"] = "reference"
    """Whose SAE error the target state has."""
    min_auc: float = 0.9
    """Refuse where a probe on the latents tells known from unknown names (unseen ones) less well than this."""
    gate_latents: int = 64
    """Most known and most unknown latents that the probe sees."""
    shared: int | None = None
    """Mode "hook": of a name's deviation from its mean keep only what lies along this many directions in which contexts
    move unknown names alike, so that what a context calls up about the name itself goes; None keeps all of it."""
    layers: tuple[int, ...] | None = None
    """Mode "weights": the layers written; by default three that end at the site."""
    ridge: float = 0.05
    """Mode "weights": see `Rocr.ridge`."""
    energy: float = 0.1
    """Mode "weights": see `Rocr.energy`."""
    contexts: tuple[str, ...] | None = None
    """Templates with {} for the name; by default the phrasings of its own forget facts (never the held-out ones)."""
    protect: tuple[KeySource, ...] = KEY_SOURCES
    """Mode "weights": see `Rocr.protect`."""
    seed: int = 0
    """Draws the unknown names and the probe's folds."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Edit:
        """The shift of the forget set's names.

        Raises:
            ValueError: no unknown or known names, an SAE of another width or layer than the model's, known and unknown
                names that a probe cannot tell apart, or layers above the site.
        """
        start = time.perf_counter()
        self._check(model)
        site = self.sae.site
        contexts = self.contexts or keys.contexts_of(forget.facts)
        names, pool = keys.names_of(forget.entities), unknown_names(forget, retain)
        with keys.count_forwards(model) as forwards:
            states, unknown, known = (
                keys.name_states(model, group, contexts, site).float()
                for group in (names, pool, known_names(forget, retain))
            )
            scores = known_scores(self.sae, known, unknown)
            auc = self._gate(scores, known, unknown)
            references, targets = self._targets(model, forget, retain, scores, states, pool, unknown)
            own = keys.own_contexts(names, forget.facts, contexts)
            if self.mode == "hook":
                centers, shifts = keys.mean_over(states, own), keys.mean_over(targets - states, own)
                change, report = self._hook(model, names, contexts, centers, shifts, unknown)
            else:
                change, report = self._weights(model, retain, names, contexts, targets, own)
            certain = measured(model, forget, references) if references else {}
        report = {"auc_known_unknown": auc, "references": references, **certain, **report, "n_forward": forwards[0]}
        report |= {"n_backward": 0, "seconds": time.perf_counter() - start}
        recipe = {"method": "sae_shift", "settings": self._settings(), "seed": self.seed, "report": report}
        return Edit(name="sae_shift", base=model.hash(), recipe=recipe, **change)

    def _settings(self) -> dict[str, Any]:
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sae"}
        return {"site": str(self.sae.site), "d_sae": self.sae.d_sae, **settings}

    def _check(self, model: Model) -> None:
        site = self.sae.site
        if site.kind not in ("resid_pre", "resid_post"):
            raise ValueError(
                f"the SAE sits at {site}; a name's state is shifted at resid_pre or resid_post only (a write at "
                "resid_mid reaches the MLP alone)"
            )
        if not 0 <= site.layer < model.n_layers:
            raise ValueError(f"the SAE sits at {site}, but {model.name!r} has layers 0..{model.n_layers - 1}")
        if self.sae.w_dec.shape[1] != model.d_model:
            raise ValueError(
                f"the SAE decodes to {self.sae.w_dec.shape[1]} dimensions, {model.name!r} has d_model={model.d_model}"
            )
        if self.shared is not None and (self.shared < 0 or self.mode != "hook"):
            raise ValueError(f'shared={self.shared} with mode={self.mode!r}: a number from 0 on, for mode="hook" only')
        if self.mode == "weights" and site == Site(0, "resid_pre"):
            raise ValueError(f'mode="weights" writes MLPs that end at the site; {site} has none: use mode="hook"')

    def _gate(self, scores: Tensor, known: Tensor, unknown: Tensor) -> float:
        chosen = torch.cat([scores.topk(n := min(self.gate_latents, len(scores))).indices, (-scores).topk(n).indices])
        codes = [pre_activations(self.sae, group)[..., chosen.unique()] for group in (known, unknown)]
        auc = probe_auc(codes[0], codes[1], seed=self.seed)
        if auc < self.min_auc:
            raise ValueError(
                f"at {self.sae.site} a probe on the SAE's latents tells known from unknown names with AUC {auc:.2f} < "
                f"{self.min_auc}: choose another layer or SAE, or lower min_auc"
            )
        return auc

    def _targets(
        self,
        model: Model,
        forget: ForgetSet,
        retain: RetainSet,
        scores: Float[Tensor, " d_sae"],
        own: Float[Tensor, "name context d_model"],
        pool: Sequence[str],
        unknown: Float[Tensor, "unknown context d_model"],
    ) -> tuple[Mapping[str, str] | None, Float[Tensor, "name context d_model"]]:
        """(Name -> its unknown name, or None for the mean; target state of each name in each context)."""
        raised, lowered = latent_masks(scores, self.n_latents)
        code, error = self.sae.encode(unknown), unknown - self.sae.reconstruct(unknown)
        if self.target == "mean":
            references, code, error = None, code.mean(0).expand(len(own), -1, -1), error.mean(0).expand_as(own)
        else:
            references = draw_anchors(model, forget, retain, self.seed)
            chosen = [pool.index(anchor) for anchor in references.values()]
            code, error = code[chosen], error[chosen]
        return references, shifted(self.sae, own, code, error if self.error == "reference" else None, raised, lowered)

    def _hook(
        self,
        model: Model,
        names: Sequence[str],
        contexts: Sequence[str],
        centers: Float[Tensor, "name d_model"],
        shifts: Float[Tensor, "name d_model"],
        unknown: Float[Tensor, "unknown context d_model"],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        spelled = [keys.spellings(model.tokenizer, name, contexts) for name in names]
        subjects = tuple(tokens for group in spelled for tokens in group)
        index = torch.tensor([i for i, group in enumerate(spelled) for _ in group])
        vectors = shifts.cpu()[index]
        narrowed: dict[str, Tensor] = {}
        if self.shared is not None:
            narrowed = {"centers": centers.cpu()[index], "kept": context_directions(unknown, self.shared).cpu()}
        report = {"shift_norm": vectors.norm(dim=-1).mean().item()}
        return {"interventions": (Shift(self.sae.site, subjects, vectors, **narrowed),)}, report

    def _weights(
        self,
        model: Model,
        retain: RetainSet,
        names: Sequence[str],
        contexts: Sequence[str],
        targets: Float[Tensor, "name context d_model"],
        own: Bool[Tensor, "name context"],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        site = self.sae.site
        last = site.layer if site.kind == "resid_post" else site.layer - 1
        wanted = tuple(range(max(0, last - 2), last + 1)) if self.layers is None else self.layers
        layers = keys.check_written(model, wanted, last)
        bases = protected_bases(model, retain, contexts, layers, self.protect, self.energy)
        rows = keys.mention_rows(model.tokenizer, names, contexts)
        deltas, report = keys.write_states(
            model,
            rows,
            targets.flatten(0, 1).double(),
            site,
            layers=layers,
            bases=bases,
            ridge=self.ridge,
            own=own,
        )
        return {"deltas": deltas}, report


def context_directions(states: Float[Tensor, "name context d_model"], k: int) -> Float[Tensor, "direction d_model"]:
    """The first k right singular vectors of the contexts' main effects (mean state of a context over names, minus the
    mean over contexts), orthonormal; fewer where there are fewer contexts."""
    effects = states.double().mean(0)
    effects = effects - effects.mean(0)
    _, size, directions = torch.linalg.svd(effects, full_matrices=False)
    return directions[:k][size[:k] > 1e-9 * size.max().clamp(min=1e-30)].float()


def known_scores(
    sae: Sae, known: Float[Tensor, "known context d_model"], unknown: Float[Tensor, "unknown context d_model"]
) -> Float[Tensor, " d_sae"]:
    """Share of known minus share of unknown name mentions at which each latent is active, in [-1, 1].

    Source: s^known of 2411.14257.
    """
    return (sae.encode(known) > ACTIVE).float().mean((0, 1)) - (sae.encode(unknown) > ACTIVE).float().mean((0, 1))


def latent_masks(
    scores: Float[Tensor, " d_sae"], n_latents: int | None
) -> tuple[Bool[Tensor, " d_sae"], Bool[Tensor, " d_sae"]]:
    """(Latents that may be raised, latents that may be lowered): the most unknown and the most known; None is all."""
    if n_latents is None:
        return torch.ones_like(scores, dtype=torch.bool), torch.ones_like(scores, dtype=torch.bool)
    if not 1 <= n_latents <= len(scores):
        raise ValueError(f"n_latents={n_latents}: choose 1..{len(scores)}, or None for all")
    raised, lowered = (torch.zeros_like(scores, dtype=torch.bool) for _ in range(2))
    raised[(-scores).topk(n_latents).indices] = True
    lowered[scores.topk(n_latents).indices] = True
    return raised, lowered


def shifted(
    sae: Sae,
    x: Float[Tensor, "name context d_model"],
    code: Float[Tensor, "name context d_sae"],
    error: Float[Tensor, "name context d_model"] | None,
    raised: Bool[Tensor, " d_sae"],
    lowered: Bool[Tensor, " d_sae"],
) -> Float[Tensor, "name context d_model"]:
    """x + decode(moved code) - decode(own code), with the SAE error `error` in place of its own where one is given.

    The moved code is own + raised * relu(code - own) - lowered * relu(own - code): `code` itself where all may move.
    """
    own_error = x - sae.reconstruct(x)
    own = sae.encode(x)
    moved = own + raised * (code - own).clamp(min=0) - lowered * (own - code).clamp(min=0)
    return x + sae.decode(moved) - sae.decode(own) + (0 if error is None else error - own_error)


def pre_activations(sae: Sae, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
    """What the encoder computes before its nonlinearity, minus the threshold of a JumpReLU: defined for inactive
    latents too, and linear in x for SAEs that do not normalise it."""
    x = x - x.mean(-1, keepdim=True) if sae.centered else x
    before = sae.sae.process_sae_in(x) @ sae.sae.W_enc + sae.sae.b_enc
    threshold = getattr(sae.sae, "threshold", None)
    return before if threshold is None else before - threshold
