"""Similarity: are U's states at the subject more like a retrained model's than like the full model's? Description only.

Paper:    linear CKA: Kornblith et al. 2019, arXiv 1905.00414; debiased: Nguyen et al. 2021, arXiv 2010.15327, after
          Song et al. 2012; as an unlearning score in arXiv 2605.24614; k-nearest neighbours after arXiv 2503.06991;
          drift after arXiv 2505.16831.
Changes:  nothing; one pass of each model over the subjects.
Needs:    three subjects at least; an n x n table of the n distinct subject tokens per model and layer.
Differs:  rows are the tokens of the subjects, each distinct prefix once (equal rows would be each other's neighbours in
          any model), in the first prompt of each subject. With fewer than 5 d_model rows CKA is the debiased estimator,
          which may fall slightly below 0. R stands for each retrained model in turn, the mean is reported. k-NN:
          overlap of the k nearest subjects by cosine of centred states at the subject's last token. Drift: distance of
          U's mean state from F's along F's first principal component, whose largest coordinate is positive (`shift`),
          and in the span of its first two (`distance`), in units of the spread of F's states there. A fixed formula for
          the regimes of 2505.16831 was not to be found; its Fisher part is left out. Without retrained models there is
          nothing to be more like: the test is silent (NaN) apart from drift.
Fails:    most variance of states has nothing to do with the facts, so a fact can leave CKA untouched (published AUC
          .65): never read this as a test of deletion; verdicts do not.

Erasure at layer l = clip((CKA(U, R) - CKA(F, R)) / (1 - CKA(F, R)), 0, 1), weighted over layers by 1 - CKA(F, R):
`score_raw`, 0 = as far from R as F, 1 = R itself, the same for all facts. recoverability = 1 - erasure over that of
held-out retrained models. `knn_erasure` is the same ratio of neighbour overlaps, per subject.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import capture
from mech_unlearn.restoration.engine.case import Case, make_result, split_queries
from mech_unlearn.restoration.engine.levels import Levels
from mech_unlearn.verdict.result import Result

NEIGHBOURS = 10
MIN_ROOM = 1e-3
"""1 - CKA(F, R) below which a layer cannot tell the two apart."""


def gram(x: Float[Tensor, "row d"]) -> Float[Tensor, "row row"]:
    """Inner products of centred rows, in float64."""
    centred = x.double() - x.double().mean(0)
    return centred @ centred.T


def cka(x: Float[Tensor, "row d"], y: Float[Tensor, "row e"]) -> float:
    """Linear CKA ||Yc' Xc||^2 / (||Xc' Xc|| ||Yc' Yc||). Source: arXiv 1905.00414, equation 3."""
    a, b = gram(x), gram(y)
    return ((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-30)).item()


def debiased_cka(x: Float[Tensor, "row d"], y: Float[Tensor, "row e"]) -> float:
    """CKA from the unbiased HSIC estimator: its expectation is 0 for unrelated rows however many columns there are.

    Source: arXiv 2010.15327, equation 3. NaN with fewer than four rows.
    """
    n = len(x)
    if n < 4:
        return float("nan")

    def hollow(z: Tensor) -> Tensor:
        table = z.double() @ z.double().T
        return table - table.diag().diag()

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        sums = a.sum() * b.sum() / ((n - 1) * (n - 2))
        return ((a * b).sum() + sums - 2 / (n - 2) * (a.sum(0) @ b.sum(0))) / (n * (n - 3))

    # the estimator is the same for shifted rows; centring first keeps large means from eating its digits
    a, b = (hollow(z.double() - z.double().mean(0)) for z in (x, y))
    return (hsic(a, b) / (hsic(a, a) * hsic(b, b)).clamp(min=1e-30).sqrt()).item()


def likeness(x: Float[Tensor, "row d"], y: Float[Tensor, "row e"]) -> float:
    """CKA, debiased below five rows per column."""
    return debiased_cka(x, y) if len(x) < 5 * max(x.shape[1], y.shape[1]) else cka(x, y)


