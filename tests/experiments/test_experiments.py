"""Each experiment starts as a module, is listed with its answer, and its tables are those that its summary gives."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/run.py"))


def summary(name):
    return json.loads((ROOT / "experiments" / name / "results" / "summary.json").read_text(encoding="utf-8"))


def tables(name):
    return (ROOT / "experiments" / name / "results" / "tables.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FOLDERS)
def test_an_experiment_has_a_command_line_that_names_it(name, monkeypatch, capsys):
    module = importlib.import_module(f"experiments.{name}.run")
    monkeypatch.setattr(sys, "argv", ["run", "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    assert f"usage: python -m experiments.{name}.run" in capsys.readouterr().out
    assert f"python -m experiments.{name}.run" in module.__doc__
    readme = (ROOT / "experiments" / name / "README.md").read_text(encoding="utf-8")
    assert f"python -m experiments.{name}.run" in readme


def test_every_experiment_stands_in_the_list_of_questions_and_the_list_names_no_other():
    listed = re.findall(r"\[[^]]*\]\((\d\d\d_\w+)/README\.md\)", (ROOT / "experiments" / "README.md").read_text())
    assert sorted(set(listed)) == FOLDERS and len(FOLDERS) >= 6


@pytest.mark.parametrize("name", ["003_verdict", "004_tofu", "005_trex"])
def test_tables_are_those_that_the_summary_gives(name):
    report = importlib.import_module(f"experiments.{name}.report")
    assert report.tables(summary(name)) == tables(name)


def test_tables_of_methods_are_those_that_the_summary_gives():
    report, found = importlib.import_module("experiments.002_methods.report"), summary("002_methods")
    worlds = {
        world: {
            "chance": chance,
            "failed": found["failed"][world],
            "rows": [row for row in found["rows"] if row["world"] == world],
        }
        for world, chance in found["chance"].items()
    }
    assert report.tables(dict(sorted(worlds.items())), found["calibrated"]) == tables("002_methods")


def test_no_module_outside_of_the_package_reaches_for_the_import_path():
    for folder in ("experiments", "speed", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            told = path.read_text(encoding="utf-8")
            assert not re.search(r"sys\.path[.\[ ]|noqa: " + "E402", told), path
