"""Membership as an output metric: AUC of an attack on forget against held-out texts, and PrivLeak, with intervals.

Paper: attacks as in restoration/membership.py; PrivLeak arXiv 2407.06460, equation 3.
Needs: the scores of `restoration.membership.text_scores` on the same texts under each model.
Differs: texts are resampled within forget and held-out ones separately; PrivLeak draws the same texts for both models
    (paired). The papers give no interval on an AUC.
Fails: says nothing of a single text; forget and held-out texts that differ in topic or date give an AUC away from 0.5
    for a model that saw neither, which only the retrained model's AUC can tell. An AUC near 0 is over-unlearning.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Measurement
from mech_unlearn.metrics.intervals import resampled_aucs


def _resampled_aucs(
    forget: Float[Tensor, "model text"], heldout: Float[Tensor, "model other"], seed: int
) -> Float[Tensor, "draw model"]:
    """AUCs on the texts themselves (row 0) and on resamples, the same texts for all models."""
    for name, part in (("forget", forget), ("held-out", heldout)):
        if part.shape[1] == 0 or part.isnan().any():
            raise ValueError(f"AUC needs scores of one {name} text or more, all of them numbers; got {part.shape[1]}")
    return resampled_aucs(-forget, -heldout, torch.Generator().manual_seed(seed))


def _measured(
    aucs: Float[Tensor, "draw model"], statistic: Callable[[Tensor], Tensor], n: int, unit: str
) -> Measurement:
    values = statistic(aucs)
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Measurement(value=values[0].item(), ci=(low, high), n=n, unit=unit)


def membership_auc(
    forget: Float[Tensor, " text"], heldout: Float[Tensor, " other"], attack: str, seed: int = 0
) -> Measurement:
    """P(a forget text scores lower than a held-out one), ties half; 1 = clearly members, 0.5 = cannot be told.

    Args:
        forget: scores of an attack, higher = less like a member, as `restoration.membership.text_scores` gives them.
        attack: its name, for the unit.

    Raises:
        ValueError: no text of a kind, or a score that is not a number.
    """
    aucs = _resampled_aucs(forget[None], heldout[None], seed)
    unit = f"AUC of {attack}, forget against held-out texts"
    return _measured(aucs, lambda x: x[:, 0], len(forget) + len(heldout), unit)


def privleak_min_k(
    forget: Float[Tensor, " text"],
    heldout: Float[Tensor, " other"],
    retrained_forget: Float[Tensor, " retrained_text"],
    retrained_heldout: Float[Tensor, " retrained_other"],
    seed: int = 0,
) -> Measurement:
    """PrivLeak: 100 (A_U - A_R) / A_R with A = 1 - AUC of Min-40 %, percent; 0 like retrained, negative = a member.

    Args:
        forget: Min-40 % scores under the audited model; the other three likewise, on the same texts in the same order.

    Raises:
        ValueError: texts that the two models were not both scored on, no text of a kind, a score that is not a number,
            or a retrained AUC of 1, where the measure is not defined.
    """
    if len(forget) != len(retrained_forget) or len(heldout) != len(retrained_heldout):
        raise ValueError("PrivLeak compares two models on the same texts: the numbers of scores differ")
    pairs = torch.stack([forget, retrained_forget]), torch.stack([heldout, retrained_heldout])
    aucs = _resampled_aucs(*pairs, seed)
    if aucs[0, 1] == 1:
        raise ValueError("the retrained model tells all forget texts from held-out ones: A_R is 0, PrivLeak undefined")
    kept = aucs[aucs[:, 1] < 1]
    return _measured(
        kept,
        lambda x: 100 * (x[:, 1] - x[:, 0]) / (1 - x[:, 1]),
        len(forget) + len(heldout),
        "percent of the retrained model's 1 - AUC of Min-40 %",
    )
