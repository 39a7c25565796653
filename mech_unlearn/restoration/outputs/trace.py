"""Trace: can one tell from forget-irrelevant text that a model was unlearned at all?

Paper:    unlearning leaves traces, arXiv 2506.14003 (a classifier on pre-logit states or answers of many models).
Changes:  nothing.
Needs:    one forward pass over texts that name no forgotten subject or answer, and a logistic regression per model.
Differs:  one audited model instead of pools, so the classifier parts its next-token distributions from the full model's
          on the same texts, and what it may read has no basis: the sorted largest log-probabilities and the entropy.
          States would part any two trained models. Texts are dealt into folds, so none is both seen and scored (the
          published script scores a slice of its training set). The AUC of retrained models is the control: they were
          not unlearned, and differ from full only as two trainings do.
Fails:    tells that something was done, never what is stored; a retrained model of another recipe leaves traces too.
          Any small difference that is the same on all texts parts two models: only `excess` counts.

A covariate and negative control, not evidence: recoverability is undefined for every fact and no verdict reads it.
`score_raw` is the AUC of (audited vs full), 0.5 = no trace, the same for every fact; `auc_R` the mean over retrained
models, `excess` the difference.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.metrics.membership import BATCH_TOKENS
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.pieces import pieces
from mech_unlearn.model.tokens import buckets
from mech_unlearn.restoration.engine.case import Case, irrelevant_texts, make_result
from mech_unlearn.restoration.engine.levels import Levels
from mech_unlearn.verdict.result import Result

TOP_LOGPROBS = 32
"""Largest log-probabilities that the classifier reads."""
TEXTS = 300
TRACE_FOLDS = 5


@torch.no_grad()
def features(model: Model, texts: Sequence[str]) -> Float[Tensor, "text feature"]:
    """Mean over a text's positions of the sorted largest next-token log-probabilities and the entropy, in nats; a text
    longer than the model's positions is read in pieces."""
    rows = [(piece.text, piece.ids) for piece in pieces(model, texts)]
    total: list[Tensor] = [torch.zeros(1)] * len(texts)
    count = torch.zeros(len(texts), 1)
    for members in buckets([row for _, row in rows], BATCH_TOKENS):
        ids = torch.tensor([list(rows[i][1]) for i in members], device=model.device)
        table = model.logits(ids).float().log_softmax(-1)
        largest = table.topk(min(TOP_LOGPROBS, table.shape[-1]), dim=-1).values
        entropy = -(table.exp() * table).sum(-1, keepdim=True)
        for i, row in zip(members, torch.cat([largest, entropy], -1).sum(1).cpu(), strict=True):
            text = rows[i][0]
            total[text] = total[text] + row
            count[text] += ids.shape[1]
    return torch.stack(total) / count


def trace_auc(ours: Float[Tensor, "text feature"], full: Float[Tensor, "text feature"]) -> float:
    """AUC of a logistic regression that parts two models, each text scored by a fit that did not see it.

    0.5 where the features are equal.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = torch.cat([ours, full]).double().numpy()
    labels = [1] * len(ours) + [0] * len(full)
    groups = [*range(len(ours)), *range(len(full))]
    fit = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    dealt = GroupKFold(TRACE_FOLDS)
    told = np.asarray(cross_val_predict(fit, x, labels, groups=groups, cv=dealt, method="predict_proba"))
    return float(roc_auc_score(labels, told[:, 1].round(9)))  # rounded, so that equal texts tie


@dataclass(frozen=True, eq=False)
class TraceLevels:
    texts: tuple[str, ...]
    full: Float[Tensor, "text feature"]
    retrained: tuple[float, ...]
    """AUC of each retrained model against full."""


def prepare(case: Case, _: Levels | None = None) -> TraceLevels:
    """The features of the full model and the control AUC of the retrained ones.

    Raises:
        ValueError: too few texts that have nothing to do with the forgotten facts.
    """
    found = irrelevant_texts(case)
    if len(found) < 2 * TRACE_FOLDS:
        raise ValueError(
            f"the trace needs {2 * TRACE_FOLDS} texts that name no forgotten subject or answer, got {len(found)}: "
            "Case(texts=...)"
        )
    texts = tuple(random.Random(case.seed).sample(found, min(TEXTS, len(found))))
    full = features(case.full, texts)
    return TraceLevels(texts, full, tuple(trace_auc(features(model, texts), full) for model in case.retrained))


def audit(case: Case, levels: TraceLevels, model: Model, name: str) -> Result:
    """How well the audited model can be told from the full one."""
    keep, count = case.others_than(model), len(case.facts)
    found = trace_auc(features(model, levels.texts), levels.full)
    control = [levels.retrained[k] for k in keep]
    columns = {"auc": found}
    if control:
        mean = sum(control) / len(control)
        columns |= {"auc_R": mean, "excess": found - mean}
    return make_result(
        case,
        "trace",
        name,
        score_raw=found,
        score_full=0.5,
        score_retrained=torch.tensor(control or [float("nan")])[:, None].expand(-1, count).clone(),
        null=torch.zeros(0, count),
        n_paraphrases=0,
        cost_fe=len(levels.texts) / count,
        flags=[("model_level_only",)] * count,
        columns=columns,
    )
