"""RESTOR: after false facts were trained in and unlearned, does the clean answer come back?

Paper: Rezaei et al. 2024, arXiv 2411.00204: accuracy after five examples of the relation in context, and the
    length-normalised log-probability of correct, corrupted and random answers.
Needs: the clean, the corrupted and the unlearned model on the same facts.
Differs: the answer is greedy and right where the correct one stands in its first line, word by word; the paper samples
    and lets a language model judge, three times. `recovered`, the share of the loss that was won back, is this
    package's; the paper sets the three accuracies side by side.
Fails: a right answer in other words counts as wrong: give aliases. `recovered` is undefined where the corruption took
    nothing.
"""

import re
from collections.abc import Hashable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Measurement
from mech_unlearn.metrics.evaluate import score_options
from mech_unlearn.metrics.generation import continuations
from mech_unlearn.metrics.intervals import RowScores, statistic_ci
from mech_unlearn.model.bridge import Model

MAX_NEW_TOKENS = 32
_SUPPORT = "mean log-probability per token, nats, mean over the options of a kind"


def holds_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in the first line of the text, as whole words, letter case ignored."""
    first = text.strip().split("\n")[0]
    said = " ".join(re.findall(r"\w+", first.lower()))
    return any(wanted and f" {wanted} " in f" {said} " for wanted in (_words(answer) for answer in answers))


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def accuracy_in_context(
    model: Model,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    clusters: Sequence[Hashable] | None = None,
) -> RowScores:
    """1 where the greedy answer holds the correct one or an alias of it, else 0.

    Args:
        prompts: as `Restor.prompt` gives them.
        answers: the correct answer and its aliases, per prompt.

    Raises:
        ValueError: another number of answers than of prompts, or as `generation.continuations`.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers: give one list for each")
    texts = continuations(model, prompts, max_new_tokens)
    hits = [float(holds_answer(text, right)) for text, right in zip(texts, answers, strict=True)]
    return RowScores(
        values=torch.tensor(hits, dtype=torch.float64),
        unit="share of facts whose greedy answer holds the correct one",
        clusters=None if clusters is None else tuple(clusters),
        texts=texts,
    )


def recovered(unlearned: RowScores, corrupted: RowScores, clean: RowScores, seed: int = 0) -> Measurement:
    """(acc_U - acc_corrupted) / (acc_clean - acc_corrupted): 1 = all that the corruption took is back, 0 = nothing.

    Facts are drawn for all three models together; draws in which the corruption took nothing are left out.

    Raises:
        ValueError: scores of different kinds or facts, or a corrupted model no worse than the clean one.
    """
    for other in (corrupted, clean):
        unlearned.minus(other, seed)  # refuses what cannot be paired
    table = torch.stack([scores.values.double() for scores in (unlearned, corrupted, clean)], 1)
    own, low, high = table.mean(0).tolist()
    if high <= low:
        raise ValueError(f"accuracy {high:.3f} of the clean and {low:.3f} of the corrupted model: nothing to recover")

    def share(means: Float[Tensor, "draw model"]) -> Float[Tensor, " draw"]:
        gap = means[:, 2] - means[:, 1]
        return torch.where(gap > 0, (means[:, 0] - means[:, 1]) / gap, torch.nan)

    return statistic_ci(table, share, "share of the accuracy lost to corruption", unlearned.clusters, seed)


def option_support(
    model: Model,
    prompts: Sequence[str],
    options: Mapping[str, Sequence[Sequence[str]]],
    clusters: Sequence[Hashable] | None = None,
) -> dict[str, RowScores]:
    """Length-normalised log-probability of each kind of answer (correct, corrupted, random), teacher-forced.

    `out["correct"].minus(out["corrupted"])` is the paired preference for the correct answers.

    Args:
        options: kind -> for each prompt its options of that kind.

    Raises:
        ValueError: no kind, another number of options than of prompts, or as `evaluate.score_options`.
    """
    if not options:
        raise ValueError("no kinds of options: give correct, corrupted and random ones")
    out = {}
    for kind, lists in options.items():
        if len(lists) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(lists)} lists of {kind} options: give one for each")
        values = score_options(model, list(zip(prompts, lists, strict=True))).nanmean(1)
        out[kind] = RowScores(values=values, unit=_SUPPORT, clusters=None if clusters is None else tuple(clusters))
    return out
