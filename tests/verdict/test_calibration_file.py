"""A calibration that is damaged judges nobody: it is refused in one line that names the file and the field."""

import json
from random import Random

import numpy as np
import pytest

from mech_unlearn.verdict.calibration import SHIPPED, load, save
from mech_unlearn.verdict.features import FEATURES
from tests.damage import altered, assert_result_or_one_line, damaged

WHOLE = next(SHIPPED.glob("*.json"))


def test_what_ships_is_read_and_comes_back_as_it_was(tmp_path):
    save(load(WHOLE), tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(WHOLE.read_text())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"far": float("nan")}, "field 'far'"),
        ({"far": None}, "field 'far'"),
        ({"bias": [0.0]}, r"bias is \(1,\), not"),
        ({"weights": [[1.0], [1.0, 2.0]]}, "weights|inhomogeneous"),
        ({"kinds": []}, "field 'kinds'"),
        ({"scores": {}}, "suppressed missing"),
        ({"scores": {"suppressed": {"late": {"a": []}}}}, "field 'scores.suppressed.late.a'"),
        ({"spread": {}}, "missing from scores or spread"),
        ({"provenance": {"left_out": ["nothing"]}}, "field 'provenance.left_out.0'"),
        ({"provenance": {"false_deleted": {"value": 0.1}}}, "field 'provenance.false_deleted.ci'"),
        ({"scaler": []}, "field 'scaler'"),
    ],
)
def test_a_field_that_cannot_be_meant_is_named(tmp_path, change, reason):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(json.loads(WHOLE.read_text()) | change))
    with pytest.raises(ValueError, match=reason) as error:
        load(path)
    assert str(path) in str(error.value) and str(error.value).endswith("make it anew")


def test_a_spread_of_zero_is_refused(tmp_path):
    data = json.loads(WHOLE.read_text())
    data["scaler"]["scale"][0] = 0.0
    (tmp_path / "c.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"field 'scaler\.scale\.0"):
        load(tmp_path / "c.json")


@pytest.mark.slow
def test_a_file_damaged_anywhere_gives_a_calibration_that_judges_or_one_line_that_names_it(tmp_path):
    random, path, text = Random(0), tmp_path / "c.json", WHOLE.read_bytes()
    x = np.full((2, len(FEATURES)), 0.5)
    for number in range(240):
        if number % 4:
            path.write_text(json.dumps(altered(json.loads(text), random)))
        else:
            path.write_bytes(damaged(text, random))
        made = assert_result_or_one_line(lambda: load(path), path)
        if made is not None:
            assert len(made.judge(x).labels) == 2 and made.describe() and made.least_p()
            assert all(np.isfinite(p).all() for p in made.p_values(x).values())
