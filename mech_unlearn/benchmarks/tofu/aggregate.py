"""TOFU's numbers from evaluation logs, its own or those of `benches/tofu.py`.

The numbers carry the keys of TOFU's own tables and come from its own formulas (scores.py; the truth ratio is the
geometric variant, which those tables use).
"""

import os
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.benchmarks.tofu.logs import EvalLog, LogSplit, read_log
from mech_unlearn.benchmarks.tofu.scores import (
    forget_quality,
    interval,
    model_utility,
    probability,
    probability_among_options,
    resample,
    resampled_forget_quality,
    resampled_means,
    resampled_utility,
)
from mech_unlearn.core import Measurement
from mech_unlearn.metrics.truth_ratio import closeness_to_one, true_preferred, truth_ratio_geometric

UTILITY_PARTS = ("ROUGE", "Prob.", "Truth Ratio")
ORDER = ("Real Authors", "Real World", "Retain", "Forget")
_UNITS = {
    "ROUGE": "ROUGE-L recall, mean over questions",
    "Prob.": "geometric mean probability per token, mean over questions",
    "Truth Ratio": "score of the geometric truth ratio, mean over questions",
}
_OPTIONS = "probability among true and perturbed answers, mean over questions"


def scores(name: str, split: LogSplit) -> Float[Tensor, "example 3"]:
    """ROUGE, probability and truth-ratio score of each question of a split, in the order of `UTILITY_PARTS`."""
    ratio = truth_ratio_geometric(split.paraphrased_loss, split.perturbed_loss)
    fictitious = name in ("Retain", "Forget")
    return torch.stack(
        [
            split.rouge_l_recall,
            probability(split.gt_loss)
            if fictitious
            else probability_among_options(split.gt_loss, split.perturbed_loss),
            closeness_to_one(ratio) if name == "Forget" else true_preferred(ratio),
        ],
        1,
    )


def _ratios(log: EvalLog) -> Float[Tensor, " example"]:
    split = log.splits["Forget"]
    return truth_ratio_geometric(split.paraphrased_loss, split.perturbed_loss)


def aggregate(log: EvalLog, retain_log: EvalLog | None) -> dict[str, float]:
    """TOFU's numbers of a model, against a model retrained without the forget set.

    Args:
        log: all four splits of the model.
        retain_log: the retrained model; only its forget split is read. Without it there is no forget quality.
    """
    values = {}
    for name in ORDER:
        means = scores(name, log.splits[name]).mean(0).tolist()
        values |= {f"{part} {name}": mean for part, mean in zip(UTILITY_PARTS, means, strict=True)}
    utility = model_utility([values[f"{part} {name}"] for name in ORDER if name != "Forget" for part in UTILITY_PARTS])
    values["Model Utility"] = utility
    if retain_log is None:
        return values
    test = forget_quality(_ratios(log), _ratios(retain_log))
    return values | {
        "Forget Quality": test.pvalue,
        "KS Test PVal Forget": test.pvalue,
        "KS Test Forget": test.statistic,
    }


def same_questions(log: EvalLog, retain_log: EvalLog) -> bool:
    """Whether the forget splits ask the same questions under the same row numbers, as far as the logs tell."""
    one, two = (each.splits["Forget"] for each in (log, retain_log))
    if one.texts is None or two.texts is None:
        return one.rows == two.rows
    return [(row, text[2]) for row, text in zip(one.rows, one.texts, strict=True)] == [
        (row, text[2]) for row, text in zip(two.rows, two.texts, strict=True)
    ]


def measure(
    log: EvalLog, retain_log: EvalLog | None, *, rows_per_author: int = 1, seed: int = 0
) -> dict[str, Measurement]:
    """The numbers of `aggregate`, each with its 95 % percentile-bootstrap interval over the questions.

    Paired: the parts of a split share their draws, and so do both models where they were asked the same questions.

    Args:
        rows_per_author: so many consecutive questions of the retain and forget splits are drawn together; 20 draws
            whole authors, whose questions are not independent.

    Raises:
        ValueError: less than one row per author.
    """
    if rows_per_author < 1:
        raise ValueError(f"rows_per_author must be 1 or more, got {rows_per_author}")
    values, measured = aggregate(log, retain_log), {}
    generator = torch.Generator().manual_seed(seed)
    kept, counts = [], torch.empty(0)
    for name in ORDER:
        split = log.splits[name]
        counts = resample(len(split.rows), generator, rows_per_author if name in ("Retain", "Forget") else 1)
        draws = resampled_means(counts, scores(name, split))
        kept += [draws] if name != "Forget" else []
        for i, part in enumerate(UTILITY_PARTS):
            unit = _OPTIONS if part == "Prob." and name.startswith("Real") else _UNITS[part]
            key = f"{part} {name}"
            measured[key] = Measurement(value=values[key], ci=interval(draws[:, i]), n=len(split.rows), unit=unit)
    asked = sum(len(log.splits[name].rows) for name in ORDER if name != "Forget")
    utility = interval(resampled_utility(torch.cat(kept, 1)))
    measured["Model Utility"] = Measurement(
        value=values["Model Utility"], ci=utility, n=asked, unit="harmonic mean of nine parts"
    )
    if retain_log is None:
        return measured
    rows = len(retain_log.splits["Forget"].rows)
    other = counts if same_questions(log, retain_log) else resample(rows, generator, rows_per_author)
    statistic, pvalue = resampled_forget_quality(_ratios(log), _ratios(retain_log), counts, other)
    n = len(log.splits["Forget"].rows)
    for key in ("Forget Quality", "KS Test PVal Forget", "KS Test Forget"):
        drawn, unit = (
            (statistic, "largest distance of the distributions")
            if key == "KS Test Forget"
            else (
                pvalue,
                "p-value of a two-sample KS test of truth ratios",
            )
        )
        measured[key] = Measurement(value=values[key], ci=interval(drawn), n=n, unit=unit)
    return measured


def bench_tofu(
    logs: str | os.PathLike,
    retain_logs: str | os.PathLike,
    *,
    intervals: bool = False,
    rows_per_author: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """TOFU's table from two evaluation logs: key -> number, or key -> value, interval, n and unit with `intervals`.

    Raises:
        ValueError: a log that cannot be read (see `read_log`).
    """
    log, retain_log = read_log(logs), read_log(retain_logs, ("Forget",))
    if not intervals:
        return dict(aggregate(log, retain_log))
    measured = measure(log, retain_log, rows_per_author=rows_per_author, seed=seed)
    return {key: value.to_json() for key, value in measured.items()}


def question_note(logs: str | os.PathLike, retain_logs: str | os.PathLike) -> str:
    """One line where the two logs were not asked the same forget questions; empty where they were."""
    pair = [read_log(path, ("Forget",)) for path in (logs, retain_logs)]
    if same_questions(*pair):
        return ""
    sizes = " and ".join(str(len(log.splits["Forget"].rows)) for log in pair)
    return f"the forget splits of the two logs hold different questions ({sizes}): forget quality compares unlike sets"
