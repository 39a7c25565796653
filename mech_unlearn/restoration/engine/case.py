"""What an audit is about (`Case`), and the one place that makes what each test gives back (`make_result`)."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Entity, Fact, Site
from mech_unlearn.model.asking import Split, split_templates
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.latents import Sae
from mech_unlearn.model.tokens import Ask, Query, tokenize
from mech_unlearn.verdict.result import Grade, Result

TUNE_FACTS = 40
"""Facts on which a test chooses its setting or place, at the most."""


def _silent(message: str) -> None:
    """Progress goes nowhere unless the caller asks."""


@dataclass(frozen=True, kw_only=True)
class Relearn:
    """Settings of the relearning attack."""

    steps: tuple[int, ...] = (2, 8, 24)
    """Numbers of optimiser steps after which the untaught facts are scored, increasing."""
    batch: int = 16
    """Prompts per step."""
    lr_times_width: float = 0.064
    """AdamW learning rate times d_model: 5e-4 at width 128, 3e-5 at 2,048, the range used on 1B to 8B models."""
    split: Literal["entity", "fact"] = "entity"
    """Teach some subjects and score the others, or teach some facts of each subject and score its others."""
    folds: int = 2
    """Parts of the forget set; each is scored once, after all the other folds were taught."""

    def __post_init__(self) -> None:
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            raise ValueError(f"relearn steps must be increasing and positive, got {self.steps}")
        if self.batch < 1 or self.folds < 2 or self.lr_times_width < 0:
            raise ValueError("relearn needs batch >= 1, folds >= 2 and a learning rate >= 0")


@dataclass(frozen=True, kw_only=True)
class Case:
    """The models and facts that every test of one audit shares; the audited model itself comes later.

    All models share tokenizer and base checkpoint, so that their residual streams live in one basis.

    Raises:
        ValueError: no facts, a repeated fact id, or models of different shape.
    """

    full: Model
    """Before unlearning."""
    facts: tuple[Fact, ...]
    retrained: tuple[Model, ...] = ()
    """Trained the same way without the facts; with none of them the evidence is of grade B: scores, and no verdict on
    what the outputs lost."""
    others: tuple[Fact, ...] = ()
    """Facts about other subjects, known to every model: contrast for latents, and check of collateral damage."""
    texts: tuple[str, ...] = ()
    """Generic running text: latents that fire on it are not specific to an entity."""
    unknown: tuple[Entity, ...] = ()
    """Subjects that no model knows; they stand in for a retrained model in grade B."""
    sae: Sae | None = None
    site: Site | None = None
    """Where profiles are written; the SAE's own site, else the residual stream a third of the way up."""
    prompts: int = 1
    """TEST phrasings per fact in the patching, steering, relearning and rounding tests, at the most."""
    draws: int = 10
    """Draws of each of the two nulls of the steering test; p-values cannot fall below 1 / (2 draws + 1)."""
    relearn: Relearn = field(default_factory=Relearn)
    seed: int = 0
    log: Callable[[str], None] = _silent
    """Called with one line per step of work."""

    def __post_init__(self) -> None:
        if not self.facts:
            raise ValueError("an audit needs at least one fact")
        ids = [fact.id for fact in self.facts]
        if len(set(ids)) != len(ids):
            raise ValueError(f"fact id {next(i for i in ids if ids.count(i) > 1)!r} occurs twice")
        for model in self.retrained:
            require_same_shape(self.full, model)

    @property
    def grade(self) -> Grade:
        return "A" if self.retrained else "B"

    @property
    def write_site(self) -> Site:
        """Where entity profiles are written. Source of the default: arXiv 2304.14767 (subject enrichment in
        early and middle layers)."""
        if self.sae is not None:
            return self.sae.site
        return self.site or Site(max(0, round(self.full.n_layers / 3) - 1), "resid_post")

    def index_of(self, model: Model) -> int | None:
        """Which of the retrained models this is."""
        return next((k for k, retrained in enumerate(self.retrained) if retrained is model), None)

    def others_than(self, model: Model) -> list[int]:
        """Indices of the retrained models to compare with: all but the audited one itself.

        Raises:
            ValueError: the audited model is the only retrained one.
        """
        keep = [k for k, retrained in enumerate(self.retrained) if retrained is not model]
        if self.retrained and not keep:
            raise ValueError("auditing a retrained model needs a second one to compare it with")
        return keep


