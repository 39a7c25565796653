"""Each case's two ways give the same numbers, on small models; a ratio of unequal results measures nothing."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from speed import activation_patching
from speed.__main__ import CASES, NAMES, main, wanted
from speed.run import Case, error, measure, peak_here
from speed.shapes import SHAPES, Shape
from tests.paths import ROOT

SMALL = {
    "gpt2_small": Shape(architecture="gpt2", layers=5, width=48, heads=6, vocabulary=300),
    "llama_gqa": Shape(architecture="llama", layers=5, width=48, heads=6, vocabulary=300),
}


@pytest.mark.thorough
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_ours_gives_what_the_reference_gives(name, shape):
    case = CASES[name]
    if case.lacks:
        pytest.skip(case.lacks)
    expected, found = case.finish(case.plain(SMALL[shape])()), case.ours(SMALL[shape])()
    assert error(found, expected) <= 1e-5
    assert expected.abs().max() > 1e-6 and expected.std() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.frugal])
def test_memory_is_measured_on_something_that_gives_the_same(name):
    shape = SMALL["llama_gqa"]
    assert error(CASES[name].frugal(shape)(), CASES[name].ours(shape)()) <= 1e-6


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["causal_tracing", "knowledge_neurons", "uds_one_source", "capture"])
def test_the_comparison_notices_a_model_with_other_weights(name, monkeypatch):
    shape = SMALL["llama_gqa"]
    expected, bare = CASES[name].plain(shape)(), Shape.bare
    monkeypatch.setattr(Shape, "bare", lambda self, seed=0: bare(self, seed + 10))
    assert error(CASES[name].ours(shape)(), expected) > 1e-2


def test_the_parts_give_what_the_locator_gives_where_a_class_is_one_token():
    shape = SMALL["gpt2_small"]
    after, changes = activation_patching.ours(shape)(), activation_patching.classes(shape)()
    last_subject, last = changes[2], changes[5]
    before = (after[:, 11] - last).mean()  # each patched score less its change
    assert torch.allclose(after[:, 4] - before, last_subject, atol=1e-5)
    assert torch.allclose(after[:, 11] - before, last, atol=1e-5)


def test_a_row_has_the_fixed_keys_and_a_ratio_of_reference_over_ours(monkeypatch):
    monkeypatch.setattr("speed.run.peak_in_child", lambda name: peak_here(name, slow))
    slow = Case(reference="a loop", plain=lambda _: slowly, ours=lambda _: quickly)
    row = measure("x/gpt2_small", slow, repeats=3)
    found = json.loads(row.as_json())
    keys = ["name", "ratio", "reference", "reference_s", "ours_s", "max_rel_error", "peak_mib"]
    assert list(found) == keys and found["name"] == "x/gpt2_small" and found["reference"] == "a loop"
    assert found["ratio"] == pytest.approx(found["reference_s"] / found["ours_s"]) and found["ratio"] > 2
    assert found["max_rel_error"] == 0.5


def slowly():
    time.sleep(0.05)
    return torch.tensor([1.0, -2.0])


def quickly():
    return torch.tensor([1.0, -1.0])


@pytest.mark.slow
def test_memory_counts_what_is_held_while_it_runs():
    """In a fresh process: an old one may fill memory that it had before."""
    fill = (
        "import torch; from speed.run import Case, peak_here\n"
        "def fill(): return torch.ones(2**24)\n"  # 64 MiB
        "peak = peak_here('x/gpt2_small', Case(reference='', plain=lambda _: fill, ours=lambda _: fill))\n"
        "print(peak.growth_mib, peak.peak_mib)"
    )
    done = subprocess.run([sys.executable, "-c", fill], cwd=ROOT, capture_output=True, text=True, check=True)
    growth, peak = map(float, done.stdout.split())
    assert 60 <= growth <= 80 and peak > growth


def test_results_of_other_shapes_or_with_nan_are_refused():
    for wrong in (torch.ones(3), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="differ in shape or are not finite"):
            error(wrong, torch.ones(2))


def test_a_case_whose_data_is_missing_says_so_and_is_skipped(tmp_path, monkeypatch, capsys):
    there, gone = tmp_path / "log.json", tmp_path / "gone.json"
    there.touch()
    here = {path: replace(CASES["scoring"], data=path) for path in (there, gone)}
    assert not here[there].lacks and str(gone) in here[gone].lacks and not CASES["uds"].lacks
    monkeypatch.setitem(CASES, "scoring", here[gone])
    monkeypatch.setattr(sys, "argv", ["speed", "scoring", "--json"])
    main()
    told = capsys.readouterr()
    assert not told.out and told.err.count("skipped, its data is not there") == len(SHAPES)


def test_names_choose_cases_on_all_shapes_or_on_one():
    assert wanted([], []) == list(NAMES)
    assert wanted(["uds"], []) == ["uds/gpt2_small", "uds/llama_gqa"]
    assert wanted(["uds/llama_gqa", "capture"], ["gpt2_small"]) == ["uds/llama_gqa", "capture/gpt2_small"]
    with pytest.raises(ValueError, match="udz: choose cases of causal_tracing"):
        wanted(["udz"], [])


@pytest.mark.slow
def test_the_command_refuses_a_case_that_does_not_exist():
    done = subprocess.run([sys.executable, "-m", "speed", "udz"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "udz: choose cases of" in done.stderr
