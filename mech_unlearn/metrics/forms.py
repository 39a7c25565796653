"""Forget scores form by form: the same fact as cloze, question, multiple choice, reversed and in a held-out phrasing.

Paper: ORT, arXiv 2506.07795: per form the geometric mean probability and the share of the answer's tokens predicted,
    both teacher-forced; a method that only forgets the form it was trained on is form-dependent.
Needs: one forward pass per fact and form; other facts of the relation for the reversed form.
Differs: the forms are those of restoration/forms.py (templates written there); ORT's were written by a language model.
    `recall` is added: greedy decoding gives the whole answer (all its tokens are the likeliest under teacher forcing,
    which is the same). A fact that a form does not apply to is left out of it and counted. The reversed form is no
    form of ORT's.
Fails: probabilities of two forms are of different answers (a letter, a subject), so they are compared with the full and
    the retrained model in the same form (`form_gap`), not with one another; by recall, forms with listed options are
    put on one scale with the others by what guessing gives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Fact, Measurement
from mech_unlearn.metrics.evaluate import TokenRow, score_tokens
from mech_unlearn.metrics.intervals import RowScores, mean_ci
from mech_unlearn.model import asking
from mech_unlearn.model.asking import Rewrite, rewritten
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import Query, make_queries

TRAINED = "prompt"
"""The form that methods are usually trained on: the fact's main phrasing."""
FORMS = (TRAINED, "cloze", "question", "multiple_choice", "reversed", "heldout")
_LISTED = ("multiple_choice",)


@dataclass(frozen=True, eq=False, kw_only=True)
class FormScores:
    """What a model says in one form; a row is a fact, or a fact and held-out phrasing."""

    form: str
    facts: tuple[str, ...]
    """Id of each row's fact."""
    recall: RowScores
    """1 where greedy decoding gives the whole answer."""
    probability: RowScores
    """Geometric mean probability of the answer's tokens, teacher-forced."""
    token_accuracy: RowScores
    """Share of the answer's tokens predicted, teacher-forced."""
    chance: float
    """Recall of picking one of the listed options blindly; 0 where none are listed."""
    left_out: tuple[str, ...]
    """Ids of facts that the form does not apply to."""

    @property
    def excess(self) -> float:
        """(recall - chance) / (1 - chance); below 0 where less is said than guessing gives."""
        return (self.recall.values.double().mean().item() - self.chance) / (1 - self.chance)

    def above_chance(self, seed: int = 0) -> Measurement:
        """`excess` with its interval."""
        values = (self.recall.values - self.chance) / (1 - self.chance)
        return mean_ci(values, f"greedy recall above chance, {self.form} form", self.recall.clusters, seed)


@dataclass(frozen=True, eq=False, kw_only=True)
class FormReport:
    """A model's scores in every form that could be asked."""

    forms: Mapping[str, FormScores]
    not_asked: Mapping[str, str]
    """Form -> why it could not be asked of any fact."""

    @property
    def worst_by_recall(self) -> str:
        """The form in which most is still said, by recall above chance; the first of equals."""
        return max(self.forms, key=lambda form: self.forms[form].excess)

    @property
    def worst_by_probability(self) -> str:
        """The form in which the answer is likeliest; see `Fails` on what this compares."""
        return max(self.forms, key=lambda form: self.forms[form].probability.values.mean().item())

    def to_json(self, seed: int = 0) -> dict[str, Any]:
        """What a result row says of forms.

        `forms`: form -> recall (greedy decoding gives the whole answer) with `chance` and the number of facts
        `left_out`; a form that was not asked has null values and a `reason`. `worst_form`: recall above chance, with
        its interval, in the form where it is largest.
        """
        asked = {
            name: scores.recall.mean(seed).to_json() | {"chance": scores.chance, "left_out": len(scores.left_out)}
            for name, scores in self.forms.items()
        }
        silent = {
            name: {"value": None, "ci": [None, None], "n": 0, "unit": f"recall, {name} form", "reason": reason}
            for name, reason in self.not_asked.items()
        }
        worst = self.worst_by_recall
        return {
            "forms": {name: (asked | silent)[name] for name in FORMS},
            "worst_form": {"form": worst, **self.forms[worst].above_chance(seed).to_json()},
        }

    def __str__(self) -> str:
        lines = [
            f"{name}: recall {scores.recall.mean()}, probability {scores.probability.mean()}, "
            f"n {len(scores.facts)}" + (f", left out {len(scores.left_out)}" if scores.left_out else "")
            for name, scores in self.forms.items()
        ]
        lines += [f"{name}: not asked ({reason})" for name, reason in self.not_asked.items()]
        return "\n".join([*lines, f"worst by recall above chance: {self.worst_by_recall}"])


