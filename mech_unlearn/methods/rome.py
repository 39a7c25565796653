"""Rome: write one optimised value per name into one MLP's output matrix, by a rank-one update.

Paper:    Meng et al. 2022, Locating and Editing Factual Associations in GPT (ROME), arXiv 2202.05262, eq. 2-4.
          Options: projection of AlphaEdit (arXiv 2410.02355), attention drift of SADR (arXiv 2502.14838), targets
          "entropy" and "empty" after arXiv 2309.17410.
Changes:  the MLP output matrix of one layer; rank at most one per name (and alias).
Needs:    the second moment C of the MLP's keys (one pass over what must stay, one Cholesky of d_mlp x d_mlp), and
          about 25 forward and backward passes per batch of names.
Differs:  a name has one value for all its facts and phrasings, not one per fact: see `value_optimization`;
          names are optimised `optimize.batch_size` at a time on the model as edited so far and then written one after
          another; 1 is the original order, in which each optimisation sees every earlier edit;
          keys are means over the name's own phrasings, k* with and k_b without prefixes (the code has one prompt);
          C is of the retained names, prompts and texts, not of Wikipedia, and gets `damping` on its diagonal, without
          which it has no inverse where tokens are few;
          the value is the output of the matrix itself also where a norm follows (Gemma 2, OLMo 2), so that the write is
          linear and exact there too;
          with project="null_space" the direction u is P k* instead of C^-1 k*, without a ridge, as ROME has none.
Fails:    where k_b . u is small, the update explodes ("disabling edits"): `RRome` mends it; many names in one matrix
          undo each other, as each write ignores the earlier ones; where facts are not read from the name's last token.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mech_unlearn.core import Fact, ForgetSet, RetainSet, Site
from mech_unlearn.edit.edit import Edit, LowRank
from mech_unlearn.edit.interventions import Tokens
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.protect import KEY_SOURCES, KeySource, Projection, check_projection, spaces
from mech_unlearn.methods.writing.questions import Optimize, by_name, prefixes
from mech_unlearn.methods.writing.value_optimization import module_path, optimized
from mech_unlearn.model.bridge import Model

KeyAndOutput = tuple[Float[Tensor, "name d_mlp"], Float[Tensor, "name d_model"]]


@dataclass(frozen=True, kw_only=True)
class Rome:
    """Settings of the edit; `fit` computes it."""

    layer: int | None = None
    """Layer whose MLP output matrix is written; by default the last of `keys.default_layers`: 8 of 24 in GPT-2
    medium and 5 of 28 in GPT-J, as in the paper, but 9 of 48 in GPT-2 XL, where it takes 17."""
    optimize: Optimize = Optimize()
    """How the values are found."""
    project: Projection = "none"
    """"null_space": the write is confined to directions that retained keys hardly use, as in AlphaEdit."""
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
            ValueError: an unknown layer, nothing retained, a C without an inverse, an edit of activations in force, or
                what `optimized` refuses.
        """
        return rank_one_edit("rome", self, model, forget, retain, same_key=False)


@dataclass(frozen=True, kw_only=True)
class RRome(Rome):
    """RRome: ROME with one and the same key in both places of its update, so that no edit explodes.

    Paper:    Gupta et al. 2024, Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing,
              arXiv 2403.07175; the rest as in ROME, arXiv 2202.05262.
    Changes:  the MLP output matrix of one layer; rank at most one per name (and alias).
    Needs:    what `Rome` needs; its settings are the same.
    Differs:  as `Rome` does.
    Fails:    the value is reached at the averaged key and only nearly at the key of one phrasing; else as `Rome`.
    """

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Edit:
        """The edit of the forget set's names.

        Raises:
            ValueError: as `Rome.fit`.
        """
        return rank_one_edit("r_rome", self, model, forget, retain, same_key=True)


def direction(
    key: Float[Tensor, " d_mlp"],
    moment: Float[Tensor, "d_mlp d_mlp"] | None,
    basis: Float[Tensor, "d_mlp kept"] | None,
) -> Float[Tensor, " d_mlp"]:
    """u = C^-1 k of unit length; P k where there is no C.

    Source: 2202.05262, eq. 2 and its code.
    """
    u = keys.project(basis, key[:, None]) if moment is None else keys.solve_moment(moment, key[:, None])
    return u[:, 0] / u.norm()


