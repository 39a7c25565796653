"""Rocr: redirect what a name calls up in early MLPs to another entity, by a closed-form write, without training.

Paper:    Ye, Zhang and Wu 2025, rank-one concept redirection (ROCR), arXiv 2506.07795.
          Its normal equations are those of AlphaEdit (arXiv 2410.02355).
Changes:  the MLP output matrices of a few consecutive layers; rank at most one per name (and alias).
Needs:    the second moment of the MLP keys of what must stay: one pass over the retain prompts and texts and one
          eigendecomposition of a d_mlp x d_mlp matrix per layer. No gradients.
Differs:  all entities are solved for at once, and an alias is a further key (the paper edits one name at a time);
          state and target are taken in the same contexts (the code takes the target inside a chat prompt and the
          state in the bare name, which writes the difference of the contexts too);
          contexts are what stands before the name in the phrasings of its own facts (the code has six chat prompts for
          every name);
          the ridge is relative to the projected keys' norm, because an absolute lambda of 1 or 10 fits only the key
          norms of 7-8B models; the null space is chosen by a share of the keys' energy, for the same reason;
          the default target is an unknown entity's state, one per name: a famous person's, as in the paper, makes the
          model answer with that person's facts; it is drawn at random, because the unknown names nearest to a known
          one call up some of the same answers;
          behind an MLP with a norm (Gemma 2, OLMo 2) the write aims at the norm's input;
          layer 0 is written too for names that open a prompt (the code's chat prompts never do);
          the protected keys count retain names as much as all other tokens, which would otherwise drown them;
          anchor "neutral" is ours; with "reject" one vector serves all facts of a name: see `value_optimization`; the
          keys of `earlier` names count one by one, in each context, where the code adds up their mean.
Fails:    where facts are not read from the name's last token; for names nobody listed (aliases, misspellings);
          where the free directions are too few for the names: see `free_rank` and `gain` in the report.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.edit.edit import Edit
from mech_unlearn.edit.interventions import Tokens
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.anchors import draw_anchors, known_names, measured
from mech_unlearn.methods.writing.protect import KEY_SOURCES, KeySource, protected_bases
from mech_unlearn.methods.writing.questions import Optimize, by_name, prefixes
from mech_unlearn.methods.writing.value_optimization import module_path, optimized
from mech_unlearn.model.bridge import Model

NEUTRAL = 64
"""Entities that the anchor "neutral" is a mean over, at the most."""


@dataclass(frozen=True, kw_only=True)
class Rocr:
    """Settings of the redirection; `fit` computes it."""

    layers: tuple[int, ...] | None = None
    """Layers whose MLP output matrix is written; by default `keys.default_layers` of the depth, and layer 0 besides
    where a name is the first token of a phrasing: a few layers on its state there is an attention sink, which no write
    turns, while later layers still read the name from it."""
    z_layer: int | None = None
    """Layer after which the state at the name's last token is to be the anchor's; the last of `layers` if not given."""
    anchor: str = "unknown"
    """"unknown": each name gets the state of an unknown entity of its own; "neutral": all get the mean state of up to
    `NEUTRAL` retained entities of their kind, a generic one; "reject": each gets its own state plus a vector found by
    gradient descent (`optimize`); else one name that all are redirected to."""
    optimize: Optimize = Optimize(clamp=0.75)
    """For anchor "reject": how the vector is found; target "refusal" is the paper's."""
    earlier: tuple[str, ...] = ()
    """Names that an earlier edit redirected, which is in force now: their keys keep their output (the cache C of
    2506.07795). Fit inside `with earlier_edit.on(model)` and apply there."""
    ridge: float = 0.05
    """lambda as a share of the mean ||P k||^2; a single key then gets 1 / 1.05 of its shift per layer."""
    energy: float = 0.1
    """Share of the protected keys' energy that the directions used may hold; 1 or more protects nothing. With less,
    names share fewer directions, and a write in fewer directions is larger and spills over more."""
    contexts: tuple[str, ...] | None = None
    """Templates with {} for the name; by default the phrasings of its own forget facts (never the held-out ones)."""
    protect: tuple[KeySource, ...] = KEY_SOURCES
    """What feeds the null space: the retained names at their last token ("entities"), all tokens of the retained facts'
    prompts ("prompts"), all tokens of the retained texts ("texts")."""
    cache_dir: str | None = None
    """Folder that keeps the key statistics for the next time; None: no disk."""
    seed: int = 0
    """Draws the unknown, neutral and other entities, and prefixes."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Edit:
        """The redirection of the forget set's entities.

        Raises:
            ValueError: an unknown layer, no unknown entities, an anchor that is to be forgotten, nothing to protect, an
                earlier name that is to be forgotten now, or what `optimized` refuses.
        """
        start = time.perf_counter()
        contexts = self.contexts or keys.contexts_of(forget.facts)
        names = keys.names_of(forget.entities)
        layers, site = self._places(model, keys.stands_first(model.tokenizer, names, contexts))
        keys.require_new(self.earlier, forget)
        with keys.count_forwards(model) as forwards:
            rows = keys.mention_rows(model.tokenizer, names, contexts)
            own = keys.own_contexts(names, forget.facts, contexts)
            extra: dict[str, Any] = {}
            if self.anchor == "reject":
                targets, extra = self._rejected(model, forget, retain, rows, own, site)
            else:
                extra["anchors"], targets = self._targets(model, forget, retain, names, contexts, site)
            if self.anchor == "unknown":
                extra |= measured(model, forget, extra["anchors"])
            bases = protected_bases(model, retain, contexts, layers, self.protect, self.energy, self.cache_dir)
            deltas, written = keys.write_states(
                model,
                rows,
                targets,
                site,
                layers=layers,
                bases=bases,
                ridge=self.ridge,
                own=own,
                earlier=keys.mention_rows(model.tokenizer, self.earlier, contexts),
            )
        forwards[0] += extra.pop("n_forward", 0)
        report = {**written, "n_backward": 0, **extra, "n_forward": forwards[0]}
        report["seconds"] = time.perf_counter() - start
        recipe = {"method": "rocr", "settings": asdict(self), "seed": self.seed, "report": report}
        return Edit(name="rocr", base=model.hash(), deltas=deltas, recipe=recipe)

    def _places(self, model: Model, sink: bool) -> tuple[tuple[int, ...], Site]:
        layers = keys.default_layers(model.n_layers) if self.layers is None else self.layers
        if self.layers is None and sink:
            layers = tuple(sorted({0, *layers}))
        last = max(layers, default=0) if self.z_layer is None else self.z_layer
        return keys.check_written(model, layers, last), Site(last, "resid_post")

    def _targets(
        self,
        model: Model,
        forget: ForgetSet,
        retain: RetainSet,
        names: Sequence[str],
        contexts: Sequence[str],
        site: Site,
    ) -> tuple[dict[str, str], Float[Tensor, "row d_model"]]:
        """(Name -> its anchor, the anchor's state in each of the name's contexts)."""
        if self.anchor == "neutral":
            pool = list(known_names(forget, retain))
            chosen = random.Random(self.seed).sample(pool, min(NEUTRAL, len(pool)))
            state = keys.name_states(model, chosen, contexts, site).mean(0)
            return dict.fromkeys(names, f"mean of {len(chosen)} names"), state.repeat(len(names), 1)
        if self.anchor != "unknown":
            if self.anchor in names:
                raise ValueError(f"anchor {self.anchor!r} is to be forgotten itself; choose another name")
            rows = keys.mention_rows(model.tokenizer, [self.anchor], contexts)
            return dict.fromkeys(names, self.anchor), keys.end_states(model, rows, [site])[site].repeat(len(names), 1)
        anchors = draw_anchors(model, forget, retain, self.seed)
        return anchors, keys.name_states(model, list(anchors.values()), contexts, site).flatten(0, 1)

    def _rejected(
        self,
        model: Model,
        forget: ForgetSet,
        retain: RetainSet,
        rows: Sequence[Tokens],
        own: Bool[Tensor, "name context"],
        site: Site,
    ) -> tuple[Float[Tensor, "row d_model"], dict[str, Any]]:
        """(Each name's state in each context plus the vector found for it, report)."""
        asked = by_name(forget)
        states = keys.end_states(model, rows, [site])[site].unflatten(0, own.shape)
        initial = keys.mean_over(states, own.to(states.device))
        path = module_path(model, site.layer, "resid")
        before = prefixes(model, forget, self.optimize.n_prefixes, self.seed)
        found = optimized(model, asked, initial, forget, retain, path, self.optimize, before, self.seed)
        report = {"loss_before": found.first_loss.mean().item(), "loss_after": found.loss.mean().item()}
        report |= {"n_forward": found.n_forward, "n_backward": found.n_backward}
        return (states + found.deltas[:, None]).flatten(0, 1), report
