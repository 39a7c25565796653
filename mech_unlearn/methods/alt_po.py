"""AltPo: the forgotten answer is unlearned against a plausible alternative of the same kind.

Paper:    Mekala et al. 2024, Alternate Preference Optimization for Unlearning Factual Knowledge in Large Language
          Models, arXiv 2409.13474: negative feedback on the true answer with in-domain positive feedback.
Changes:  every weight (or those whose name matches `trainable`), full rank.
Needs:    facts with distractors, or alternatives given; log-probabilities of both before training: one forward pass.
Differs:  alternatives are distractors or given (the paper has the model write five per question and trains on each);
          one is drawn per prompt, by default the same for all phrasings of a fact; dropout is off, the learning rate
          constant without a warm-up epoch, the trained copy float32; texts of the retain set join the retained answers.
Fails:    teaches a false answer, which may spread to what follows from it; the true one can be underneath.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch import Tensor

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods.npo import npo_loss
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import make_queries
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.losses import dpo_loss
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import BatchScores, TrainRow
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import require_positive, trained_edit

Feedback = Literal["dpo", "npo"]


@dataclass(frozen=True, kw_only=True)
class AltPo:
    """Settings of the training; `fit` runs it. Defaults: the paper's code on TOFU with Llama 3.2."""

    loss: Feedback = "dpo"
    """"dpo": the alternative is preferred to the answer; "npo": NPO on the answer plus NLL on the alternative."""
    beta: float = 0.1
    """Inverse temperature."""
    alternatives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Alternative answers by a fact's id; a fact left out takes its distractors."""
    per_phrasing: bool = False
    """Whether each phrasing of a fact draws its own alternative."""
    forget_weight: float = 1.0
    """Weight of the preference loss."""
    retain_weight: float = 1.0
    """Weight of the NLL per token on retained answers and texts; 0 trains on the forget rows alone."""
    schedule: Schedule = Schedule(lr=5e-5, epochs=10)
    trainable: str = ""
    """Regular expression for the names of the weights to train; empty matches all."""
    seed: int = 0
    """Draws the alternatives and the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes.

        Raises:
            ValueError: a fact without an alternative, nothing retained, nothing to train, a setting out of range, or a
                loss that is not finite.
        """
        require_positive(self, "beta")
        if self.loss not in get_args(Feedback):
            raise ValueError(f"loss must be 'dpo' or 'npo', got {self.loss!r}")
        drawn = alternative_rows(
            model.tokenizer, forget.facts, self.alternatives, self.per_phrasing, random.Random(self.seed)
        )
        objective = Objective(self._loss, self.retain_weight, self.forget_weight, others=drawn)
        return trained_edit("alt_po", self, model, forget, retain, objective, self.trainable, around)

    def _loss(self, before: BatchScores) -> Callable[[BatchScores], Tensor]:
        def loss(now: BatchScores) -> Tensor:
            answers, others = now.logprob.chunk(2)
            answers_before, others_before = before.logprob[now.row].chunk(2)
            if self.loss == "dpo":
                return dpo_loss(others, others_before, answers, answers_before, self.beta)
            nll = -(others / now.tokens.chunk(2)[1]).mean()
            return npo_loss(answers, answers_before, self.beta) + nll

        return loss


def alternative_rows(
    tokenizer: Any,
    facts: Sequence[Fact],
    given: Mapping[str, Sequence[str]],
    per_phrasing: bool,
    order: random.Random,
) -> list[TrainRow]:
    """The prompts of `rows.answer_rows`, in its order, each followed by an alternative answer drawn at random.

    Raises:
        ValueError: a fact without an alternative, one that equals its object, an id that no fact has, or an alternative
            that the tokenizer cannot write.
    """
    if unknown := sorted(set(given) - {fact.id for fact in facts}):
        raise ValueError(f"alternatives names {unknown[0]!r}, which is no fact of the forget set")
    rows = []
    for fact in facts:
        options = tuple(given.get(fact.id, fact.distractors))
        if not options:
            raise ValueError(f"fact {fact.id!r} has no distractors: give some, or alternatives= by its id")
        if fact.object in options:
            raise ValueError(f"fact {fact.id!r}: {fact.object!r} is its answer and cannot be an alternative")
        once = order.randrange(len(options))
        queries = make_queries(tokenizer, [replace(fact, distractors=options)])
        for query in queries:
            chosen = order.randrange(len(options)) if per_phrasing else once
            rows.append((query.prompt + query.answers[1 + chosen], len(query.prompt)))
    return rows
