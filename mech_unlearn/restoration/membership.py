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
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.edit import clone
from mech_unlearn.gradients import gradient_of
from mech_unlearn.model import Model
from mech_unlearn.prompts import buckets, encode_all
from mech_unlearn.restoration.case import Case, Result, split_templates
from mech_unlearn.restoration.levels import Levels

K = 0.4
"""Share of the tokens that Min-K % reads. Source: MUSE, arXiv 2407.06460 (40 %)."""
VARIANCE_FLOOR = 1e-6
BATCH_TOKENS = 512
"""Tokens whose next-token distributions are held at once: for 256,000 tokens 0.5 GB of float32, a few times."""
MIN_AUC_GAP = 0.02
"""AUC between full and retrained below which kappa is undefined."""
ATTACKS = ("loss", "zlib", "min_k", "min_k_pp", "reference")


def min_k(logprobs: Float[Tensor, " token"], share: float = K) -> Float[Tensor, ""]:
    """Minus the mean of the lowest floor(share x T) log-probabilities, at least one; nats."""
    count = max(1, int(share * len(logprobs)))
    return -logprobs.sort().values[:count].mean()


def min_k_pp(
    logprobs: Float[Tensor, " token"],
    mean: Float[Tensor, " token"],
    variance: Float[Tensor, " token"],
    share: float = K,
) -> Float[Tensor, ""]:
    """Min-K % of (log p - mu) / sigma, mu and sigma^2 of log p under the model's own next-token distribution."""
    return min_k((logprobs - mean) / variance.clamp(min=VARIANCE_FLOOR).sqrt(), share)


def auc(member: Float[Tensor, " member"], other: Float[Tensor, " other"]) -> float:
    """P(a member's score is lower than a non-member's), ties count half."""
    below = member[:, None] < other[None]
    tied = member[:, None] == other[None]
    return (below.float() + 0.5 * tied.float()).mean().item()


def privleak(auc_unlearned: float, auc_retrained: float) -> float:
    """100 (A_U - A_R) / A_R with A = 1 - AUC. Source: MUSE, arXiv 2407.06460."""
    return 100 * (auc_retrained - auc_unlearned) / max(1 - auc_retrained, 1e-6)


@torch.no_grad()
def text_scores(model: Model, texts: Sequence[str]) -> dict[str, Float[Tensor, " text"]]:
    """loss, zlib, min_k and min_k_pp of each text; higher = less like a member."""
    rows = [encoding.ids for encoding in (encode_all(model.tokenizer, texts)[text] for text in texts)]
    out = {name: torch.zeros(len(texts)) for name in ("loss", "zlib", "min_k", "min_k_pp")}
    for members in buckets(rows, BATCH_TOKENS):
        ids: Int[Tensor, "row pos"] = torch.tensor([list(rows[i]) for i in members], device=model.device)
        table = model.logits(ids)[:, :-1].float().log_softmax(-1)
        logprob = table.gather(2, ids[:, 1:, None])[..., 0].cpu()
        mean = (table.exp() * table).sum(-1)
        variance = (table.exp() * table.square()).sum(-1) - mean.square()
        for row, i in enumerate(members):
            loss = -logprob[row].mean()
            out["loss"][i] = loss
            out["zlib"][i] = loss / len(zlib.compress(texts[i].encode()))
            out["min_k"][i] = min_k(logprob[row])
            out["min_k_pp"][i] = min_k_pp(logprob[row], mean[row].cpu(), variance[row].cpu())
    return out


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


def statement(fact: Fact) -> str:
    """The fact said in its first TEST phrasing."""
    return f"{split_templates(fact, 'test')[0].replace('{}', fact.subject)} {fact.object}"


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
    return {name: auc(values[:half], values[half:]) for name, values in scores.items()}


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
    empty = torch.full((facts,), torch.nan)
    return Result(
        test="membership",
        model_id=name,
        facts=case.facts,
        recoverability=empty,
        score_raw=own["min_k"][:facts],
        score_full=levels.full["min_k"][:facts],
        score_retrained=torch.stack([r["min_k"][:facts] for r in others]) if others else empty[None],
        null=torch.zeros(0, facts),
        grade=case.grade,
        n_paraphrases=1,
        seed=case.seed,
        cost_fe=6.0 if levels.grad_norm else 2.0,
        flags=(("group_level_only",),) * facts,
        columns={key: torch.full((facts,), float(value)) for key, value in columns.items()},
    )
