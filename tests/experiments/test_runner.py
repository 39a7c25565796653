"""What experiments share: cells are files, what lacks is named, packed cells are the same."""

import pytest

from experiments.runner import Cells, command_line, pack, unpack, write_results


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
