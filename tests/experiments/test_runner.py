"""The shared runner: every cell once, in processes of one thread; a failure ends the run; packed cells are the same."""

import os
import time

import pytest
import torch

from experiments.runner import Cells, command_line, pack, run_cells, unpack, write_results


def slow_square(number):
    if number < 0:
        raise ValueError("no root")
    time.sleep(0.1 * number)
    return number**2, torch.get_num_threads(), os.getpid(), os.environ["OMP_WAIT_POLICY"]


def touch(path):
    if path.name == "fails":
        raise ValueError("failed")
    time.sleep(0.2)
    path.touch()


def test_every_name_is_worked_on_once_in_other_processes_of_one_thread_each():
    found = dict(run_cells([2, 0, 1], slow_square, 2))
    assert {number: square for number, (square, *_) in found.items()} == {0: 0, 1: 1, 2: 4}
    assert {threads for _, threads, *_ in found.values()} == {1}
    assert os.getpid() not in {process for _, _, process, _ in found.values()}
    assert {policy for *_, policy in found.values()} == {os.environ["OMP_WAIT_POLICY"]}
    assert list(run_cells([], slow_square, 2)) == []


def test_what_a_cell_raises_ends_the_run_and_what_has_not_begun_is_not_begun(tmp_path):
    names = [tmp_path / "fails", *(tmp_path / str(i) for i in range(40))]
    with pytest.raises(ValueError, match="failed"):
        list(run_cells(names, touch, 1))
    assert len(list(tmp_path.iterdir())) < 10


def test_cells_are_files_and_one_that_is_lacking_is_told_by_name(tmp_path):
    cells = Cells(tmp_path / "cells", "variant_")
    assert cells.names() == [] and cells.get("b") is None and not cells.has("b")
    cells.put("b", {"value": 1.5})
    cells.put("a", {"value": float("nan")})
    assert cells.names() == ["a", "b"] and cells["b"] == {"value": 1.5} and cells["a"] == {"value": None}
    assert cells.path("b") == tmp_path / "cells" / "variant_b.json" and cells.has("b")
    with pytest.raises(ValueError, match="'c' is not finished in .*cells': run without --report first"):
        cells["c"]


def test_packed_values_come_back_and_make_the_same_bytes(tmp_path):
    values = [{"a": 1}, ["b", None]]
    pack(tmp_path / "x.gz", values)
    pack(tmp_path / "y.gz", unpack(tmp_path / "x.gz"))
    assert unpack(tmp_path / "y.gz") == values
    assert (tmp_path / "x.gz").read_bytes() == (tmp_path / "y.gz").read_bytes()


def test_an_experiment_has_the_options_that_it_describes_and_no_others(tmp_path, capsys):
    parser = command_line("what", tmp_path / "009_why", work="the folder", report="tables", data=(tmp_path, "files"))
    given = parser.parse_args(["w", "--report"])
    assert (str(given.work), given.report, given.workers, given.data) == ("w", True, 2, tmp_path)
    with pytest.raises(SystemExit):
        parser.parse_args(["w", "--quick"])
    assert "python -m experiments.009_why.run" in capsys.readouterr().err


def test_results_are_a_summary_and_where_there_are_any_tables(tmp_path):
    write_results(tmp_path / "one", {"a": 1})
    write_results(tmp_path / "two", {"a": 1}, "| a |\n")
    assert [path.name for path in sorted((tmp_path / "one").iterdir())] == ["summary.json"]
    assert (tmp_path / "two" / "tables.md").read_text() == "| a |\n"
