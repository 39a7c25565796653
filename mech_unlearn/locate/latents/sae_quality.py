"""How much of a model an SAE explains: variance, the loss when it is spliced in, latents per token, dead latents.

Paper:    Gao et al. 2024, Scaling and evaluating sparse autoencoders, arXiv 2406.04093, section 4.1 (downstream loss);
          loss recovered as in Karvonen et al. 2025, SAEBench, arXiv 2503.09532.
Needs:    texts; five forward passes per token.
Differs:  special tokens (BOS) are neither replaced nor predicted: their states are outliers that no SAE should be
          judged by; the first token of a piece is predicted only where a special token stands before it. Mean ablation
          stands beside zero ablation, which is the more destructive and so the more flattering yardstick.
Fails:    a share of the loss near 1 says little where the site hardly matters, and nothing about single latents; on
          text unlike the SAE's training text every number is worse.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.core import Measurement
from mech_unlearn.locate.latents.latent_states import ACTIVE, CODES, check_sae
from mech_unlearn.metrics.intervals import DRAWS
from mech_unlearn.model.bridge import Model, Write
from mech_unlearn.model.capture import ordinary_positions, stream
from mech_unlearn.model.latents import Sae
from mech_unlearn.model.pieces import pieces
from mech_unlearn.model.tokens import buckets

RUNS = ("clean", "sae", "zero", "mean")


@dataclass(frozen=True, kw_only=True)
class SaeQuality:
    """How well an SAE stands in for its site on some texts. Intervals: percentile bootstrap over texts."""

    fvu: Measurement
    """sum ||h - h^||^2 / sum ||h - mean h||^2; n counts tokens. The mean is not resampled."""
    ce_clean: Measurement
    """Mean next-token cross-entropy in nats per token; n counts predicted tokens."""
    ce_sae: Measurement
    """The same with the SAE's reconstruction in place of the site, the error term dropped."""
    ce_zero: Measurement
    """The same with the site set to zero."""
    ce_mean: Measurement
    """The same with the site set to its mean over these tokens."""
    recovered: Measurement
    """(CE_zero - CE_sae) / (CE_zero - CE_clean): 1 as the model, 0 as zero ablation; NaN where that costs nothing."""
    recovered_mean: Measurement
    """The same against mean ablation."""
    l0: Measurement
    """Latents active per token."""
    dead: float
    """Share of latents active on none of the tokens. It falls with their number."""

    def __str__(self) -> str:
        return f"FVU {self.fvu}, CE recovered {self.recovered}, L0 {self.l0}, {self.l0.n} tokens"


def _mean_state(
    model: Model, sae: Sae, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]], max_tokens: int
) -> Float[Tensor, " d"]:
    total, count = torch.zeros(1, dtype=torch.float64), 0
    for part in stream(model, rows, [sae.site], places, max_tokens=max_tokens):
        total = total + part.at[sae.site].double().sum(0)
        count += len(part.index)
    return (total / max(count, 1)).float()


def _losses(model: Model, ids: Tensor, target: Tensor, write: tuple | None) -> Float[Tensor, "row pos"]:
    """Cross-entropy of each token but the first, zero where `target` is False."""
    with model.hooks(*([write] if write else [])):
        logits = model.logits(ids)[:, :-1]
    rows = [torch.nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in zip(logits, ids[:, 1:])]
    return (torch.stack(rows) * target[:, 1:]).double().cpu()


