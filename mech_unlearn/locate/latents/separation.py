"""Which latents of an SAE tell two groups of items apart: the part that all contrasts share.

An item is an entity, a subject or a text; what is known of it is, per latent, the share of its states on which the
latent is active and one activation. `known_unknown` and `latent_scores` make the groups.

Paper:    Ferrando, Obeso, Rajamanoharan, Nanda 2024, Do I know this entity?, arXiv 2411.14257, section 3 (scores,
          background filter, smallest over types); Ashuach et al. 2025, CRISP, arXiv 2508.13650 (activation ratio).
Needs:    at least four items of each type and group, two to fit and two to test.
Differs:  readouts are scored by AUC on held-out items, and a logistic readout on the best latents stands beside the
          single ones. CRISP counts tokens and sums activations of texts of equal length; here every item counts once.
Fails:    with few items the best of many latents is partly luck, hence the AUC on items that nothing was chosen on.
          Separating is not controlling the answer: see `latent_effects`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Site
from mech_unlearn.locate.latents.latent_states import Background
from mech_unlearn.metrics.intervals import resampled_aucs
from mech_unlearn.model.latents import Sae


@dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """Items of one class and what the latents do on them."""

    label: str
    noun: str
    """What an item is, in the plural: entities, subjects, texts."""
    names: tuple[str, ...]
    kinds: tuple[str | None, ...]
    """Type of each item; scores are the smallest over types."""
    rate: Float[Tensor, "item d_sae"]
    """Share of the item's states on which the latent is active."""
    activation: Float[Tensor, "item d_sae"]


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Latents and readouts that tell the items of a first group from those of a second one, at one site."""

    site: Site
    first: Attribution
    """f_1 - f_2 of each latent, the smallest over types; NaN for latents that fire on any text."""
    second: Attribution
    """f_2 - f_1, in the same way."""
    ratio: Attribution
    """Activations on the first group over those on the second (CRISP), the smallest over types; NaN as above."""
    auc: Attribution
    """Area under the ROC curve, first above second, on items that nothing was chosen on, for each readout."""
    background: Float[Tensor, " d_sae"] | None
    """Share of generic tokens on which each latent is active; None where no filter was applied."""
    heldout: tuple[tuple[str, ...], tuple[str, ...]]
    """Names of the items of the first and of the second group that only tested."""

    def top_first(self, k: int = 20) -> tuple[int, ...]:
        """Indices of the k latents that most mark the first group, best first."""
        return tuple(at["latent"] for at, _ in self.first.top(k))

    def top_second(self, k: int = 20) -> tuple[int, ...]:
        """Indices of the k latents that most mark the second group, best first."""
        return tuple(at["latent"] for at, _ in self.second.top(k))


def _by_kind(
    groups: tuple[Group, Group], share: float, generator: torch.Generator
) -> tuple[list[tuple[list[int], list[int]]], tuple[list[int], list[int]]]:
    """For each type the fitting indices in both groups, and the held-out indices of both groups."""
    fitting, held = [], ([], [])
    for kind in dict.fromkeys(kind for group in groups for kind in group.kinds):
        pair = []
        for side, group in enumerate(groups):
            members = [i for i, k in enumerate(group.kinds) if k == kind]
            mixed = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            test = round(len(mixed) * share)
            if test < 2 or len(mixed) - test < 2:
                raise ValueError(
                    f"{len(mixed)} {group.label} {group.noun} of kind {kind!r}: with heldout={share} each part needs "
                    "two or more"
                )
            held[side].extend(mixed[:test])
            pair.append(mixed[test:])
        fitting.append(tuple(pair))
    return fitting, held


def _auc_interval(
    positive: Tensor, negative: Tensor, generator: torch.Generator, draws: int = 1000
) -> tuple[float, float, float]:
    """AUC and its 95 % percentile bootstrap interval over the items of each group."""
    values = resampled_aucs(positive[None], negative[None], generator, draws)[:, 0]
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return values[0].item(), low, high


def _difference(first: Float[Tensor, "a d_sae"], second: Float[Tensor, "b d_sae"]) -> tuple[Tensor, Tensor]:
    """Difference of firing frequencies per latent and the half width of its normal 95 % interval over items."""
    a, b = first.double(), second.double()
    error = a.var(0, unbiased=True) / len(a) + b.var(0, unbiased=True) / len(b)
    return a.mean(0) - b.mean(0), 1.96 * error.sqrt()


def _scores(
    groups: tuple[Group, Group], fitting: Sequence[tuple[list[int], list[int]]], general: Tensor, site: Site, note: str
) -> Attribution:
    first, second = groups
    parts = [_difference(first.rate[a], second.rate[b]) for a, b in fitting]
    values, which = torch.stack([p[0] for p in parts]).min(0)
    half = torch.stack([p[1] for p in parts]).gather(0, which[None])[0]
    values = values.masked_fill(general, float("nan"))
    return Attribution(
        name=f"{first.label} latents at {site}",
        values=values.float(),
        axes=("latent",),
        labels={"latent": tuple(range(len(values)))},
        unit="difference of firing frequency",
        n=sum(len(a) + len(b) for a, b in fitting),
        low=(values - half).float(),
        high=(values + half).float(),
        note=note,
    )


def _ratio(
    groups: tuple[Group, Group], fitting: Sequence[tuple[list[int], list[int]]], general: Tensor, site: Site
) -> Attribution:
    """sum of activations on the first group / (sum on the second + 1), the second sum scaled to as many items."""
    first, second = groups
    parts = []
    for a, b in fitting:
        mine, theirs = first.activation[a].double().sum(0), second.activation[b].double().sum(0) * len(a) / len(b)
        parts.append(mine / (theirs + 1))
    values = torch.stack(parts).amin(0).masked_fill(general, float("nan"))
    return Attribution(
        name=f"activation on {first.label} over {second.label} {first.noun} at {site}",
        values=values.float(),
        axes=("latent",),
        labels={"latent": tuple(range(len(values)))},
        unit="ratio of summed activations",
        n=sum(len(a) + len(b) for a, b in fitting),
        note=f"sum / (sum + 1), per {len(fitting)} types the smallest",
    )


@torch.no_grad()
def separate(
    sae: Sae,
    first: Group,
    second: Group,
    generic: Background,
    *,
    max_background: float = 0.02,
    top: int = 20,
    heldout: float = 0.5,
    seed: int = 0,
) -> Contrast:
    """Which latents fire on the items of one group and not on those of the other (2411.14257, section 3).

    On the fitting items, f_1 - f_2 and f_2 - f_1, the smallest over types; f is the mean over items of the share of
    states on which the latent is active. On the held-out items, the AUC (first above second) of three readouts: the
    activation of the latent that most marks the first group, minus that of the one that most marks the second, and a
    logistic regression on the `top` best of both.

    Args:
        max_background: latents active on this share of the generic tokens or more are left out (2 % in the paper).
        heldout: share of the items of each type and group that only test.

    Raises:
        ValueError: a type with too few items in a group, a name in both groups, or no latent left by the filter.
    """
    both = set(zip(first.names, first.kinds, strict=True)) & set(zip(second.names, second.kinds, strict=True))
    if both:
        name = min(name for name, _ in both)
        raise ValueError(f"{name!r} is among the {first.label} and the {second.label} {first.noun}; leave one out")
    generator, groups = torch.Generator().manual_seed(seed), (first, second)
    fitting, held = _by_kind(groups, heldout, generator)
    general = torch.zeros(sae.d_sae, dtype=torch.bool) if generic.rate is None else generic.rate >= max_background
    if general.all():
        raise ValueError(f"every latent fires on {max_background:.0%} of the texts or more; pass texts=() or raise it")
    left = f"left {int((~general).sum())} of {len(general)} latents, {generic.tokens} tokens"
    note = f"95 % normal interval over {first.noun}; background filter {'off' if generic.rate is None else left}"
    scores = (
        _scores(groups, fitting, general, sae.site, note),
        _scores((second, first), [(b, a) for a, b in fitting], general, sae.site, note),
    )
    return Contrast(
        site=sae.site,
        first=scores[0],
        second=scores[1],
        ratio=_ratio(groups, fitting, general, sae.site),
        auc=_auc(groups, fitting, held, (scores[0].top(top), scores[1].top(top)), sae.site, generator),
        background=generic.rate,
        heldout=(tuple(first.names[i] for i in held[0]), tuple(second.names[i] for i in held[1])),
    )


def _auc(
    groups: tuple[Group, Group],
    fitting: Sequence[tuple[list[int], list[int]]],
    held: tuple[list[int], list[int]],
    best: tuple[list, list],
    site: Site,
    generator: torch.Generator,
) -> Attribution:
    (first, second), (a, b) = groups, held
    chosen = sorted({at["latent"] for side in best for at, _ in side})
    fit = [[i for pair in fitting for i in pair[side]] for side in (0, 1)]
    decide = _logistic(first.activation[fit[0]][:, chosen], second.activation[fit[1]][:, chosen])
    one, other = best[0][0][0]["latent"], best[1][0][0]["latent"]
    readouts: dict[str, Callable[[Tensor], Tensor]] = {
        f"top {first.label} latent": lambda x: x[:, one],
        f"top {second.label} latent": lambda x: -x[:, other],
        f"logistic on {len(chosen)} latents": lambda x: decide(x[:, chosen]),
    }
    tested = first.activation[a], second.activation[b]
    table = torch.tensor([_auc_interval(read(tested[0]), read(tested[1]), generator) for read in readouts.values()])
    return Attribution(
        name=f"{first.label} against {second.label} {first.noun} at {site}",
        values=table[:, 0],
        axes=("readout",),
        labels={"readout": tuple(readouts)},
        unit="AUC",
        n=len(a) + len(b),
        low=table[:, 1],
        high=table[:, 2],
        note=(
            f"{len(a)} {first.label} and {len(b)} {second.label} held-out {first.noun}; "
            "95 % bootstrap interval over them"
        ),
    )


def _logistic(first: Float[Tensor, "first latent"], second: Float[Tensor, "second latent"]):
    """Decision value of a logistic regression (L2, C = 1, standardised inputs, classes weighted equally)."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    both = torch.cat([first, second])
    mean, scale = both.mean(0), both.std(0).clamp(min=1e-6)
    labels = [1] * len(first) + [0] * len(second)
    table = ((both - mean) / scale).numpy()
    with threadpool_limits(1):  # small fits gain nothing from more, and lose where others have the cores
        fitted = LogisticRegression(class_weight="balanced", max_iter=1000).fit(table, labels)
    return lambda x: torch.from_numpy(fitted.decision_function(((x - mean) / scale).numpy()))
