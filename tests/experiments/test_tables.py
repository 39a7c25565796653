"""Numbers in tables: what was not measured is a dash, and what rounds to zero keeps its order of magnitude."""

import pytest

from experiments.tables import number, small, table


@pytest.mark.parametrize(
    "value, ci, plain, shown",
    [
        (0.126, [0.1, 0.2], "0.13 [0.10, 0.20]", "0.13 [0.10, 0.20]"),
        (0.0, [0.0, 0.01], "0.00 [0.00, 0.01]", "0.00 [0.00, 0.01]"),
        (1e-36, [0.0, 1e-30], "0.00 [0.00, 0.00]", "1e-36 [0.00, 0.00]"),
        (-0.004, None, "-0.00", "-4e-03"),
        (0.75, None, "0.75", "0.75"),
        (None, [0.0, 1.0], "–", "–"),
    ],
)
def test_a_number_stands_with_its_interval(value, ci, plain, shown):
    measured = {"value": value, "ci": ci}
    assert number(measured) == plain and small(measured) == shown


def test_what_was_not_measured_is_said_to_be_lacking():
    assert (number(None), number({}), number(None, lacking=""), small(None)) == ("–", "–", "", "–")
    assert number({"value": 0.12345, "ci": [0.1, 0.2]}, 3) == "0.123 [0.100, 0.200]"


def test_a_table_has_a_column_for_each_head():
    assert table(("a", "b"), [[1, "x"], [2.5, "y"]]) == ["| a | b |", "|---|---|", "| 1 | x |", "| 2.5 | y |"]
