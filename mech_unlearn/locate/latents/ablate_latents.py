"""Taking latents out of a running model, alone or together, with everything else left as it is.

Paper:    Marks et al. 2024, Sparse feature circuits, arXiv 2403.19647 (ablation with the error term kept).
Needs:    an SAE whose latents have fixed contributions.
Differs:  the contribution of a latent is what the SAE's own `decode` makes of it, which for TopK SAEs of sae-lens is
          not the stored decoder row.
Fails:    what the SAE leaves unexplained stays, and can carry the fact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.locate.latents.latent_states import ACTIVE, CODES, check_sae, latent_blocks
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import ordinary_positions
from mech_unlearn.model.latents import Sae
from mech_unlearn.model.scores import Batch, RowWrite, score
from mech_unlearn.model.tokens import Query

WHERE = ("subject", "all")


def decoder_rows(sae: Sae, latents: Sequence[int]) -> Float[Tensor, "latent d"]:
    """What each latent adds to the SAE's reconstruction per unit of activation, as its `decode` does.

    For SAEs that sae-lens trains as TopK this is not the stored row: those are divided by their norms.

    Raises:
        ValueError: the SAE scales each activation by its own norm, so that no such vector exists.
    """
    scaling = getattr(sae.sae.cfg, "normalize_activations", "none")
    if scaling in ("layer_norm", "constant_norm_rescale"):
        raise ValueError(
            f"the SAE at {sae.site} scales every activation by its own norm (normalize_activations={scaling!r}): "
            "its latents have no fixed contribution to take away; use another SAE"
        )
    rows = sae.w_dec[list(latents)].float()
    if getattr(sae.sae.cfg, "rescale_acts_by_decoder_norm", False):
        rows = rows / rows.norm(dim=-1, keepdim=True)
    tried = min(len(rows), 8)
    codes = torch.zeros(tried + 1, sae.d_sae, device=rows.device)
    codes[torch.arange(tried), torch.tensor(latents[:tried])] = 1.0
    decoded = sae.decode(codes)
    if not torch.allclose(decoded[:-1] - decoded[-1], rows[:tried], rtol=1e-3, atol=1e-4):
        raise ValueError(f"the SAE at {sae.site} does not decode by its decoder rows; use another architecture")
    return rows


def check_latents(model: Model, sae: Sae, latents: Sequence[int], where: str) -> None:
    """Check that latents and place exist.

    Raises:
        ValueError: an SAE that does not fit the model, another `where`, latents that do not exist or named twice.
    """
    check_sae(model, sae)
    if where not in WHERE:
        raise ValueError(f"where={where!r}: choose {' or '.join(WHERE)}")
    wrong = [j for j in latents if not 0 <= j < sae.d_sae]
    if wrong or len(set(latents)) < len(latents):
        raise ValueError(f"latents {wrong or 'twice named'}: name some of 0..{sae.d_sae - 1}, each once")


def ablate(model: Model, sae: Sae, latents: Sequence[int], where: str = "subject") -> RowWrite:
    """A write for `score` that takes a set of latents out, h - sum_j a_j(h) w_j, and leaves all else as it is.

    Use it as `score(model, queries, {sae.site: ablate(model, sae, latents)})`.

    Args:
        where: at the subject's last token, or at "all" tokens of prompt and answer but special ones.

    Raises:
        ValueError: latents that do not exist, or an SAE that does not fit or scales each activation.
    """
    check_latents(model, sae, latents, where)
    rows, chosen = decoder_rows(sae, latents), list(latents)
    special = torch.tensor(model.tokenizer.all_special_ids, device=model.device)

    def write(x: Float[Tensor, "batch pos d"], batch: Batch) -> Tensor:
        if where == "subject":
            place = (torch.arange(len(x), device=x.device), batch.span[:, 1] - 1)
        else:
            place = torch.isin(batch.ids, special, invert=True).nonzero(as_tuple=True)
        out = x.clone()
        parts = [h.float() - sae.encode(h)[:, chosen] @ rows for h in x[place].split(max(1, CODES // sae.d_sae))]
        out[place] = torch.cat(parts).to(x)
        return out

    return write


@dataclass(frozen=True, eq=False)
class Codes:
    """The active latents of one prompt, at the chosen positions."""

    position: Int[Tensor, " entry"]
    latent: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]


def active_codes(model: Model, sae: Sae, queries: Sequence[Query], where: str) -> list[Codes]:
    """The active latents of each prompt; with "all" also at the answer's tokens that are fed in."""
    rows = [query.full[:-1] for query in queries]
    places = [(q.span[1] - 1,) for q in queries] if where == "subject" else ordinary_positions(model, rows)
    index, latent, value = [], [], []
    for at, acts in latent_blocks(model, sae, rows, places):
        state, active = (acts > ACTIVE).nonzero(as_tuple=True)
        index.append(at[state.cpu()])
        latent.append(active.cpu())
        value.append(acts[state, active].cpu())
    where_, latents, values = torch.cat(index), torch.cat(latent), torch.cat(value)
    order = where_[:, 0].argsort(stable=True)
    counts = torch.bincount(where_[:, 0], minlength=len(queries)).tolist()
    parts = zip(*(x[order].split(counts) for x in (where_[:, 1], latents, values)), strict=True)
    return [Codes(*part) for part in parts]


