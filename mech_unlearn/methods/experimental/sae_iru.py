"""SaeIru: training until a name's state cannot be told, in the latents of an SAE, from an unknown entity's.

Paper:    Yamashita et al. 2025, SAE-guided internal representation unlearning, arXiv 2509.15631: its goal; the loss is
          not public. Known and unknown latents as in Ferrando et al. 2024, arXiv 2411.14257.
Changes:  the MLP output matrices of `layers`, by default three that end at the SAE's layer.
Needs:    an SAE at a layer where a probe tells known from unknown names (checked); unknown names, half of which make
          the reference and half the bands; two contexts at least, one of which is never trained on.
Differs:  the loss is ours. Coordinates are what the encoder computes before its nonlinearity, so that a latent that is
          off has a gradient. The distance to the unknown and the distance from the known count only outside of the
          bands that held-out unknown names keep: inside, the loss is exactly zero, and training ends once as many
          mentions in held-out contexts are inside as of unknown names. Latents that are frequent on other text are
          not left out by default (`background`): retained texts are full of names.
Fails:    a state can lie in the bands and still hold what is the name's own: they bound distances from two means. On
          the biographies world answers stay (recall 0.85 of 1.00) until `objective="prototype"` pulls that out.
          Judged by the SAE it was trained on it always looks good: test with another one; only the name's last token
          is moved, and facts read elsewhere stay; aliases and other spellings unless they are listed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.locate.lenses.probe_auc import probe_auc
from mech_unlearn.methods.experimental.iru_bands import (
    Bands,
    Plan,
    Space,
    active_rate,
    bands_of,
    error_share,
    separating,
)
from mech_unlearn.methods.rmu import steered
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.anchors import known_names, unknown_names
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import ordinary_positions, stream
from mech_unlearn.model.latents import Sae
from mech_unlearn.model.pieces import token_rows
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.losses import kl_loss
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import BatchScores, TrainRow
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.state_losses import held, states_of
from mech_unlearn.training.trainee import Trainee
from mech_unlearn.training.training import reported, require_positive, trained_edit

Goal = Literal["bands", "prototype"]


@dataclass(frozen=True, kw_only=True)
class SaeIru:
    """Settings of the training; `fit` runs it. Weights and rates are ours."""

    sae: Sae
    layers: tuple[int, ...] | None = None
    """Layers whose MLP output matrices are trained; None is three that end at the SAE's layer."""
    space: Space = "latents"
    """Where distances are taken: "latents", or "states" (the residual stream itself, the ablation without an SAE)."""
    objective: Goal = "bands"
    """"bands": the two distances count outside of their bands only; "prototype": the distance from the unknown mean
    counts everywhere, so that what is a name's own is pulled out, too (then patience=0)."""
    n_latents: int = 64
    """The most known and as many of the most unknown latents make the coordinates."""
    background: float | None = None
    """Leave out latents active on a larger share of the retained texts' tokens than this (0.02 in 2411.14257)."""
    n_known: int = 64
    """Known names that stand for the known, drawn."""
    eta: float = 1.0
    """Weight of the distance from the known within the forget loss."""
    recon_weight: float = 0.1
    """Weight of what the SAE leaves unexplained beyond what it does of unknown names."""
    hold_weight: float = 1.0
    """Weight of the squared change of retained states, as a share of the variance among known names' states."""
    kl_weight: float = 1.0
    """Weight of the KL from the untrained model on retained answers and texts."""
    contexts: tuple[str, ...] | None = None
    """Templates with {} for the name; by default the phrasings of its own forget facts."""
    heldout: tuple[str, ...] | None = None
    """Those of the contexts that only decide when to stop; None is every fourth, one at least."""
    min_auc: float = 0.9
    """Refuse where a probe on the coordinates tells known from unknown names (unseen ones) less well than this."""
    check_every: int = 10
    """Batches between two looks at the held-out contexts."""
    patience: int = 3
    """Looks in a row that must find enough mentions inside the bands; 0 trains all epochs."""
    schedule: Schedule = Schedule(lr=1e-4, epochs=8, batch_size=16, weight_decay=0.0)
    """In mentions; small models trained from scratch need lr 1e-3 to 1e-2."""
    seed: int = 0
    """Draws the known names, the unknown names of the reference, the probe's folds and the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes.

        Raises:
            ValueError: no unknown or known names, one context only, an SAE of another width or place, known and unknown
                names that a probe cannot tell apart, a setting out of range, or a loss that is not finite.
        """
        start = time.perf_counter()
        require_positive(self, "n_latents", "n_known", "check_every")
        if self.schedule.stop_recall is not None or self.schedule.skip_forgotten:
            raise ValueError(
                "stop_recall and skip_forgotten look at answers, and sae_iru trains mentions of names: set patience="
            )
        contexts = self.contexts or keys.contexts_of(forget.facts)
        unseen = self._unseen(contexts)
        layer, trained = steered(model, self._layer(model, around), self.layers)
        with keys.count_forwards(model) as forwards:
            plan = self._plan(model, forget, retain, contexts, unseen)
        rows, heldout = (own_mentions(model, forget, contexts, unseen, out) for out in (False, True))
        watch = Watch(plan.bands, heldout, plan.share, self.check_every, self.patience)
        objective = Objective(lambda _: self._forget(plan), 1.0, retain=self._retain(plan), layer=layer, rows=rows)
        watched = replace(around, watch=watch)
        edit = trained_edit("sae_iru", self, model, forget, retain, objective, trained, watched, self._settings())
        return reported(
            edit, forwards[0], auc_known_unknown=plan.auc, inside_wanted=plan.share, inside=watch.shares,
            coordinates=len(plan.bands.chosen), seconds=time.perf_counter() - start,
        )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sae"}
        return {"site": str(self.sae.site), "d_sae": self.sae.d_sae, **settings, "schedule": asdict(self.schedule)}

    def _layer(self, model: Model, around: Around) -> int:
        site = self.sae.site
        layer = {"resid_post": site.layer, "resid_pre": site.layer - 1}.get(site.kind, -1)
        if not 0 <= layer < model.n_layers:
            raise ValueError(f"the SAE sits at {site}; states behind one of layers 0..{model.n_layers - 1} are trained")
        if (width := self.sae.w_dec.shape[1]) != model.d_model:
            raise ValueError(f"the SAE decodes to {width} dimensions, {model.name!r} has d_model={model.d_model}")
        if self.space not in get_args(Space):
            raise ValueError(f"space must be 'latents' or 'states', got {self.space!r}")
        if self.objective not in get_args(Goal):
            raise ValueError(f"objective must be 'bands' or 'prototype', got {self.objective!r}")
        return layer

    def _unseen(self, contexts: Sequence[str]) -> list[int]:
        """The held-out contexts, by index."""
        chosen = contexts[-1::-4] if self.heldout is None else self.heldout
        if missing := [context for context in chosen if context not in contexts]:
            raise ValueError(f"heldout {missing[0]!r} is not among the contexts")
        if not 0 < len(chosen) < len(contexts):
            raise ValueError(
                f"{len(contexts)} contexts, {len(chosen)} held out: one at least must be left on each side"
            )
        return [i for i, context in enumerate(contexts) if context in chosen]

    def _plan(
        self, model: Model, forget: ForgetSet, retain: RetainSet, contexts: Sequence[str], unseen: Sequence[int]
    ) -> Plan:
        site, pool, order = self.sae.site, list(unknown_names(forget, retain)), torch.Generator()
        if len(pool) < 4:
            raise ValueError(f"RetainSet.unknown has {len(pool)} names of that kind: give four or more")
        order.manual_seed(self.seed)
        known = known_names(forget, retain)
        some = [known[i] for i in torch.randperm(len(known), generator=order)[: self.n_known].tolist()]
        pool = [pool[i] for i in torch.randperm(len(pool), generator=order).tolist()]
        half = len(pool) // 2
        seen = [i for i in range(len(contexts)) if i not in unseen]
        k, u = (keys.name_states(model, names, contexts, site).float() for names in (some, pool))
        frequency = self._frequency(model, retain) if self.background is not None else None
        if self.space == "latents":
            most = 1.0 if self.background is None else self.background
            chosen = separating(self.sae, k[:, seen], u[:half, seen], self.n_latents, frequency, most)
        else:
            chosen = torch.arange(model.d_model, device=model.device)
        sae = self.sae if self.space == "latents" else None
        bands = bands_of(sae, chosen, k[:, seen], u[:half, seen], u[half:, seen])
        auc = probe_auc(bands.coordinates(k[:, seen]), bands.coordinates(u[:, seen]), seed=self.seed)
        if auc < self.min_auc:
            raise ValueError(
                f"at {site} a probe tells known from unknown names with AUC {auc:.2f} < {self.min_auc}: choose another "
                "layer or SAE, or lower min_auc"
            )
        return Plan(
            bands=bands,
            auc=auc,
            share=bands.inside(u[half:, unseen]).float().mean().item(),
            error=error_share(self.sae, u[:, seen]).flatten().quantile(0.9).item(),
            variance=k.flatten(0, 1).var(0).mean().item(),
        )

    def _frequency(self, model: Model, retain: RetainSet) -> Float[Tensor, " d_sae"]:
        rows = token_rows(model, retain.texts)
        if not any(ordinary_positions(model, rows)):
            raise ValueError("background needs retained texts: give RetainSet.texts or leave it None")
        parts = stream(model, rows, [self.sae.site], "ordinary")
        return active_rate(self.sae, torch.cat([part.at[self.sae.site] for part in parts]).to(model.device))

    def _forget(self, plan: Plan) -> Callable[[BatchScores], Tensor]:
        def loss(now: BatchScores) -> Tensor:
            x = mentioned(now)
            unexplained = (error_share(self.sae, x) - plan.error).relu()
            away = plan.bands.excess(x, self.eta) if self.objective == "bands" else plan.bands.distances(x)[0]
            return (away + self.recon_weight * unexplained).mean()

        return loss

    def _retain(self, plan: Plan) -> Callable[[BatchScores], Tensor]:
        def loss(now: BatchScores) -> Tensor:
            states, before = states_of(now)
            hold = self.hold_weight * held(now) / plan.variance
            if torch.equal(states.now, before):  # nothing above is trained: a KL of rounding errors would move AdamW
                return hold
            return hold + self.kl_weight * kl_loss(now.each.before, now.each.logits, now.each.at)

        return loss


