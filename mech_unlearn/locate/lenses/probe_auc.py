"""How well a fresh linear probe tells two groups of entities apart, on entities and contexts it has not seen."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def probe_auc(
    first: Float[Tensor, "first context width"],
    second: Float[Tensor, "second context width"],
    *,
    heldout: Sequence[int] = (),
    folds: int = 5,
    seed: int = 0,
) -> float:
    """Area under the ROC curve, mean over folds; 0.5 is chance, 1 tells all of the second group from all of the first.

    A logistic regression (C = 1, classes weighted equally) on standardised coordinates, trained on some entities and
    tested on others; all contexts of an entity fall into one fold.

    Args:
        heldout: contexts to test on and never to train on; by default training and test share all contexts.
        folds: at most; no more than entities in the smaller group.

    Raises:
        ValueError: a group of fewer than two entities, or no context left to train on.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    if min(len(first), len(second)) < 2:
        raise ValueError(f"a probe needs two entities on each side, got {len(first)} and {len(second)}")
    train = [c for c in range(first.shape[1]) if c not in set(heldout)]
    test = list(heldout) or train
    if not train:
        raise ValueError("every context is held out: none is left to train the probe on")
    generator = torch.Generator().manual_seed(seed)
    folds = min(folds, len(first), len(second))
    parts = [_folds(len(group), folds, generator) for group in (first, second)]
    scores = []
    for fold in range(folds):
        seen = [group[part != fold][:, train] for group, part in zip((first, second), parts, strict=True)]
        fresh = [group[part == fold][:, test] for group, part in zip((first, second), parts, strict=True)]
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, class_weight="balanced"))
        with threadpool_limits(1):  # small fits gain nothing from more, and lose where others have the cores
            probe.fit(*_table(*seen))
        x, y = _table(*fresh)
        scores.append(roc_auc_score(y, probe.decision_function(x)))
    return float(sum(scores) / folds)


def _folds(n: int, folds: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator) % folds


def _table(first: Tensor, second: Tensor):
    x = torch.cat([first.flatten(0, 1), second.flatten(0, 1)]).double().cpu().numpy()
    y = [0] * first.shape[0] * first.shape[1] + [1] * second.shape[0] * second.shape[1]
    return x, y
