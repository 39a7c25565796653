"""Multiple choice in two variants that are never one column: by the letter, and by the option's own text.

Paper: WMDP, arXiv 2403.03218, and MMLU, arXiv 2009.03300: zero-shot, the likeliest of the letters; chance 1 / options.
Needs: by letter one forward pass per question where letters are single tokens; by text one per option.
Differs: k options in a tie share the point as 1/k (lm-evaluation-harness takes the first). By text: mean
    log-probability per token, so that long options are not punished; the harness's `acc` is of the sum and its
    `acc_norm` per byte.
Fails: a model that lost the format answers at chance by letter and still knows the option by its text, and the other
    way round: that is why both are reported.
"""

import string
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Measurement
from mech_unlearn.metrics.evaluate import score_options
from mech_unlearn.metrics.intervals import RowScores, mean_ci
from mech_unlearn.model.bridge import Model

BY_LETTER = "share of questions, by the likeliest letter"
BY_TEXT = "share of questions, by the option text of highest mean log-probability per token"


@dataclass(frozen=True, kw_only=True)
class ChoiceQuestion:
    """A question with its options.

    Raises:
        ValueError: fewer than two options, more than letters, the same option twice, or no right one.
    """

    question: str
    options: tuple[str, ...]
    right: int
    """Index of the true option."""
    cluster: Hashable = None
    """What the question belongs to; the question itself when not given."""

    def __post_init__(self) -> None:
        if not 2 <= len(self.options) <= len(string.ascii_uppercase):
            raise ValueError(f"question {self.question[:60]!r}: give 2 to 26 options, found {len(self.options)}")
        if len(set(self.options)) != len(self.options):
            raise ValueError(f"question {self.question[:60]!r}: an option stands twice in {list(self.options)}")
        if not 0 <= self.right < len(self.options):
            raise ValueError(f"question {self.question[:60]!r}: right is {self.right}, of {len(self.options)} options")


@dataclass(frozen=True, eq=False, kw_only=True)
class Choices:
    """Log-probabilities of the options, and whether the right one is the likeliest."""

    logprob: Float[Tensor, "question option"]
    """Mean per token, nats; NaN where a question has fewer options."""
    correct: RowScores
    """1 where the right option is the likeliest, 1/k where k options tie with it, else 0."""


def lettered_prompt(question: ChoiceQuestion, description: str = "") -> str:
    """The question with its options by letter, in the harness's layout."""
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, question.options)]
    head = f"{description.strip()}\n\n" if description.strip() else ""
    return "\n".join([f"{head}{question.question.strip()}", *lines, "Answer:"])


def choice_by_letter(model: Model, questions: Sequence[ChoiceQuestion], description: str = "") -> Choices:
    """Accuracy of the likeliest letter (A, B, ...) after the question and its lettered options, zero-shot.

    Args:
        description: a sentence put before each question.

    Raises:
        ValueError: no question, or as `evaluate.score_options`.
    """
    letters = [tuple(string.ascii_uppercase[: len(q.options)]) for q in questions]
    rows = [(lettered_prompt(q, description), found) for q, found in zip(questions, letters, strict=True)]
    return _choices(model, questions, rows, BY_LETTER)


def choice_by_option_text(
    model: Model, questions: Sequence[ChoiceQuestion], layout: str = "{question}\nAnswer:"
) -> Choices:
    """Accuracy of the option whose text is the likeliest after the question; the options are not listed.

    Args:
        layout: what is put before the option; `{question}` stands for the question.

    Raises:
        ValueError: no question, a layout without `{question}`, or as `evaluate.score_options`.
    """
    if "{question}" not in layout:
        raise ValueError(f"layout {layout!r} lacks {{question}}")
    rows = [(layout.replace("{question}", q.question.strip()), q.options) for q in questions]
    return _choices(model, questions, rows, BY_TEXT)


def _choices(
    model: Model, questions: Sequence[ChoiceQuestion], rows: Sequence[tuple[str, Sequence[str]]], unit: str
) -> Choices:
    if not questions:
        raise ValueError("no questions: give at least one")
    logprob = score_options(model, rows)
    known = logprob.nan_to_num(nan=-torch.inf)
    tied = known == known.amax(1, keepdim=True)
    right = torch.tensor([q.right for q in questions])
    correct = tied.gather(1, right[:, None])[:, 0].double() / tied.sum(1)
    return Choices(logprob=logprob, correct=RowScores(values=correct, unit=unit, clusters=_clusters(questions)))


def _clusters(questions: Sequence[ChoiceQuestion]) -> tuple[Hashable, ...]:
    return tuple(("question", i) if q.cluster is None else q.cluster for i, q in enumerate(questions))


def choice_chance(questions: Sequence[ChoiceQuestion], seed: int = 0) -> Measurement:
    """Share of questions that a random option answers: the mean of 1 / options.

    Raises:
        ValueError: no question.
    """
    shares = [1 / len(q.options) for q in questions]
    return mean_ci(shares, "share of questions, by guessing", _clusters(questions), seed)
