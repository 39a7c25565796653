"""A run directory goes on where it stopped, never half-written, and refuses a folder that is not its own."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from mech_unlearn.files import write_json
from mech_unlearn.run import data_hash, open_run, peak_rss_mib, say, side_by_side

ROW = {"name": "full", "verdicts": None}


def test_a_finished_cell_is_never_computed_again(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"row": ROW, "records": [{"test": "uds"}], "verdicts": []}

    for _ in range(2):
        cell = open_run(tmp_path / "run", {"command": "demo", "seed": 0}).cell("full", compute)
    assert calls == [1] and cell["records"] == [{"test": "uds"}]


def test_an_interrupted_cell_leaves_nothing_and_is_computed_again(tmp_path):
    run = open_run(tmp_path / "run", {"seed": 0})

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.cell("full", broken)
    assert not (run.folder / "cells").exists()
    assert run.cell("full", lambda: {"row": ROW})["row"] == ROW


def refuse():
    raise ValueError("fact 'a' has one distractor")


def test_refused_input_leaves_nothing_that_would_refuse_the_corrected(tmp_path):
    run = open_run(tmp_path / "run", {"facts": "bad"})
    write_json(run.folder / "provenance.json", {})
    with pytest.raises(ValueError, match="one distractor"):
        run.cell("full", refuse)
    assert not run.folder.exists()
    assert open_run(tmp_path / "run", {"facts": "good"}).cell("full", lambda: {"row": ROW})["row"] == ROW


def test_what_is_finished_outlives_a_refused_cell(tmp_path):
    run = open_run(tmp_path / "run", {"facts": "a"})
    run.cell("full", lambda: {"row": ROW})
    with pytest.raises(ValueError, match="one distractor"):
        run.cell("unlearned", refuse)
    assert run.has("full") and (run.folder / "spec.yaml").is_file()


def test_another_spec_in_the_same_folder_is_refused_by_what_differs(tmp_path):
    open_run(tmp_path / "run", {"seed": 0, "facts": "a", "dtype": "float32"})
    with pytest.raises(ValueError, match=r"another spec \(layers, seed differ\)"):
        open_run(tmp_path / "run", {"seed": 1, "facts": "a", "dtype": "float32", "layers": [1]})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "spec.yaml").write_text("- mine")
    with pytest.raises(ValueError, match=r"spec.yaml that is no run's"):
        open_run(tmp_path / "notes", {"seed": 0})


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        open_run(tmp_path, {"seed": 0})
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_summary_holds_the_rows_and_every_record_is_one_line(tmp_path):
    run = open_run(tmp_path / "run", {"seed": 0})
    cells = [{"row": ROW, "records": [{"x": 1.0}, {"x": float("nan")}], "verdicts": [{"fact_id": "a"}]}]
    summary = run.finish("demo", "biographies", cells)
    assert summary == json.loads((run.folder / "summary.json").read_text())
    assert summary["rows"] == [ROW] and summary["peak_rss_mib"] > 0
    lines = (run.folder / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"x": 1.0}, {"x": None}]
    assert json.loads((run.folder / "verdicts.json").read_text()) == {"full": [{"fact_id": "a"}]}


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": [float("inf"), 1.5], "b": {"c": float("nan")}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.5], "b": {"c": None}}


def test_the_data_hash_changes_with_any_fact(tiny_sets):
    forget, retain = tiny_sets
    assert data_hash(forget.facts) == data_hash(forget.facts)
    assert data_hash(forget.facts) != data_hash(forget.facts[1:])
    assert data_hash(forget.facts) != data_hash(retain.facts)


def slow_square(number):
    if number < 0:
        raise ValueError("no root")
    time.sleep(0.1 * number)
    return number**2, torch.get_num_threads(), os.getpid()


def touch(path):
    if path.name == "fails":
        raise ValueError("failed")
    time.sleep(0.2)
    path.touch()


@pytest.mark.slow
def test_every_name_is_worked_on_once_in_other_processes_of_one_thread_each():
    found = dict(side_by_side([2, 0, 1], slow_square, workers=2))
    assert {number: square for number, (square, *_) in found.items()} == {0: 0, 1: 1, 2: 4}
    assert {threads for _, threads, _ in found.values()} == {1}
    assert os.getpid() not in {process for *_, process in found.values()}
    assert list(side_by_side([], slow_square, workers=2)) == []


@pytest.mark.slow
def test_what_a_cell_raises_ends_the_run_and_what_has_not_begun_is_not_begun(tmp_path):
    names = [tmp_path / "fails", *(tmp_path / str(i) for i in range(40))]
    with pytest.raises(ValueError, match="failed"):
        list(side_by_side(names, touch, workers=1))
    assert len(list(tmp_path.iterdir())) < 10


def hold(mebibytes):
    return len(bytearray(mebibytes << 20))


@pytest.mark.slow
def test_memory_is_that_of_this_process_and_its_workers_and_not_what_a_started_program_inherits():
    code = (
        "import subprocess; from mech_unlearn.run import peak_rss_mib; from tests.test_run import hold;"
        "before = peak_rss_mib(); hold(300); subprocess.run(['true']); print(before, peak_rss_mib())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(float, told.split())
    assert 250 < after - before < 350
    small = peak_rss_mib()
    list(side_by_side([300, 300], hold, workers=2, method="fork"))
    assert peak_rss_mib() - small > 500


def inherit(state):
    INHERITED.append(state)
    say(f"have {type(state).__name__}")


INHERITED = []


def read_inherited(name):
    return INHERITED[-1][name]()


def die(name):
    os.kill(os.getpid(), 9)


def test_forked_processes_inherit_what_cannot_be_pickled_and_say_what_they_do():
    said = []
    state = {"a": lambda: 1, "b": lambda: 2}
    ran = side_by_side(["a", "b"], read_inherited, method="fork", setup=inherit, given=(state,), log=said.append)
    assert dict(ran) == {"a": 1, "b": 2} and set(said) == {"have dict"} and not INHERITED


def test_a_process_that_is_killed_ends_the_run_by_name():
    with pytest.raises(RuntimeError, match="a process was killed; not finished: 'x'"):
        list(side_by_side(["x"], die, workers=1))