@dataclass(eq=False)
class Watch:
    """Looks at held-out mentions before some batches, and ends training when they are inside the bands."""

    bands: Bands
    rows: Sequence[TrainRow]
    wanted: float
    every: int
    patience: int
    shares: list[float] = field(default_factory=list)
    """Share inside at each look."""
    batches: int = 0
    reason: str = "inside the bands"

    def __call__(self, run: Trainee) -> bool:
        if self.batches % self.every == 0:
            self.shares.append(self._share(run))
            if settled(self.shares, self.wanted, self.patience):
                return True
        self.batches += 1
        return False

    @property
    def state(self) -> dict[str, Any]:
        return {"batches": self.batches, "shares": self.shares}

    def restore(self, state: dict[str, Any]) -> None:
        self.batches, self.shares = state["batches"], list(state["shares"])

    @torch.no_grad()
    def _share(self, run: Trainee, size: int = 128) -> float:
        spans = [range(i, min(i + size, len(self.rows))) for i in range(0, len(self.rows), size)]
        found = [self.bands.inside(mentioned(run.forward(self.rows, span, teacher=False))) for span in spans]
        return torch.cat(found).float().mean().item()


def settled(shares: Sequence[float], wanted: float, patience: int) -> bool:
    """Whether the last `patience` shares all reach what is wanted; never with a patience of 0."""
    return 0 < patience <= len(shares) and min(shares[-patience:]) >= wanted


def own_mentions(
    model: Model, forget: ForgetSet, contexts: Sequence[str], unseen: Sequence[int], out: bool
) -> list[TrainRow]:
    """The mentions of the forget names in their own contexts that are held out, or in those that are not.

    The last token of the name stands as the answer, so that it is marked. A name none of whose own contexts is among
    them is mentioned in all of these.
    """
    names = keys.names_of(forget.entities)
    own: Bool[Tensor, "name context"] = keys.own_contexts(names, forget.facts, contexts)
    chosen = torch.tensor([(i in unseen) == out for i in range(len(contexts))])
    wanted = own & chosen
    wanted |= chosen & ~wanted.any(1, keepdim=True)
    rows = keys.mention_rows(model.tokenizer, names, contexts)
    return [(row, len(row) - 1) for row, want in zip(rows, wanted.flatten().tolist(), strict=True) if want]


def mentioned(scores: BatchScores) -> Float[Tensor, "row d_model"]:
    """The states at the names' last tokens."""
    assert scores.states is not None
    return scores.states.now[scores.states.answer]
