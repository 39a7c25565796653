"""An option stands once: a field of the command's type, an option on the command line, a key of the run's spec."""

from dataclasses import fields
from pathlib import Path

import pytest
import typer

from mech_unlearn.commands import options
from mech_unlearn.commands.audit import UNSPECIFIED as UNSPECIFIED_AUDIT
from mech_unlearn.commands.bench import UNSPECIFIED as UNSPECIFIED_BENCH
from mech_unlearn.commands.cli import app
from mech_unlearn.commands.options import AuditOptions, LocateOptions, spec_of

COMMANDS = {
    name: getattr(options, f"{name.capitalize()}Options")
    for name in ("demo", "locate", "unlearn", "audit", "calibrate", "bench")
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_fields_of_a_commands_type_are_its_options_and_the_other_way_round(name):
    command = typer.main.get_command(app).commands[name]
    told = {p.name: p for p in command.params if p.name not in ("help",)}
    own = {f.name: f for f in fields(COMMANDS[name])}
    assert told.keys() == own.keys()
    for parameter in told.values():
        assert parameter.help, parameter.name


def test_shared_options_have_one_help_in_all_commands():
    commands = typer.main.get_command(app).commands
    for shared in ("device", "dtype", "seed", "as_json"):
        helps = {p.help for name in COMMANDS for p in commands[name].params if p.name == shared}
        assert len(helps) == 1, shared


def test_a_spec_holds_what_was_asked_and_not_where_it_is_written():
    asked = LocateOptions(model="m", facts=Path("f.jsonl"), how="probe", out=Path("x"), settings=["k=1"], seed=3)
    spec = spec_of("locate", asked, settings={"k": 1})
    assert spec["command"] == "locate" and spec["facts"] == "f.jsonl" and spec["settings"] == {"k": 1}
    assert spec["seed"] == 3 and spec["unknown"] is None and not {"out", "as_json"} & spec.keys()
    audit = AuditOptions(full="a", unlearned="b", facts=Path("f"), texts=Path("t"))
    assert "texts" not in spec_of("audit", audit, ("texts",)) and spec_of("audit", audit)["retrained"] == []


def test_a_file_or_folder_is_the_same_by_relative_and_absolute_path_and_a_hub_id_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("full", "late", "r", "probe"):
        (tmp_path / name).mkdir()
    (tmp_path / "f.jsonl").touch()

    def spec(root):
        asked = dict(full=f"{root}full", unlearned=f"{root}late", retrained=[f"{root}r", "owner/name"])
        return spec_of("audit", AuditOptions(**asked, facts=Path(f"{root}f.jsonl"), sae="release/id"))

    assert spec("") == spec("./") == spec(f"{tmp_path}/")
    assert spec("")["retrained"] == [str(tmp_path / "r"), "owner/name"] and spec("")["sae"] == "release/id"
    assert spec_of("locate", LocateOptions(model="m", facts=Path("f"), how="probe"))["how"] == "probe"


KEYS = {
    "demo": "command world seed",
    "locate": "command model facts how settings seed unknown retain texts sae device dtype",
    "unlearn": "command model forget retain method settings unseen sequential sae seed unknown texts device dtype",
    "audit": "command full unlearned retrained facts retain sae seed calibration device dtype tests",
    "bench": "command benchmark data settings limit full unlearned retrained sae seed tests calibration device dtype",
}
"""What a run of each command has stood under since runs resume; another key would make old runs another's."""
ASKED = {
    "demo": {},
    "locate": dict(model="m", facts=Path("f"), how="probe"),
    "unlearn": dict(model="m", forget=Path("f"), retain=Path("r"), method="rocr", out=Path("o")),
    "audit": dict(full="a", unlearned="b", facts=Path("f")),
    "bench": dict(name="tofu"),
}
WITHOUT = {"audit": UNSPECIFIED_AUDIT, "bench": UNSPECIFIED_BENCH}


@pytest.mark.parametrize("name", KEYS)
def test_a_spec_has_the_keys_by_which_runs_resume(name):
    more = {"benchmark": "tofu"} if name == "bench" else {}
    spec = spec_of(name, COMMANDS[name](**ASKED[name]), WITHOUT.get(name, ()), **more)
    assert set(spec) == set(KEYS[name].split())
