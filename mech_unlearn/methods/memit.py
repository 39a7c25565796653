"""Memit: write optimised states of all names at once into the MLP output matrices of a few layers.

Paper:    Meng et al. 2023, Mass-Editing Memory in a Transformer (MEMIT), arXiv 2210.07229, eq. 14-20.
          Options: the null-space projection of AlphaEdit (arXiv 2410.02355), the attention drift of SADR
          (arXiv 2502.14838); target "entropy" is the max-entropy defence of arXiv 2309.17410 (MEMIT-Entropy).
Changes:  the MLP output matrices of a few consecutive layers; rank at most one per name (and alias).
Needs:    the second moment C of the MLP keys of what must stay (one pass, one Cholesky of d_mlp x d_mlp per layer), and
          about 25 forward and backward passes per batch of names.
Differs:  a name has one state for all its facts and phrasings, not one per fact: see `value_optimization`;
          lambda is relative to the keys (`ridge`): k^T C^-1 k is d_mlp on average, so that the paper's 15,000 at d_mlp
          = 16,384 is 0.9 of it; `cov_weight` gives lambda itself. The system solved is of the keys' number, by the
          push-through identity, in place of d_mlp x d_mlp: the same solution;
          C is of the retained names, prompts and texts, not of Wikipedia, and gets `damping` on its diagonal;
          states and keys are means over the same contexts, with and without prefixes (the code takes the states
          without);
          behind an MLP with a norm (Gemma 2, OLMo 2) the write aims at the norm's input.
Fails:    where facts are not read from the name's last token; for names nobody listed; a large `ridge` leaves most of
          each state unwritten: see `gain` in the report.
"""

import time
from dataclasses import asdict, dataclass

import torch

from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.protect import KEY_SOURCES, KeySource, Projection, check_projection, spaces
from mech_unlearn.methods.writing.questions import Optimize, by_name, prefixes
from mech_unlearn.methods.writing.value_optimization import module_path, optimized
from mech_unlearn.model.bridge import Model

PAPER_RIDGE, NULL_SPACE_RIDGE = 0.9, 0.05


@dataclass(frozen=True, kw_only=True)
class Memit:
    """Settings of the edit; `fit` computes it."""

    layers: tuple[int, ...] | None = None
    """Layers whose MLP output matrix is written; by default `keys.default_layers`: 3-5 of 28 in GPT-J and
    7-9 of 48 in GPT-2 XL, where the paper takes 3-8 and 13-17."""
    z_layer: int | None = None
    """Layer after which the state is optimised; the last of `layers`, as in the paper, if not given."""
    optimize: Optimize = Optimize(clamp=0.75)
    """How the states are found."""
    earlier: tuple[str, ...] = ()
    """Names that an earlier edit changed, which is in force now: their keys keep their output, as in `Rocr.earlier`."""
    project: Projection = "none"
    """"null_space": P in place of C^-1, as in AlphaEdit; `ridge` is then relative to ||P k||^2."""
    ridge: float | None = None
    """lambda as a share of the mean k^T C^-1 k (or ||P k||^2); a single key gets 1 / (1 + ridge) of its shift per
    layer. None is the paper's 0.9, with "null_space" 0.05. Less is more harm: on SmolLM2 0.05 forgot no more than 0.9
    and cost unseen neighbours .10 in place of .05."""
    cov_weight: float | None = None
    """lambda itself, in place of `ridge`: 15,000 for GPT-J and Llama, 20,000 for GPT-2 XL; 10 with "null_space"."""
    energy: float = 0.1
    """For "null_space": see `Rocr.energy`."""
    damping: float = 1e-4
    """Added to C's diagonal, as a share of its mean."""
    protect: tuple[KeySource, ...] = KEY_SOURCES
    """What C, or the null space, is taken from; see `Rocr.protect`."""
    cache_dir: str | None = None
    """Folder that keeps the key statistics for the next time; None: no disk."""
    seed: int = 0
    """Draws prefixes and unknown entities."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Edit:
        """The edit of the forget set's names.

        Raises:
            ValueError: an unknown layer, nothing retained, a C without an inverse, an edit of activations in force, an
                earlier name that is to be forgotten now, or what `optimized` refuses.
        """
        start = time.perf_counter()
        check_projection(self, model)
        keys.require_new(self.earlier, forget)
        if min(self.ridge or 0, self.cov_weight or 0) < 0:
            raise ValueError(f"ridge={self.ridge}, cov_weight={self.cov_weight}: lambda is 0 or more")
        ridge = self.ridge
        if ridge is None:
            ridge = PAPER_RIDGE if self.project == "none" else NULL_SPACE_RIDGE
        wanted = keys.default_layers(model.n_layers) if self.layers is None else self.layers
        last = max(wanted, default=0) if self.z_layer is None else self.z_layer
        layers, site = keys.check_written(model, wanted, last), Site(last, "resid_post")
        asked = by_name(forget)
        bare = keys.contexts_of(forget.facts)
        with keys.count_forwards(model) as forwards:
            before = prefixes(model, forget, self.optimize.n_prefixes, self.seed)
            contexts = (*bare, *(f"{prefix} {{}}" for prefix in before))
            bases, moments = spaces(self, model, retain, bare, layers)
            own = keys.own_contexts(list(asked), forget.facts, bare)
            every = torch.cat([own, torch.ones(len(asked), len(before), dtype=torch.bool)], 1)
            states = keys.name_states(model, list(asked), contexts, site)
            initial = keys.mean_over(states[:, : len(bare)], own.to(states.device))
            path = module_path(model, last, "resid")
            found = optimized(model, asked, initial, forget, retain, path, self.optimize, before, self.seed)
            deltas, written = keys.write_states(
                model,
                keys.mention_rows(model.tokenizer, list(asked), contexts),
                (states + found.deltas[:, None]).flatten(0, 1),
                site,
                layers=layers,
                bases=bases,
                moments=moments,
                ridge=ridge,
                weight=self.cov_weight,
                own=every,
                earlier=keys.mention_rows(model.tokenizer, self.earlier, contexts),
            )
        report = {
            "names": list(asked),
            "loss_before": found.first_loss.mean().item(),
            "loss_after": found.loss.mean().item(),
            **written,
            "n_forward": forwards[0] + found.n_forward,
            "n_backward": found.n_backward,
            "seconds": time.perf_counter() - start,
        }
        recipe = {"method": "memit", "settings": asdict(self), "seed": self.seed, "report": report}
        return Edit(name="memit", base=model.hash(), deltas=deltas, recipe=recipe)