def neighbour_overlap(x: Float[Tensor, "row d"], y: Float[Tensor, "row e"], k: int = NEIGHBOURS) -> Tensor:
    """|N_k^x(i) and N_k^y(i)| / k for each row i: the share of its nearest rows that agree, by centred cosine.

    k is at most a third of the other rows: where all are near, all agree.
    """
    k = max(1, min(k, (len(x) - 1) // 3))

    def near(z: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(z.double() - z.double().mean(0), dim=1)
        table = (unit @ unit.T).fill_diagonal_(-torch.inf)
        return torch.zeros(len(z), len(z)).scatter(1, table.topk(k, 1).indices, 1.0)

    return (near(x) * near(y)).sum(1) / k


def erasure(own: Float[Tensor, " layer"], base: Float[Tensor, " layer"]) -> float:
    """Mean over layers of clip((own - base) / (1 - base), 0, 1), weighted by 1 - base; NaN if that is 0 everywhere."""
    weight = (1 - base).clamp(min=0)
    weight = torch.where(weight > MIN_ROOM, weight, 0.0)
    if not weight.sum() > 0:
        return float("nan")
    share = ((own - base) / (1 - base).clamp(min=MIN_ROOM)).clamp(0, 1)
    return ((weight * share).sum() / weight.sum()).item()


@dataclass(frozen=True, eq=False)
class SubjectTokens:
    """Distinct subject tokens of one prompt per subject: their prefixes, and for each fact the row of its subject's
    last token."""

    ids: tuple[tuple[int, ...], ...]
    last: Tensor
    names: Tensor
    """The rows that are a subject's last token: one per subject."""


@dataclass(frozen=True, eq=False)
class SimilarityLevels:
    rows: SubjectTokens
    full: Float[Tensor, "layer row d_model"]
    never: tuple[Float[Tensor, "layer row d_model"], ...]
    to_full: Float[Tensor, "retrained layer"]
    """CKA of the full with each retrained model."""
    heldout: tuple[float, ...]
    """Erasure of each retrained model against the others; empty with fewer than two of them."""
    k: int


def _rows(case: Case) -> SubjectTokens:
    index: dict[tuple[int, ...], int] = {}
    last: dict[str, int] = {}
    for query in split_queries(case, "test", limit=1):
        if query.fact.subject not in last:
            at = [index.setdefault(query.prompt[: end + 1], len(index)) for end in range(*query.span)]
            last[query.fact.subject] = at[-1]
    of_fact = torch.tensor([last[fact.subject] for fact in case.facts])
    return SubjectTokens(tuple(index), of_fact, of_fact.unique())


def _states(model: Model, rows: SubjectTokens) -> Float[Tensor, "layer row d_model"]:
    sites = [Site(layer, "resid_post") for layer in range(model.n_layers)]
    store = capture(model, rows.ids, sites, "last", dtype=torch.float32)
    return torch.stack([store[site] for site in sites])


def prepare(case: Case, shared: Levels | None = None, *, k: int = NEIGHBOURS) -> SimilarityLevels:
    """States of the full and the retrained models at the subjects.

    Raises:
        ValueError: fewer than three distinct subjects, or no neighbours asked for.
    """
    rows = _rows(case)
    if k < 1 or len(rows.names) < 3:
        raise ValueError(f"similarity needs k >= 1 and three subjects, got k={k} and {len(rows.names)} subjects")
    full, never = _states(case.full, rows), tuple(_states(model, rows) for model in case.retrained)
    to_full = torch.stack([_curve(full, one) for one in never]) if never else torch.zeros(0, len(full))
    heldout = []
    for i, one in enumerate(never if len(never) > 1 else ()):
        rest = [j for j in range(len(never)) if j != i]
        heldout.append(erasure(_likeness(one, [never[j] for j in rest]), to_full[rest].mean(0)))
    return SimilarityLevels(rows, full, never, to_full, tuple(heldout), k)


def _curve(x: Tensor, y: Tensor) -> Float[Tensor, " layer"]:
    return torch.tensor([likeness(a, b) for a, b in zip(x, y, strict=True)])


def _likeness(found: Tensor, others: Sequence[Tensor]) -> Float[Tensor, " layer"]:
    """Mean CKA with several models."""
    return torch.stack([_curve(found, other) for other in others]).mean(0)


def _knn(ready: SimilarityLevels, found: Tensor, others: Sequence[Tensor]) -> Float[Tensor, " fact"]:
    """Erasure of neighbourhoods per fact, mean over layers; unclipped. NaN where F's neighbours are R's already."""
    names = ready.rows.names
    at = torch.searchsorted(names, ready.rows.last)
    base, own = (
        torch.stack(
            [
                torch.stack([neighbour_overlap(a[names], b[names], ready.k) for a, b in zip(some, other, strict=True)])
                for other in others
            ]
        ).mean((0, 1))
        for some in (ready.full, found)
    )
    return torch.where(base < 1, (own - base) / (1 - base).clamp(min=1e-6), torch.nan)[at].float()


def drift(full: Float[Tensor, "row d"], found: Float[Tensor, "row d"]) -> tuple[float, float]:
    """(Shift along F's first principal component, distance in the plane of its first two) of the mean state, in
    standard deviations of F's states along that component, which points to where its largest coordinate is positive."""
    x = full.double() - full.double().mean(0)
    axes = torch.linalg.svd(x, full_matrices=False).Vh[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    spread = (x @ axes[0]).std().clamp(min=1e-12)
    moved = axes @ (found.double().mean(0) - full.double().mean(0)) / spread
    return moved[0].item(), moved.norm().item()


def audit(case: Case, ready: SimilarityLevels, model: Model, name: str) -> Result:
    """Compare the audited model's states at the subjects with those of the full and the retrained models."""
    keep, facts = case.others_than(model), len(case.facts)
    others = [ready.never[k] for k in keep]
    found = _states(model, ready.rows)
    nothing = torch.full((facts,), torch.nan)
    moved = [drift(a, b) for a, b in zip(ready.full, found, strict=True)]
    curves: Mapping[str, Tensor] = {
        "drift_shift": torch.tensor([m[0] for m in moved]),
        "drift_distance": torch.tensor([m[1] for m in moved]),
        "cka_UF": _curve(found, ready.full),
    }
    score, knn, held = float("nan"), nothing, ready.heldout
    if others:
        curves = {"cka_UR": _likeness(found, others), "cka_FR": ready.to_full[keep].mean(0), **curves}
        score, knn = erasure(curves["cka_UR"], curves["cka_FR"]), _knn(ready, found, others)
    ceiling = sum(held) / len(held) if held else 1.0
    top = ceiling if ceiling > 0 else float("nan")
    return make_result(
        case,
        "similarity",
        name,
        recoverability=torch.full((facts,), 1 - score / top).clamp(0, 1),
        score_raw=score,
        score_full=0.0,
        score_retrained=torch.tensor([held[k] for k in keep] if held else [1.0])[:, None].expand(-1, facts),
        null=torch.tensor([[1 - h / top] for h in held]).reshape(-1, 1).expand(-1, facts).clamp(0, 1),
        cost_fe=len(ready.rows.ids) / facts,
        flags=[("description_only",)] * facts,
        columns={"knn_erasure": knn},
        curves={key: values[:, None].expand(-1, facts).float() for key, values in curves.items()},
    )