def require_same_shape(full: Model, other: Model) -> None:
    """Check that states of one model can be written into the other, and logits compared on the tokens that both have.

    Raises:
        ValueError: another depth or width, or a tokenizer that gives other ids. Tokens may have been added to one.
    """
    for what in ("n_layers", "d_model"):
        if getattr(full, what) != getattr(other, what):
            raise ValueError(
                f"model {other.name!r} has {what} {getattr(other, what)}, {full.name!r} {getattr(full, what)}; "
                "an audit compares models of one architecture"
            )
    sample = "The quick brown fox met Anna Lee in Paris, 1987."
    ours, theirs = full.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    moved = any(theirs.get(token, number) != number for token, number in ours.items())
    if moved or full.tokenizer(sample)["input_ids"] != other.tokenizer(sample)["input_ids"]:
        raise ValueError(
            f"models {full.name!r} and {other.name!r} have different tokenizers; give models made from one checkpoint "
            "(tokens added at the end do no harm)"
        )


def split_queries(
    case: Case, split: Split, facts: Sequence[Fact] | None = None, limit: int | None = None
) -> tuple[Query, ...]:
    """Queries of one split, at most `limit` per fact (default: `case.prompts`)."""
    most = case.prompts if limit is None else limit
    chosen = case.facts if facts is None else facts
    asks = [Ask(fact, template) for fact in chosen for template in split_templates(fact, split)[:most]]
    return tokenize(case.full.tokenizer, asks)


def tune_facts(case: Case, most: int = TUNE_FACTS) -> tuple[int, ...]:
    """Indices of the facts on which a test chooses, drawn with the seed, in their order."""
    order = torch.randperm(len(case.facts), generator=torch.Generator().manual_seed(case.seed)).tolist()
    return tuple(sorted(order[:most]))


def irrelevant_texts(case: Case) -> list[str]:
    """The case's distinct texts that name no forgotten subject, by its name or an alias, and no answer: as whole words,
    in any case."""
    told = {name for fact in case.facts for name in (fact.subject, *fact.aliases, fact.object)}
    named = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(told)))})(?!\w)", re.IGNORECASE)
    return [text for text in dict.fromkeys(case.texts) if not named.search(text)]


def make_result(
    case: Case,
    test: str,
    name: str,
    *,
    score_raw: Float[Tensor, " fact"] | float,
    score_full: Float[Tensor, " fact"] | float,
    score_retrained: Float[Tensor, "retrained fact"],
    null: Float[Tensor, "heldout fact"],
    cost_fe: float,
    kappa: Float[Tensor, " fact"] | None = None,
    rho: Float[Tensor, " fact"] | None = None,
    recoverability: Float[Tensor, " fact"] | None = None,
    n_paraphrases: int | None = None,
    layer: int | None = None,
    flags: Sequence[tuple[str, ...]] = (),
    columns: Mapping[str, Float[Tensor, " fact"] | float] | None = None,
    curves: Mapping[str, Float[Tensor, "point fact"]] | None = None,
    axis: Sequence[float] | Sequence[int] | None = None,
) -> Result:
    """The result of a test on one model; a single number stands for all facts.

    Args:
        name: the audited model's.
        recoverability: rho where the test has one, else kappa within [0, 1], else undefined (NaN).
        axis: the points of all curves; 0, 1, .. otherwise.
    """
    blank = torch.full((len(case.facts),), torch.nan)
    if recoverability is None:
        recoverability = rho if rho is not None else blank if kappa is None else kappa.clamp(0, 1)

    def each(value: Tensor | float) -> Float[Tensor, " fact"]:
        return value if isinstance(value, Tensor) else torch.full((len(case.facts),), float(value))

    drawn = dict(curves or {})
    points = tuple(map(float, range(len(next(iter(drawn.values()), ()))) if axis is None else axis))
    return Result(
        test=test,
        model_id=name,
        facts=case.facts,
        recoverability=recoverability,
        score_raw=each(score_raw),
        score_full=each(score_full),
        score_retrained=score_retrained,
        null=null,
        grade=case.grade,
        n_paraphrases=case.prompts if n_paraphrases is None else n_paraphrases,
        seed=case.seed,
        cost_fe=cost_fe,
        layer=layer,
        kappa=kappa,
        rho=rho,
        flags=tuple(flags),
        columns={key: each(value) for key, value in (columns or {}).items()},
        curves=drawn,
        curve_axes=dict.fromkeys(drawn, points),
    )
