"""Experiments 004 and 005 in their quick form: they run end to end, and exact references never know the forgotten."""

import json
import subprocess
import sys

import pytest

from tests.paths import ROOT, SHARED_DATA

NUMBER = {"value", "ci", "n", "unit"}


@pytest.mark.slow
@pytest.mark.parametrize("name, folder", [("004_tofu", "tofu"), ("005_trex", "trex")])
def test_a_quick_run_ends_with_references_that_never_knew_the_forgotten(name, folder, tmp_path):
    if not (SHARED_DATA / folder).is_dir():
        pytest.skip(f"the published files are not in {SHARED_DATA / folder}")
    command = [sys.executable, "-m", f"experiments.{name}.run", str(tmp_path / "work")]
    given = [*command, "--quick", "--data", str(SHARED_DATA / folder)]
    subprocess.run(given, cwd=ROOT, check=True, capture_output=True, timeout=1200)
    results = tmp_path / "work" / "results"
    summary = json.loads((results / "summary.json").read_text())
    assert len(list(results.glob("*.png"))) >= 4 and (results / "tables.md").stat().st_size > 1000
    for found in summary["sisa"].values():
        out = {model: part["forget"]["recall"]["value"] for model, part in found["outputs"].items()}
        kept = {model: part["kept"]["tokens"]["value"] for model, part in found["outputs"].items()}
        assert out["full"] >= 0.8 and min(kept["full"], kept["retrained"]) >= 0.9
        assert out["retrained"] <= out["full"] / 2 and out["sisa"] <= out["full"] / 2
    rows = {(row["size"], row["name"]): row for row in summary["rows"]}
    for (_, row), found in rows.items():
        assert NUMBER.issubset(found["forget_recall"]) and found["forget_recall"]["n"] > 0
        if row == "full" and found["verdicts"]:
            assert found["verdicts"]["intact"]["value"] == 1
        if row == "last_layer_ascent" and found["verdicts"]:
            assert found["verdicts"]["deleted"]["value"] <= 0.5
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "cells").iterdir()}
    subprocess.run(given, cwd=ROOT, check=True, capture_output=True, timeout=600)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "cells").iterdir()}
