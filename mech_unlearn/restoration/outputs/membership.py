"""Membership: as a group, do the forgotten statements still look like text the model was trained on?

Paper:    loss, arXiv 1709.01604; zlib and reference model, arXiv 2012.07805; Min-K %, arXiv 2310.16789; Min-K %++,
          arXiv 2404.02936; PrivLeak, MUSE, arXiv 2407.06460, section 3.
Changes:  nothing.
Needs:    one forward pass over the statements, of U, full and each retrained model; with `grad_norm` one backward pass.
Differs:  members are the facts said in their TEST phrasing; non-members the same with a subject that no model knows and
          an object drawn from the relation's (without unknown names: the true subjects with false objects). MUSE's code
          looks its retrained AUC up without the corpus; here each attack has its own. k T is at least one token.
Fails:    says nothing of a single fact, so recoverability is undefined for every fact and no verdict reads it. The
          two groups differ in their subjects' words too; the retrained models' AUC takes that out.

`score_raw` is the Min-K % score of each statement in nats (higher = less like a member). The columns, the same number
for every fact: `auc_<attack>` = P(a forgotten statement scores lower than a held-out one), ties half; 1 = clearly a
member. `privleak` = 100 (A_U - A_R) / A_R with A = 1 - AUC of Min-K %: 0 like retrained, negative still a member.
`kappa_<attack>` = (AUC_U - AUC_R) / (AUC_full - AUC_R), 0 like retrained and 1 like full.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.edit.edit import clone
from mech_unlearn.metrics.membership import privleak, statement, text_scores
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.gradients import gradient_of
from mech_unlearn.model.tokens import encode_all
from mech_unlearn.restoration.engine.case import Case, make_result
from mech_unlearn.restoration.engine.levels import Levels
from mech_unlearn.verdict.result import Result

MIN_AUC_GAP = 0.02
"""AUC between full and retrained below which kappa is undefined."""


def gradient_norms(model: Model, texts: Sequence[str]) -> Float[Tensor, " text"]:
    """Euclidean norm of the gradient of each text's mean loss by all weights."""
    known, out = encode_all(model.tokenizer, texts), []
    with clone(model) as copy:
        gradients = gradient_of(copy)
        for text in texts:
            ids = torch.tensor([known[text].ids], device=model.device)
            with torch.enable_grad():
                loss = torch.nn.functional.cross_entropy(copy.logits(ids)[0, :-1].float(), ids[0, 1:])
            out.append(sum(g.float().square().sum() for g in gradients(loss).values()) ** 0.5)
    return torch.tensor([float(value) for value in out])


def strangers(case: Case) -> tuple[Fact, ...]:
    """For each fact a statement that no model was trained on.

    Raises:
        ValueError: neither unknown names nor distractors.
    """
    draw, out = random.Random(case.seed), []
    for fact in case.facts:
        pool = sorted({o.object for o in case.facts if o.relation == fact.relation} | {*fact.distractors})
        if case.unknown:
            out.append(replace(fact, subject=draw.choice(case.unknown).name, object=draw.choice(pool), distractors=()))
            continue
        if not fact.distractors:
            raise ValueError(f"fact {fact.id!r}: membership needs unknown names (Case(unknown=...)) or distractors")
        out.append(replace(fact, object=draw.choice(fact.distractors), distractors=()))
    return tuple(out)


@dataclass(frozen=True, eq=False)
class MembershipLevels:
    texts: tuple[str, ...]
    """Statements of the facts, then as many that are in nobody's training text."""
    full: Mapping[str, Float[Tensor, " text"]]
    retrained: tuple[Mapping[str, Float[Tensor, " text"]], ...]
    grad_norm: bool


def _scores(model: Model, texts: Sequence[str], grad_norm: bool) -> dict[str, Float[Tensor, " text"]]:
    found = text_scores(model, texts)
    return found | {"grad_norm": gradient_norms(model, texts)} if grad_norm else found


def prepare(case: Case, _: Levels | None = None, *, grad_norm: bool = False) -> MembershipLevels:
    """Score the statements under full and retrained models.

    Raises:
        ValueError: nothing to make non-members of.
    """
    texts = tuple(map(statement, (*case.facts, *strangers(case))))
    every = [_scores(model, texts, grad_norm) for model in (case.full, *case.retrained)]
    return MembershipLevels(texts, every[0], tuple(every[1:]), grad_norm)


def _aucs(own: Mapping[str, Tensor], reference: Tensor | None) -> dict[str, float]:
    """AUC per attack; `reference` is the mean loss of retrained models, if there are any."""
    scores = dict(own)
    if reference is not None:
        scores["reference"] = own["loss"] - reference
    half = len(own["loss"]) // 2
    return {name: _auc(values[:half], values[half:]) for name, values in scores.items()}


def _auc(members: Float[Tensor, " member"], others: Float[Tensor, " other"]) -> float:
    """Area under the ROC curve, members lower; NaN where a score is no number."""
    from sklearn.metrics import roc_auc_score

    scores = -torch.cat([members, others]).double().nan_to_num(nan=float("nan"))
    if scores.isnan().any():
        return float("nan")
    return float(roc_auc_score([1] * len(members) + [0] * len(others), scores.numpy()))


def audit(case: Case, levels: MembershipLevels, model: Model, name: str) -> Result:
    """AUC of each attack on the audited model, beside full and retrained ones."""
    keep, facts = case.others_than(model), len(case.facts)
    own = _scores(model, levels.texts, levels.grad_norm)
    others = [levels.retrained[k] for k in keep]
    reference = torch.stack([r["loss"] for r in others]).mean(0) if others else None
    found, full = _aucs(own, reference), _aucs(levels.full, reference)
    columns = {f"auc_{attack}": value for attack, value in found.items()}
    if others:
        never = [_aucs(r, None) for r in others]
        base = {attack: sum(one[attack] for one in never) / len(never) for attack in never[0]} | {"reference": 0.5}
        columns |= {f"auc_{attack}_R": value for attack, value in base.items()}
        for attack, value in found.items():
            gap = full[attack] - base[attack]
            wide = abs(gap) >= MIN_AUC_GAP
            columns[f"kappa_{attack}"] = (value - base[attack]) / gap if wide else float("nan")
        columns["privleak"] = privleak(found["min_k"], base["min_k"])
    blank = torch.full((1, facts), torch.nan)
    return make_result(
        case,
        "membership",
        name,
        score_raw=own["min_k"][:facts],
        score_full=levels.full["min_k"][:facts],
        score_retrained=torch.stack([r["min_k"][:facts] for r in others]) if others else blank,
        null=torch.zeros(0, facts),
        n_paraphrases=1,
        cost_fe=6.0 if levels.grad_norm else 2.0,
        flags=[("group_level_only",)] * facts,
        columns=columns,
    )