def _batches(
    model: Model, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    for members in buckets(rows, max_tokens):
        ids = torch.tensor([list(rows[i]) for i in members], device=model.device)
        ordinary = torch.zeros(ids.shape, dtype=torch.bool, device=model.device)
        for r, i in enumerate(members):
            ordinary[r, list(places[i])] = True
        yield members, ids, ordinary


def _fill(ordinary: Bool[Tensor, "row pos"], make: Callable[[Tensor], Tensor], size: int) -> Write:
    """A write that replaces the ordinary positions, `size` of them at a time."""

    def write(x: Tensor) -> Tensor:
        out = x.clone()
        out[ordinary] = torch.cat([make(h).to(x) for h in x[ordinary].split(size)])
        return out

    return write


@torch.no_grad()
def _sums(
    model: Model, sae: Sae, rows: Sequence[Sequence[int]], owner: Sequence[int], n_texts: int, max_tokens: int
) -> tuple[Float[Tensor, "text sum"], float]:
    """Per text: tokens, predicted tokens, error, variance, active latents, and the losses of `RUNS`; and dead share."""
    places = ordinary_positions(model, rows)
    mean = _mean_state(model, sae, rows, places, max_tokens).to(model.device)
    sums = torch.zeros(n_texts, 5 + len(RUNS), dtype=torch.float64)
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=model.device)
    size = max(1, CODES // sae.d_sae)
    for members, ids, ordinary in _batches(model, rows, places, max_tokens):
        new = torch.zeros(len(members), sums.shape[1], dtype=torch.float64)

        def look(x: Tensor, ordinary: Tensor = ordinary, new: Tensor = new) -> None:
            row = ordinary.nonzero()[:, 0]
            for at, h in zip(row.split(size), x[ordinary].float().split(size), strict=True):
                active = sae.encode(h) > ACTIVE
                fired.logical_or_(active.any(0))
                error = (h - sae.reconstruct(h)).double().square().sum(-1)
                values = torch.stack([error, (h - mean).double().square().sum(-1), active.sum(-1).double()], 1)
                new[:, 2:5].index_add_(0, at.cpu(), values.cpu())

        runs = (
            (sae.site, look),
            (sae.site, _fill(ordinary, sae.reconstruct, size)),
            (sae.site, _fill(ordinary, torch.zeros_like, size)),
            (sae.site, _fill(ordinary, mean.expand_as, size)),
        )
        new[:, 0], new[:, 1] = ordinary.sum(1).cpu(), ordinary[:, 1:].sum(1).cpu()
        for k, write in enumerate(runs):
            new[:, 5 + k] = _losses(model, ids, ordinary, write).sum(1)
        sums.index_add_(0, torch.tensor([owner[i] for i in members]), new)
    return sums, 1 - fired.float().mean().item()


def _resampled(sums: Float[Tensor, "text sum"], seed: int) -> Float[Tensor, "draw sum"]:
    """Sums over texts drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    n = len(sums)
    return torch.stack([sums[torch.randint(n, (n,), generator=generator)].sum(0) for _ in range(DRAWS)])


def _recovered(sums: Tensor, ablated: int) -> Tensor:
    clean, spliced, gone = sums[..., 5], sums[..., 6], sums[..., ablated]
    return torch.where(gone > clean, (gone - spliced) / (gone - clean), torch.nan)


def sae_quality(
    model: Model, sae: Sae, texts: Sequence[str], *, context: int = 512, max_tokens: int = 2048, seed: int = 0
) -> SaeQuality:
    """FVU, cross-entropy with the SAE spliced in and with its site ablated, latents per token, dead latents.

    Means are over the real tokens of all texts. Replaced are all positions but those of special tokens.

    Args:
        context: longer texts are cut into pieces of this many tokens (or the model's positions, if fewer).
        max_tokens: tokens of one batch at the most; their logits are held.

    Raises:
        ValueError: fewer than two tokens to predict, states that do not vary, or an SAE that does not fit the model.
    """
    check_sae(model, sae)
    cut = pieces(model, texts, context)
    rows, owner = [piece.ids for piece in cut], [piece.text for piece in cut]
    if sum(place > 0 for at in ordinary_positions(model, rows) for place in at) < 2:
        raise ValueError(f"{len(texts)} texts hold fewer than two tokens to predict: give running text")
    sums, dead = _sums(model, sae, rows, owner, len(texts), max_tokens)
    tokens, predicted = (int(sums[:, i].sum()) for i in (0, 1))
    if sums[:, 3].sum() <= 0:
        raise ValueError(f"the states at {sae.site} do not vary over {tokens} tokens: give other texts")
    total, drawn = sums.sum(0), _resampled(sums, seed)

    def measured(over: Callable[[Tensor], Tensor], unit: str, n: int) -> Measurement:
        low, high = over(drawn).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Measurement(value=over(total).item(), ci=(low, high), n=n, unit=unit)

    ce = [measured(lambda s, k=k: s[..., 5 + k] / s[..., 1], "nats per token", predicted) for k in range(len(RUNS))]
    return SaeQuality(
        fvu=measured(lambda s: s[..., 2] / s[..., 3], "fraction of variance unexplained", tokens),
        ce_clean=ce[0],
        ce_sae=ce[1],
        ce_zero=ce[2],
        ce_mean=ce[3],
        recovered=measured(lambda s: _recovered(s, 7), "share of the loss recovered", predicted),
        recovered_mean=measured(lambda s: _recovered(s, 8), "share of the loss recovered", predicted),
        l0=measured(lambda s: s[..., 4] / s[..., 0], "latents per token", tokens),
        dead=dead,
    )
