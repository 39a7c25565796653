"""What must stand in the file of a calibration, checked before anything is made of it."""

import os
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from mech_unlearn.core import Label
from mech_unlearn.files import first_error, read_json
from mech_unlearn.verdict.features import FEATURES, RECOVERY

FORMAT = "mech_unlearn.calibration/3"
COLUMNS = 2 * len(FEATURES)
"""Each feature, and an indicator of its being missing."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(allow_inf_nan=False, gt=0)]
Numbers = Annotated[list[Number], Field(min_length=1)]


def _recovery(name: str) -> str:
    if name not in RECOVERY:
        raise ValueError(f"{name!r} is none of {', '.join(RECOVERY)}")
    return name


class Strict(BaseModel):
    """Types are what JSON says; keys that are not read may stand there."""

    model_config = ConfigDict(strict=True, extra="allow")


class Measured(Strict):
    """A number with its interval and count."""

    value: Number
    ci: Annotated[list[Number], Field(min_length=2, max_length=2)]
    n: int
    groups_with_any: "Measured | None" = None


class Provenance(Strict):
    """What is read of where a calibration comes from."""

    full: str | None = None
    world: str | None = None
    sae: str | None = None
    retrained_models: int | None = None
    left_out: list[Annotated[str, AfterValidator(_recovery)]] = Field(default_factory=list)
    fit_groups: list[str] = Field(default_factory=list)
    calibrate_groups: list[str] = Field(default_factory=list)
    false_deleted: Measured | None = None
    false_deleted_worst_family: Measured | None = None


class Standardised(Strict):
    """Medians of features; means and spreads of columns, null where a column has none and is left out."""

    median: Numbers
    mean: Numbers
    scale: list[Positive | None]


class CalibrationFile(Strict):
    """The file of a `Calibration`."""

    features: list[str]
    scaler: Standardised
    kinds: Annotated[list[str], Field(min_length=1)]
    weights: list[Numbers]
    bias: Numbers
    center: list[Numbers]
    inverse: list[Numbers]
    scores: dict[Label, dict[str, dict[str, Numbers]]]
    far: Number
    spread: dict[str, Number]
    provenance: Provenance

    @model_validator(mode="after")
    def fits(self) -> "CalibrationFile":
        """Sizes fit each other, and what is asked for by name is there."""
        kinds = len(self.kinds)
        wanted = {
            "median": (self.scaler.median, (len(FEATURES),)),
            "mean": (self.scaler.mean, (COLUMNS,)),
            "scale": (self.scaler.scale, (COLUMNS,)),
            "weights": (self.weights, (kinds, COLUMNS)),
            "bias": (self.bias, (kinds,)),
            "center": (self.center, (kinds, COLUMNS)),
            "inverse": (self.inverse, (COLUMNS, COLUMNS)),
        }
        for name, (values, shape) in wanted.items():
            if np.shape(values) != shape:
                raise ValueError(f"{name} is {np.shape(values)}, not {shape}")
        if lacks := [*({"suppressed"} - self.scores.keys()), *(set(RECOVERY) - self.spread.keys())]:
            raise ValueError(f"{', '.join(sorted(lacks))} missing from scores or spread")
        return self


def read_calibration(path: str | os.PathLike) -> CalibrationFile:
    """What stands in a calibration's file.

    Raises:
        ValueError: no such file, not JSON, not a calibration, or one of other features.
    """
    data = read_json(Path(path))
    told = data if isinstance(data, dict) else {}
    if told.get("format") != FORMAT or told.get("features") != list(FEATURES):
        raise ValueError(f"{os.fspath(path)!r} is no calibration of the features {', '.join(FEATURES)}; make it anew")
    try:
        return CalibrationFile.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"calibration {os.fspath(path)!r} is damaged: {first_error(error)}; make it anew") from error
