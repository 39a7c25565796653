"""TOFU's evaluation logs: losses, ROUGE and texts per question, as the benchmark's own code writes them.

A JSON object, plain or gzipped, with one object per split (`eval_log.json`, `eval_log_forget.json`,
`eval_real_author_wo_options.json`, `eval_real_world_wo_options.json`). A split holds, under the same row numbers, the
keys `avg_gt_loss`, `avg_paraphrased_loss` (nats per token), `average_perturb_loss` (a list per row), `rougeL_recall`,
and may hold `generated_text` (`[prompt, generated, reference]`); other keys are not read. Source: Maini et al. 2024,
arXiv 2401.06121; the published logs are MIT.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.data.source import read_json, short

LOG_KEYS = {
    "Retain": "eval_log.json",
    "Real Authors": "eval_real_author_wo_options.json",
    "Real World": "eval_real_world_wo_options.json",
    "Forget": "eval_log_forget.json",
}
"""Name of a split in the published tables -> its key in a log."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LogSplit:
    """One split of a log; entry i of everything belongs to `rows[i]`. Losses in nats per token, float64."""

    rows: tuple[str, ...]
    """Row numbers, as the log spells them."""
    gt_loss: Float[Tensor, " example"]
    paraphrased_loss: Float[Tensor, " example"]
    perturbed_loss: Float[Tensor, "example perturbed"]
    rouge_l_recall: Float[Tensor, " example"]
    texts: tuple[tuple[str, str, str], ...] | None
    """(Prompt, generated text, reference) per row; None where the log has none."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EvalLog:
    """What was measured on one model."""

    path: str
    splits: Mapping[str, LogSplit]
    """By the names of `LOG_KEYS`."""


def _number(value: Any, high: float) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and 0 <= number <= high):
        bounds = "0 or more" if high == math.inf else f"from 0 to {high:g}"
        raise ValueError(f"expected a finite number, {bounds}; found {short(value)}")
    return number


def _loss(value: Any) -> float:
    return _number(value, math.inf)


def _share(value: Any) -> float:
    return _number(value, 1.0)


def _losses(value: Any) -> list[float]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a list of losses, one per perturbed answer; found {short(value)}")
    return [_loss(item) for item in value]


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(item, str) for item in value):
        raise ValueError(f"expected three strings [prompt, generated, reference]; found {short(value)}")
    return tuple(value)


_KEYS: dict[str, Callable[[Any], Any]] = {
    "avg_gt_loss": _loss,
    "avg_paraphrased_loss": _loss,
    "average_perturb_loss": _losses,
    "rougeL_recall": _share,
    "generated_text": _texts,
}
_OPTIONAL = "generated_text"


def _column(split: Mapping[str, Any], key: str, rows: Sequence[str] | None) -> dict[str, Any]:
    column = split[key]
    if not isinstance(column, dict) or not column:
        raise ValueError(f"key {key!r} must be an object of one row or more, found {short(column)}")
    if rows is not None and (odd := set(rows) ^ set(column)):
        row = min(odd)
        where = f"lacks row {row!r}" if row not in column else f"has row {row!r}"
        raise ValueError(f"key {key!r} {where}, and key 'avg_gt_loss' {'has' if row not in column else 'lacks'} it")
    values = {}
    for row, value in column.items():
        try:
            values[row] = _KEYS[key](value)
        except ValueError as error:
            raise ValueError(f"key {key!r}, row {row!r}: {error}") from error
    if key == "average_perturb_loss":
        first, width = next((row, len(losses)) for row, losses in values.items())
        for row, losses in values.items():
            if len(losses) != width:
                raise ValueError(f"key {key!r}, row {row!r}: {len(losses)} losses, but row {first!r} has {width}")
    return values


def _split(split: Any) -> LogSplit:
    if not isinstance(split, dict):
        raise ValueError(f"expected an object of keys, found {short(split)}")
    if missing := [key for key in _KEYS if key not in split and key != _OPTIONAL]:
        raise ValueError(f"missing key {missing[0]!r}")
    rows = tuple(_column(split, "avg_gt_loss", None))
    columns = {key: _column(split, key, rows) for key in _KEYS if key in split}
    values = {key: [column[row] for row in rows] for key, column in columns.items()}
    gt, paraphrased, perturbed, rouge = (torch.tensor(values[key], dtype=torch.float64) for key in list(_KEYS)[:4])
    return LogSplit(
        rows=rows,
        gt_loss=gt,
        paraphrased_loss=paraphrased,
        perturbed_loss=perturbed,
        rouge_l_recall=rouge,
        texts=tuple(values[_OPTIONAL]) if _OPTIONAL in values else None,
    )


def read_log(path: str | os.PathLike, splits: Sequence[str] = tuple(LOG_KEYS)) -> EvalLog:
    """The named splits of an evaluation log, `.json` or gzipped.

    Raises:
        ValueError: no such file, not JSON in UTF-8, a missing split or key, a row that one key has and another lacks,
            or a value that is no loss, share or text; the message names file, split, key and row.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"evaluation log {str(file)!r} does not exist")
    log = read_json(file)
    if not isinstance(log, dict):
        raise ValueError(f"evaluation log {str(file)!r} must hold an object of splits, found {short(log)}")
    found = {}
    for name in splits:
        if (key := LOG_KEYS[name]) not in log:
            raise ValueError(f"evaluation log {str(file)!r} lacks split {key!r}; it has {short(list(log))}")
        try:
            found[name] = _split(log[key])
        except ValueError as error:
            raise ValueError(f"{file}: split {key!r}: {error}") from error
    return EvalLog(path=str(file), splits=found)
