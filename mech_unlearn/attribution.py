"""Attribution: where something is, as a tensor of scores with labelled axes that saves and draws itself.

A little over 300 lines, so that one file holds what a result is, how it is read and how it is drawn.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from mech_unlearn.core import Fact
from mech_unlearn.files import first_error, read_json, replacing, write_json


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Where something is: a tensor of scores with named, labelled axes.

    `values[i, j]` belongs to `labels[axes[0]][i]` and `labels[axes[1]][j]`. `low` and `high` bound the
    95 % interval of each value over the `n` facts (None where a value was not averaged).
    """

    name: str
    values: Tensor
    axes: tuple[str, ...]
    labels: Mapping[str, tuple[Any, ...]]
    unit: str
    n: int
    low: Tensor | None = None
    high: Tensor | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.values.ndim != len(self.axes) or self.labels.keys() != set(self.axes):
            raise ValueError(
                f"{self.name}: {self.values.ndim} dimensions but axes {self.axes}, labels of {(*self.labels,)}"
            )
        for axis, size in zip(self.axes, self.values.shape, strict=True):
            if len(self.labels[axis]) != size:
                raise ValueError(f"{self.name}: axis {axis!r} has {size} entries, {len(self.labels[axis])} labels")
        for bound in (self.low, self.high):
            if bound is not None and bound.shape != self.values.shape:
                raise ValueError(
                    f"{self.name}: a bound of shape {tuple(bound.shape)}, values {tuple(self.values.shape)}"
                )

    def top(self, k: int) -> list[tuple[dict[str, Any], float]]:
        """The k largest values with their labels, largest first; NaN never counts.

        Raises:
            ValueError: k below 0.
        """
        if k < 0:
            raise ValueError(f"{self.name}: the top {k} values were asked for; give 0 or more")
        flat = self.values.flatten().nan_to_num(nan=float("-inf"))
        best = flat.topk(min(k, int(flat.isfinite().sum())))
        return [
            ({axis: self.labels[axis][int(i)] for axis, i in zip(self.axes, at, strict=True)}, value.item())
            for value, at in zip(
                best.values, torch.stack(torch.unravel_index(best.indices, self.values.shape), 1), strict=True
            )
        ]

    def __repr__(self) -> str:
        axes = " x ".join(f"{axis} {len(self.labels[axis])}" for axis in self.axes)
        return f"Attribution({self.name!r}: {axes}; {self.unit}; n = {self.n})"

    def mean(self, facts: Sequence[Fact]) -> "Attribution":
        """Mean over the first axis (one entry per fact), leaving out NaN, with a 95 % interval.

        The interval is normal and its variance cluster-robust, (G / (G - 1)) / n^2 * sum over groups of the squared sum
        of residuals, because facts about one subject are not independent. Source: Liang and Zeger 1986, Biometrika 73,
        eq. 2, with the usual small-sample factor. NaN where only one group has a value.
        """
        values = self.values.double()
        known = ~values.isnan()
        count = known.sum(0)
        mean = values.nan_to_num().sum(0) / count
        residual = torch.where(known, values - mean, 0.0)
        names = [fact.group or fact.subject for fact in facts]
        order = {name: i for i, name in enumerate(dict.fromkeys(names))}
        index = torch.tensor([order[name] for name in names])

        def by_group(x: Tensor) -> Tensor:
            return torch.zeros(len(order), *x.shape[1:], dtype=torch.float64).index_add(0, index, x.double())

        groups = (by_group(known) > 0).sum(0)
        variance = by_group(residual).square().sum(0) / count**2 * groups / (groups - 1)
        half = 1.96 * variance.masked_fill(groups < 2, float("nan")).sqrt()
        return Attribution(
            name=self.name,
            values=mean.float(),
            axes=self.axes[1:],
            labels={axis: self.labels[axis] for axis in self.axes[1:]},
            unit=self.unit,
            n=len(facts),
            low=(mean - half).float(),
            high=(mean + half).float(),
            note=f"{self.note}; {INTERVAL} ({len(order)} groups)",
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw on a matplotlib axis, a new one if none is given: a curve, a heatmap, or bars of the largest values
        where an axis is long. Gives the axis back."""
        return draw(self, new_axis() if ax is None else ax)

    def _repr_html_(self) -> str:
        """The figure and the largest values, for Jupyter."""
        return as_html(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write as JSON, atomically."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Attribution":
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, or not an attribution.
        """
        data = read_json(Path(path))
        try:
            return cls.from_json(data)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is no attribution: {error}") from error

    def to_frame(self):
        """A pandas frame with one row per value."""
        import pandas as pd

        index = pd.MultiIndex.from_product([self.labels[a] for a in self.axes], names=list(self.axes))
        columns = {"value": self.values.flatten().tolist()}
        if self.low is not None and self.high is not None:
            columns |= {"low": self.low.flatten().tolist(), "high": self.high.flatten().tolist()}
        return pd.DataFrame(columns, index=index).reset_index()

    def to_json(self) -> dict[str, Any]:
        """A plain dict of JSON values (NaN may be written as null); `from_json` gives the same Attribution back."""
        tensors = {
            key: None if (value := getattr(self, key)) is None else value.tolist() for key in ("values", "low", "high")
        }
        return {
            "name": self.name,
            "axes": list(self.axes),
            "labels": {axis: list(labels) for axis, labels in self.labels.items()},
            "unit": self.unit,
            "n": self.n,
            "note": self.note,
            **tensors,
        }

    @classmethod
    def from_json(cls, data: Any) -> "Attribution":
        """What `to_json` wrote.

        Raises:
            ValueError: a field that is missing, unknown or of another type, or shapes that do not fit.
        """
        try:
            saved = _Saved.model_validate(data)
        except ValidationError as error:
            raise ValueError(first_error(error)) from None
        labels = {axis: tuple(values) for axis, values in saved.labels.items()}
        tensors: dict[str, Any] = {key: _tensor(getattr(saved, key)) for key in ("values", "low", "high")}
        told = {key: getattr(saved, key) for key in ("name", "unit", "n", "note")}
        return cls(axes=tuple(saved.axes), labels=labels, **told, **tensors)


class _Saved(BaseModel):
    """The JSON of an Attribution."""

    model_config = ConfigDict(strict=True, extra="forbid")
    name: str
    axes: list[str]
    labels: dict[str, list[str | int | float | None]]
    unit: str
    n: int
    note: str
    values: list[Any] | float
    low: list[Any] | float | None
    high: list[Any] | float | None


def _tensor(values: Any) -> Tensor | None:
    """Nested lists as a tensor, null as NaN."""
    import numpy as np

    try:
        return None if values is None else torch.from_numpy(np.array(values, dtype=np.float32))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"values that are no array of numbers: {error}") from None


