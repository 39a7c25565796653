"""Emphasis: does stressing the subject, in the prompt or inside the model, bring the answer back?

Paper:    unPact, arXiv 2509.24675 (keyword emphasis restores answers). Its procedure was not to be found: the operators
          are ours.
Changes:  nothing in the weights. `keyword`: the prompt quotes, repeats, writes large or announces the subject.
          `keyword_attention`: beta is added to the attention scores of the subject's columns, all heads and layers.
Needs:    one scoring per operator of U and of each retrained model; `focus` one ablation per class of prompt tokens.
Differs:  keywords are the subject's tokens. The operator is chosen on TUNE.
Fails:    prompt form: a small vocabulary cannot write capitals or quotes (left out and flagged). Attention form: beta
          is the same for every head, so heads that should not look at the subject do so too.

`score_raw` is the margin in nats under the operator chosen on TUNE; recoverability is rho. `focus` (with focus=True) is
the share of the subject in the answer's leave-out attribution on the audited model, `focus_F` on the full one: clipped
drops of log p(answer) when the subject's, or another class's, tokens are replaced by the mean embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Fact, Site
from mech_unlearn.locate.prompt.prompt_attribution import prompt_attribution_per_fact
from mech_unlearn.model.asking import Rewrite
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.scores import Batch, RowWrite, score
from mech_unlearn.model.tokens import Ask, Query
from mech_unlearn.restoration.engine import attack, prompting
from mech_unlearn.restoration.engine.attack import Curves, Ready
from mech_unlearn.restoration.engine.case import Case
from mech_unlearn.restoration.engine.levels import Levels, QuerySet, make_query_set
from mech_unlearn.restoration.engine.prompting import PromptReady
from mech_unlearn.verdict.result import Result

BETAS = (0.5, 1.0, 2.0)
"""Added to attention scores (logits before the softmax)."""


def _named(text: str) -> Rewrite:
    """A rewriting whose `{s}` is the subject and `{p}` the question with its slot."""

    def rewrite(query: Query) -> Ask:
        return Ask(query.fact, text.replace("{p}", query.template).replace("{s}", query.fact.subject))

    return rewrite


def _as(form: str) -> Rewrite:
    """A rewriting of the subject itself, in its slot."""

    def rewrite(query: Query) -> Ask:
        return Ask(query.fact, query.template, form.replace("{s}", query.fact.subject))

    return rewrite


def _upper(query: Query) -> Ask:
    return Ask(query.fact, query.template, query.fact.subject.upper())


OPERATORS: dict[str, Rewrite] = {
    "quote": _as('"{s}"'),
    "twice": _as("{s} {s}"),
    "three times": _as("{s} {s} {s}"),
    "upper case": _upper,
    "focus on": _named("Focus on: {s}. {p}"),
    "named first": _named("{s} {p}"),
}


def attend(model: Model, beta: float) -> dict[Site | str, RowWrite]:
    """Writes that add beta to the attention scores of the subject's columns; masked ones stay masked."""

    def write(scores: Float[Tensor, "row head query key"], batch: Batch) -> Tensor:
        at = torch.arange(scores.shape[-1], device=scores.device)[None]
        chosen = (at >= batch.span[:, :1]) & (at < batch.span[:, 1:])
        masked = scores <= torch.finfo(scores.dtype).min / 2
        return torch.where(masked, scores, scores + beta * chosen[:, None, None].to(scores))

    return {f"blocks.{layer}.attn.hook_attn_scores": write for layer in range(model.n_layers)}


def require_attended(model: Model, query: Query) -> None:
    """Check that what is written to the attention scores reaches the attention pattern.

    Raises:
        ValueError: a model under TransformerBridge that computes its pattern apart (OPT).
    """
    seen: list[Tensor] = []

    def read(pattern: Tensor, _: Batch) -> None:
        seen.append(pattern)

    for beta in (0.0, BETAS[-1]):
        writes = {**attend(model, beta), "blocks.0.attn.hook_pattern": read}
        score(model, [replace(query, answers=query.answers[:1])], writes)
    if torch.equal(*seen):
        raise ValueError(
            f"{model.name!r} does not read attention scores where they can be written; leave keyword_attention out"
        )


def focus(model: Model, facts: Sequence[Fact]) -> Float[Tensor, " fact"]:
    """Share of the subject's tokens in the drops of log p(answer), each class of prompt tokens left out in turn."""
    found = prompt_attribution_per_fact(model, facts, how="ablation", baseline="mean")
    drops = found.values.nan_to_num().clamp(min=0)
    subject = [
        i for i, label in enumerate(found.labels["token"]) if "subject" in label and label.split()[0] not in AWAY
    ]
    return drops[:, subject].sum(1) / drops.sum(1).clamp(min=1e-9)


AWAY = ("before", "after")
"""First words of the classes of prompt tokens that are not the subject's."""


@dataclass(frozen=True, eq=False)
class KeywordReady:
    prompts: PromptReady
    focus_full: Float[Tensor, " fact"] | None


def prepare(case: Case, shared: Levels | None = None, *, focus_too: bool = False) -> KeywordReady:
    """Ask the retrained models with every emphasis that the tokenizer can write."""
    prompts = prompting.prepare(case, shared, OPERATORS)
    return KeywordReady(prompts, focus(case.full, case.facts) if focus_too else None)


def audit(case: Case, ready: KeywordReady, model: Model, name: str) -> Result:
    """Ask the audited model with every emphasis."""
    columns: Mapping[str, Tensor] = {}
    if ready.focus_full is not None:
        columns = {"focus": focus(model, case.facts), "focus_F": ready.focus_full}
    return prompting.audit(case, ready.prompts, model, name, test="keyword", columns=lambda _: columns)


def _operate(betas: Sequence[float], model: Model, tune: QuerySet, test: QuerySet) -> Curves:
    on_tune, on_test = ([query_set.margins(model, attend(model, beta)) for beta in betas] for query_set in (tune, test))
    return attack.same(on_tune, on_test)


@dataclass(frozen=True, eq=False)
class AttentionReady:
    ready: Ready
    betas: tuple[float, ...]


def prepare_attention(case: Case, shared: Levels | None = None, *, betas: tuple[float, ...] = BETAS) -> AttentionReady:
    """Turn the retrained models' attention to the subject.

    Raises:
        KeyError: a model whose attention scores have no hook.
        ValueError: one that does not read them there.
    """
    require_attended(case.full, make_query_set(case, "test").queries[0])
    points = [f"beta {beta:g}" for beta in betas]
    return AttentionReady(attack.prepare(case, shared, points, partial(_operate, betas)), betas)


def audit_attention(case: Case, attention: AttentionReady, model: Model, name: str) -> Result:
    """Turn the audited model's attention to the subject."""
    ready = attention.ready
    curves = attack.curves_of(case, ready, model, partial(_operate, attention.betas))
    return attack.attack_result(
        case,
        ready,
        model,
        curves,
        test="keyword_attention",
        name=name,
        cost_fe=attack.fe_per_fact(ready, len(attention.betas)),
        alphas=attention.betas,
    )
