"""Tasks of lm-evaluation-harness on a model of this package, through the harness's own API.

Needs: the optional extra `mech_unlearn[harness]` (package lm-eval, 0.4.5 or later), and the tasks' data from the hub.
Differs: a number carries an interval: value +- 1.96 standard errors, as the harness estimates them, not a bootstrap of
    this package. The name of each number is `TASK/METRIC,FILTER` as the harness writes it, so that variants of a metric
    never share a column.
Fails: groups of tasks without a standard error, and metrics that the harness gives none for, come without an interval
    (NaN at both ends). Tasks that generate text use a cache, which an edit of activations refuses.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mech_unlearn.core import Measurement
from mech_unlearn.model.bridge import Model

Z = 1.959964
"""97.5 % point of the standard normal distribution."""


def lm_eval_harness(
    model: Model,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    batch_size: int = 8,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Measurement]:
    """Run tasks of lm-evaluation-harness; weight edits and interventions in force are seen.

    Args:
        tasks: names of tasks, or their configurations as the harness takes them.
        limit: questions per task (or their share, below 1); None for all.
        settings: further arguments of `lm_eval.simple_evaluate`, for example `task_manager`.

    Raises:
        ValueError: the harness is not installed, no task was named, or one that it does not know.
    """
    if not tasks:
        raise ValueError("name at least one task of lm-evaluation-harness, for example 'mmlu' or 'wmdp_bio'")
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"tasks of lm-evaluation-harness need its package ({error.name or error} is missing): "
            "pip install 'mech_unlearn[harness]'"
        ) from error
    lm = HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            **settings,
        )
    except KeyError as error:
        raise ValueError(
            f"lm-evaluation-harness does not know a task: {error.args[0]}; `lm-eval ls tasks` lists them"
        ) from error
    return measurements(found)


def measurements(found: Mapping[str, Any]) -> dict[str, Measurement]:
    """The numbers in a result of `lm_eval.simple_evaluate`, each with its interval, count and unit."""
    out = {}
    counts = found.get("n-samples", {})
    for task, numbers in found["results"].items():
        for key, value in numbers.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float) or not kind:
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            spread = Z * error if isinstance(error, int | float) else float("nan")
            out[f"{task}/{key}"] = Measurement(
                value=float(value),
                ci=(value - spread, value + spread),
                n=int(counts.get(task, {}).get("effective", numbers.get("sample_len", 0))),
                unit=f"{metric} of lm-evaluation-harness, filter {kind}",
            )
    return out