INTERVAL = "95 % normal interval, cluster-robust over groups of facts"


CYCLE = ("#4a6fa5", "#c8553d", "#3b7a57", "#8e6c8a", "#d19a2a", "#5b8e9c", "#7f7f7f", "#a05a2c")


def heatmap(result: Attribution, ax: Any) -> Any:
    """A two-axis Attribution, first axis downwards, unit on the colour bar; rows without a value are left out."""
    rows, columns = result.axes
    kept = (~result.values.isnan().all(1)).nonzero()[:, 0].tolist()
    values = result.values[kept]
    low = min(0.0, values.nan_to_num().min().item())
    image = ax.imshow(values.numpy(), aspect="auto", cmap="magma", vmin=low)
    ax.set_yticks(range(len(kept)), [str(result.labels[rows][i]) for i in kept])
    ax.set_xticks(range(len(result.labels[columns])), [str(x) for x in result.labels[columns]])
    ax.set_xlabel(columns)
    ax.set_title(_title(result), loc="left")
    ax.figure.colorbar(image, ax=ax, label=textwrap.fill(result.unit, 34))
    return ax


def curve(result: Attribution, ax: Any, label: str | None = None) -> Any:
    """A one-axis Attribution as a line with its 95 % band."""
    (axis,) = result.axes
    x = range(len(result.labels[axis]))
    (line,) = ax.plot(x, result.values.numpy(), marker="o", label=label or result.name)
    if result.low is not None and result.high is not None:
        ax.fill_between(x, result.low.numpy(), result.high.numpy(), alpha=0.2, color=line.get_color())
    ax.set_xticks(list(x), [str(v) for v in result.labels[axis]])
    ax.set_xlabel(axis)
    ax.set_ylabel(result.unit)
    ax.set_title(_title(result), loc="left")
    return ax


