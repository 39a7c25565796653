"""Ssd: selective synaptic dampening, one shrink of the weights that matter much more to the forget rows.

Paper:    Foster, Schoepf and Brintrup 2023, Fast Machine Unlearning Without Retraining Through Selective Synaptic
          Dampening, arXiv 2308.07707, eqs. 3 to 5: where I_f > alpha I_D, theta <- theta min(lambda I_D / I_f, 1).
Changes:  entries of the weights whose name matches `trainable`; none grows, none changes sign.
Needs:    one forward and backward pass per row, forget and retained, each by itself; no training.
Differs:  gradients are squared row by row, as the Fisher information's diagonal wants (the code squares the mean of a
          batch); I_D is taken over retained rows (`include_forget` adds the forget rows, as the code does); MLPs alone
          by default and at most `samples` retained rows, drawn at random, as a language model's gradients are large.
Fails:    one step without a loss to watch: alpha decides between nothing and damage. A fact that is known perfectly has
          next to no gradient, so its importance is small.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.rows import TrainRow, answer_rows, collate, forward, nll, score_rows, text_rows
from mech_unlearn.training.trainee import changes, trained_copy
from mech_unlearn.training.training import require_positive


@dataclass(frozen=True, kw_only=True)
class Ssd:
    """Settings of the dampening; `fit` computes it. Defaults: 2308.07707."""

    alpha: float = 10.0
    """How many times the importance for D that for the forget rows has to exceed."""
    lambda_: float = 1.0
    """Scales what is left of a dampened weight; up to alpha every chosen one shrinks."""
    include_forget: bool = False
    """Whether D holds the forget rows too, as in the code."""
    samples: int | None = 512
    """Retained rows at most; None takes all."""
    trainable: str = r"\.mlp\."
    """Regular expression for the names of the weights that may be dampened; empty matches all."""
    seed: int = 0
    """Draws the retained rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Edit:
        """The shrink.

        Raises:
            ValueError: nothing retained, a setting out of range, no weight that matches, or an edit of activations in
                force.
        """
        start = time.perf_counter()
        require_positive(self, "alpha", "lambda_")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be at least 1 or None, got {self.samples}")
        if model.in_force.interventions:
            raise ValueError(f"{model.name!r} has an edit of activations in force, which ssd does not see; leave it")
        rows = answer_rows(model.tokenizer, forget.facts)
        kept = answer_rows(model.tokenizer, retain.facts) + text_rows(model, retain.texts)
        if not kept:
            raise ValueError("the retain set holds neither facts nor texts: ssd needs some to compare with")
        if self.samples is not None and len(kept) > self.samples:
            kept = random.Random(self.seed).sample(kept, self.samples)
        hf = trained_copy(model, self.trainable)
        weights = [w for w in hf.parameters() if w.requires_grad]
        fill = model.tokenizer.pad_token_id or 0
        ours = weight_importance(hf, weights, rows, fill, "forget")
        theirs = weight_importance(hf, weights, kept, fill, "retained")
        if self.include_forget:
            n, m = len(rows), len(kept)
            theirs = [(n * f + m * r) / (n + m) for f, r in zip(ours, theirs, strict=True)]
        dampened = 0
        with torch.no_grad():
            for w, f, d in zip(weights, ours, theirs, strict=True):
                factor = damping(f, d, self.alpha, self.lambda_)
                dampened += int((factor < 1).sum())
                w.mul_(factor)
        passes = len(rows) + len(kept)
        report = {
            "dampened": dampened,
            "share": dampened / sum(w.numel() for w in weights),
            "forget_recall": score_rows(hf, rows, fill, model.device).exact.float().mean().item(),
            "n_forward": passes + -(-len(rows) // 256),
            "n_backward": passes,
            "seconds": time.perf_counter() - start,
        }
        recipe = {"method": "ssd", "settings": asdict(self), "seed": self.seed, "report": report}
        return Edit(name="ssd", base=model.hash(), deltas=changes(model, hf), recipe=recipe)


def weight_importance(
    hf: object, weights: Sequence[Tensor], rows: Sequence[TrainRow], fill: int, what: str
) -> list[Tensor]:
    """Mean over rows of the squared gradient of each row's NLL per answer token, by weight.

    Source: 2308.07707, eq. 3: the diagonal of the Fisher information, from each row by itself.
    """
    from tqdm import tqdm

    total = [torch.zeros_like(w) for w in weights]
    for i in tqdm(range(len(rows)), desc=f"importance of {what} rows", unit="row", delay=2, leave=False):
        loss = nll(forward(hf, collate(rows, [i], fill, weights[0].device)))
        found = torch.autograd.grad(loss, list(weights), materialize_grads=True)
        for sums, gradient in zip(total, found, strict=True):
            sums.addcmul_(gradient, gradient)
    return [sums / len(rows) for sums in total]


def damping(
    forget: Float[Tensor, "..."], whole: Float[Tensor, "..."], alpha: float, lambda_: float
) -> Float[Tensor, "..."]:
    """Factor per weight: min(lambda I_D / I_f, 1) where I_f > alpha I_D, else 1.

    Source: 2308.07707, eqs. 4 and 5.
    """
    return torch.where(forget > alpha * whole, (lambda_ * whole / forget).clamp(max=1), torch.ones_like(forget))