def rank_one(
    u: Float[Tensor, " d_mlp"], key: Float[Tensor, " d_mlp"], missing: Float[Tensor, " d_model"]
) -> Float[Tensor, "d_mlp d_model"]:
    """u (v* - W k)^T / (k . u): after it, k gives v*.

    Source: 2202.05262, eq. 2.
    """
    return torch.outer(u, missing) / (key @ u)


def rank_one_edit(
    name: str, settings: Any, model: Model, forget: ForgetSet, retain: RetainSet, *, same_key: bool
) -> Edit:
    """The edit of `Rome`, or with `same_key` that of `RRome`: the averaged key in the denominator too."""
    start = time.perf_counter()
    check_projection(settings, model)
    wanted = keys.default_layers(model.n_layers)[-1] if settings.layer is None else settings.layer
    (layer,) = keys.check_layers(model, (wanted,), wanted)
    asked = by_name(forget)
    weight, stored_in_first = model.w_out(layer)
    path = module_path(model, layer, "mlp")
    lefts, rights, losses, first = [], [], [], []
    passes, overlaps = [0, 0], []
    deltas: dict[str, LowRank] = {}
    with keys.count_forwards(model) as forwards, tqdm(total=len(asked), desc=name, delay=2, disable=None) as bar:
        before = prefixes(model, forget, settings.optimize.n_prefixes, settings.seed)
        bases, moments = spaces(settings, model, retain, keys.contexts_of(forget.facts), (layer,))
        size = settings.optimize.batch_size
        for chunk in (list(asked)[i : i + size] for i in range(0, len(asked), size)):
            group = {n: asked[n] for n in chunk}
            with Edit(name="partial", base="", deltas=deltas).on(model):
                averaged, bare = means(model, group, before, layer, path)
                initial = bare[1]
                found = optimized(model, group, initial, forget, retain, path, settings.optimize, before, settings.seed)
            written = torch.zeros(averaged[0].shape[1], initial.shape[1]).to(initial)
            at, given = averaged if same_key else bare
            for i in range(len(chunk)):
                u = direction(averaged[0][i], moments.get(layer), bases.get(layer))
                missing = initial[i] + found.deltas[i] - (given[i] + at[i] @ written)
                written += rank_one(u, at[i], missing)
                overlaps.append(((at[i] @ u) / at[i].norm()).item())
                lefts.append(u)
                rights.append(missing / (at[i] @ u))
            deltas = {weight: keys.low_rank(torch.stack(lefts, 1), torch.stack(rights), stored_in_first)}
            losses.append(found.loss)
            first.append(found.first_loss)
            passes = [passes[0] + found.n_forward, passes[1] + found.n_backward]
            bar.update(len(chunk))
    report = {
        "layer": layer,
        "names": list(asked),
        "loss_before": torch.cat(first).mean().item(),
        "loss_after": torch.cat(losses).mean().item(),
        "overlap": overlaps,
        "free_rank": bases[layer].shape[1] if bases else None,
        "delta_norm": {weight: keys.delta_norm(deltas[weight])},
        "n_forward": forwards[0] + passes[0],
        "n_backward": passes[1],
        "seconds": time.perf_counter() - start,
    }
    recipe = {"method": name, "settings": asdict(settings), "seed": settings.seed, "report": report}
    return Edit(name=name, base=model.hash(), deltas=deltas, recipe=recipe)


def means(
    model: Model, asked: dict[str, tuple[Fact, ...]], before: tuple[str, ...], layer: int, path: str
) -> tuple[KeyAndOutput, KeyAndOutput]:
    """Key and the matrix's output (with its bias) of each name: mean over its contexts with and without prefixes; mean
    over those without."""
    rows: list[Tokens] = []
    spans = []
    for name, facts in asked.items():
        bare = keys.contexts_of(facts)
        some = (*bare, *(f"{prefix} {context}" for prefix in before for context in bare))
        spans.append((len(rows), len(bare), len(some)))
        rows += keys.mention_rows(model.tokenizer, [name], some)
    place = Site(layer, "mlp_post")
    states = keys.end_states(model, rows, [place, path])
    every = [torch.stack([states[p][a : a + n].mean(0) for a, _, n in spans]) for p in (place, path)]
    own = [torch.stack([states[p][a : a + b].mean(0) for a, b, _ in spans]) for p in (place, path)]
    return (every[0], every[1]), (own[0], own[1])