def _title(result: Attribution) -> str:
    return textwrap.fill(f"{result.name} (n = {result.n})", 40)


WIDE = 64
"""Labels of an axis above which single cells can no longer be read."""


def top_bars(result: Attribution, ax: Any, k: int = 20) -> Any:
    """The k largest values with their 95 % intervals, for results with a long axis (neurons, latents)."""
    best = result.top(k)
    places = [tuple(result.labels[axis].index(at[axis]) for axis in result.axes) for at, _ in best]
    values = [value for _, value in best]
    names = ["  ".join(f"{axis} {at[axis]}" for axis in result.axes) for at, _ in best]
    ax.barh(range(len(best)), values, color=CYCLE[0])
    if result.low is not None and result.high is not None:
        reach = [
            [max(0.0, v - result.low[p].item()) for p, v in zip(places, values, strict=True)],
            [max(0.0, result.high[p].item() - v) for p, v in zip(places, values, strict=True)],
        ]
        ax.errorbar(values, range(len(best)), xerr=reach, fmt="none", color="#222222", capsize=2, lw=1)
    ax.set_yticks(range(len(best)), names, fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel(result.unit)
    ax.set_title(_title(result), loc="left")
    return ax


def draw(result: Attribution, ax: Any) -> Any:
    """A curve for one short axis, a heatmap for two, bars of the largest values otherwise."""
    short = all(len(result.labels[axis]) <= WIDE for axis in result.axes)
    if short and len(result.axes) == 1:
        return curve(result, ax)
    return heatmap(result, ax) if short and len(result.axes) == 2 else top_bars(result, ax)


def side_by_side(results: Sequence[Attribution], figure: Any) -> Any:
    """One panel per result, in a row, on a matplotlib figure."""
    for result, ax in zip(results, figure.subplots(1, len(results), squeeze=False)[0], strict=True):
        draw(result, ax)
    return figure


def new_axis(size: tuple[float, float] = (7.5, 4.2)) -> Any:
    """An axis on a new figure that needs no display."""
    return _figure(size).add_subplot()


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_html(result: Attribution, k: int = 10) -> str:
    """The figure of a result and a table of its largest values, as one piece of HTML."""
    import base64
    import html
    import io

    buffer = io.BytesIO()
    draw(result, new_axis()).figure.savefig(buffer, dpi=100, format="png")
    rows = [(*(at[axis] for axis in result.axes), f"{value:.4f}") for at, value in result.top(k)]
    table = as_table((*result.axes, result.unit), rows, f"n = {result.n}; {result.note}")
    picture = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{picture}" alt="{html.escape(result.name)}">{table}'


def as_table(header: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> str:
    """A table as HTML with a line below it; all that stands in it is escaped, as models and users wrote some of it."""
    import html

    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table>{line(header, 'th')}{body}</table><p>{html.escape(note)}</p>"


def save(path: Path, draw_on: Any, size: tuple[float, float] = (7.5, 4.2)) -> Path:
    """Draw on a fresh axis and write a PNG, atomically; no display is needed."""
    ax = new_axis(size)
    draw_on(ax)
    with replacing(path) as part:
        ax.figure.savefig(part, dpi=130)
    return path