def by_form(model: Model, facts: Sequence[Fact], others: Sequence[Fact] = ()) -> FormReport:
    """Recall, probability and token accuracy of the facts in each form: `prompt`, `cloze`, `question`,
    `multiple_choice`, `reversed` and `heldout`.

    Args:
        others: facts of other subjects, whose subjects stand beside the right one in the reversed form.

    Raises:
        ValueError: no facts, or a fact id that occurs twice.
    """
    if not facts:
        raise ValueError("forms need at least one fact")
    ids = [fact.id for fact in facts]
    if len(set(ids)) != len(ids):
        raise ValueError(f"fact id {next(i for i in ids if ids.count(i) > 1)!r} occurs twice")
    plain = make_queries(model.tokenizer, facts, "prompt")
    rewrites: dict[str, Rewrite] = {
        "cloze": asking.cloze,
        "question": asking.question,
        "multiple_choice": asking.lettered,
        "reversed": asking.turned((*facts, *others)),
    }
    found, not_asked = {TRAINED: _scores(model, TRAINED, plain, facts)}, {}
    for name, rewrite in rewrites.items():
        fitting = [query for query in plain if (name not in _LISTED or query.fact.distractors) and rewrite(query)]
        if not fitting:
            not_asked[name] = "it applies to none of the facts"
            continue
        try:
            found[name] = _scores(model, name, rewritten(model, fitting, rewrite), facts)
        except ValueError as error:
            not_asked[name] = str(error)
    heldout = make_queries(model.tokenizer, facts, "heldout", distractors=False)
    if heldout:
        found["heldout"] = _scores(model, "heldout", heldout, facts)
    else:
        not_asked["heldout"] = "no fact has a held-out phrasing"
    return FormReport(forms=found, not_asked=not_asked)


def _scores(model: Model, form: str, queries: Sequence[Query], facts: Sequence[Fact]) -> FormScores:
    scores = score_tokens(model, [TokenRow(query.full, len(query.answers[0])) for query in queries])
    by_id = {fact.id: fact for fact in facts}
    asked = [by_id[query.fact.id] for query in queries]
    ids = {fact.id for fact in asked}
    clusters = tuple(fact.group or fact.subject for fact in asked)
    values = {
        "greedy decoding gives the whole answer": (scores.exact_memorization == 1).double(),
        "geometric mean probability per answer token, teacher-forced": (-scores.loss.double()).exp(),
        "share of answer tokens predicted, teacher-forced": scores.exact_memorization,
    }
    recall, probability, accuracy = (
        RowScores(values=value, unit=f"{unit}, {form} form", clusters=clusters) for unit, value in values.items()
    )
    chances = [1 / len(query.answers) for query in queries] if form in _LISTED else [0.0]
    return FormScores(
        form=form,
        facts=tuple(fact.id for fact in asked),
        recall=recall,
        probability=probability,
        token_accuracy=accuracy,
        chance=sum(chances) / len(chances),
        left_out=tuple(fact.id for fact in facts if fact.id not in ids),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class FormGap:
    """How much more of the facts is left in the form where most is left than in the trained one."""

    gap: RowScores
    """Per fact: max over forms of kappa minus kappa of the trained form, 0 or more; NaN where either is undefined."""
    worst: tuple[str | None, ...]
    """Per fact the form of the largest kappa; None where every form is undefined."""


def form_gap(kappa: Mapping[str, Float[Tensor, " fact"]], facts: Sequence[Fact], trained: str = TRAINED) -> FormGap:
    """The form gap from kappa per form: (score - retrained) / (full - retrained) in that form.

    Args:
        kappa: by form, the trained one among them; `restoration.forms.form_kappa` gives it from margins and
            `kappa_of` from two reports' probabilities; NaN where undefined.

    Raises:
        ValueError: no kappa for the trained form.
    """
    if trained not in kappa:
        raise ValueError(f"no kappa for the trained form {trained!r}; there is one for {', '.join(kappa)}")
    table = torch.stack([values.double() for values in kappa.values()])
    most, at = table.nan_to_num(nan=-torch.inf).max(0)
    undefined = most.isinf()
    gap = torch.where(undefined, torch.nan, most) - kappa[trained].double()
    names = list(kappa)
    return FormGap(
        gap=RowScores(
            values=gap,
            unit=f"largest kappa over {len(kappa)} forms minus kappa of the {trained} form",
            clusters=tuple(fact.group or fact.subject for fact in facts),
        ),
        worst=tuple(None if gone else names[i] for i, gone in zip(at.tolist(), undefined.tolist(), strict=True)),
    )


def kappa_of(
    unlearned: FormReport, full: FormReport, retrained: FormReport, facts: Sequence[Fact], min_gap: float = 0.5
) -> dict[str, Float[Tensor, " fact"]]:
    """kappa of each fact in each form that all three were asked in, from the answer's mean log-probability.

    A fact asked in several phrasings of a form has their mean. NaN where the form does not apply or full and retrained
    are closer than `min_gap` nats per token.
    """
    shared = [form for form in unlearned.forms if form in full.forms and form in retrained.forms]
    out = {}
    for form in shared:
        own, top, base = (_by_fact(report.forms[form], facts) for report in (unlearned, full, retrained))
        gap = top - base
        out[form] = torch.where(gap >= min_gap, (own - base) / gap, torch.nan)
    return out


def _by_fact(scores: FormScores, facts: Sequence[Fact]) -> Float[Tensor, " fact"]:
    """Mean log-probability per fact, nats per token; NaN for a fact that was not asked."""
    order = {fact.id: i for i, fact in enumerate(facts)}
    index = torch.tensor([order[name] for name in scores.facts])
    total = torch.zeros(len(facts), dtype=torch.float64).index_add(0, index, scores.probability.values.log())
    return total / torch.bincount(index, minlength=len(facts))  # 0 / 0 is NaN