@dataclass(frozen=True, eq=False)
class Removal:
    """One prompt and one latent to take out of it."""

    query: int
    latent: int
    position: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]
    others: Int[Tensor, " other"]
    """Latents that the control may use."""


def make_removals(codes: Sequence[Codes], wanted: Sequence[int], barred: Sequence[int]) -> list[Removal]:
    """One removal for each prompt and wanted latent that is active there; controls never use the barred latents."""
    pairs, wanted_, barred_ = [], torch.tensor(wanted), torch.tensor(barred, dtype=torch.long)
    for q, code in enumerate(codes):
        active = code.latent.unique()
        free = active[~torch.isin(active, barred_)]
        for j in active[torch.isin(active, wanted_)].tolist():
            hit = code.latent == j
            pairs.append(Removal(q, j, code.position[hit], code.value[hit], free[free != j]))
    return pairs


@dataclass(frozen=True, eq=False)
class _Subtract:
    """Write function that takes `amount` times a direction away; one of each for every query."""

    amount: Float[Tensor, "query pos"]
    direction: Float[Tensor, "query d"]

    def __call__(self, x: Float[Tensor, "batch pos d"], batch: Batch) -> Tensor:
        amount = self.amount[batch.query, : x.shape[1]]
        return (x.float() - amount[..., None] * self.direction[batch.query][:, None]).to(x)


def without(
    model: Model, site: Site, queries: Sequence[Query], pairs: Sequence[Removal], directions: Float[Tensor, "pair d"]
) -> Float[Tensor, " pair"]:
    """Log-probability of the answer, nats per token, with each pair's activation times its direction taken out."""
    size, parts = max(1, CODES // directions.shape[1]), []
    width = max(len(query.full) for query in queries)
    for start in range(0, len(pairs), size):
        chunk = pairs[start : start + size]
        amount = torch.zeros(len(chunk), width)
        for i, pair in enumerate(chunk):
            amount[i, pair.position] = pair.value
        write = _Subtract(amount.to(model.device), directions[start : start + size].to(model.device))
        parts.append(score(model, [queries[pair.query] for pair in chunk], {site: write}).logprob[:, 0])
    return torch.cat(parts)


def control_of(
    model: Model, site: Site, queries: Sequence[Query], pairs: Sequence[Removal], rows: Tensor, draws: int, seed: int
) -> Float[Tensor, " pair"]:
    """Mean over draws of `without` along other active latents, as long as the pair's own row; NaN where none is."""
    generator = torch.Generator().manual_seed(seed)
    usable = [i for i, pair in enumerate(pairs) if len(pair.others)]
    out = torch.full((len(pairs),), float("nan"))
    total = torch.zeros(len(usable))
    for _ in range(draws if usable else 0):
        picks = [torch.randint(len(pairs[i].others), (1,), generator=generator) for i in usable]
        other = rows[torch.cat([pairs[i].others[pick] for i, pick in zip(usable, picks, strict=True)])]
        own = rows[[pairs[i].latent for i in usable]].norm(dim=-1, keepdim=True)
        along = other / other.norm(dim=-1, keepdim=True).clamp(min=1e-12) * own
        total += without(model, site, queries, [pairs[i] for i in usable], along)
    if draws:
        out[usable] = total / draws
    return out
