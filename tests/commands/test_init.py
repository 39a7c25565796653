"""`init`: files that the other commands read as they are, and that are never written over."""

import pytest

from mech_unlearn.commands.init import FORGET, RETAIN, init, samples
from mech_unlearn.commands.inputs import entities, read_lines
from mech_unlearn.data.checking import findings
from mech_unlearn.data.jsonl import load_facts
from tests.commands.test_cli import refused


def test_the_samples_are_read_as_they_are_and_nothing_about_them_is_odd(tmp_path):
    files = {path.name: path for path in init(tmp_path / "new")}
    forget, retain = load_facts(files["forget.jsonl"]), load_facts(files["retain.jsonl"])
    assert forget == samples(FORGET) and retain == samples(RETAIN)
    assert findings(forget, retain) == ()
    assert all(e.kind == "country" for e in entities(files["unknown.txt"], forget))
    assert len(read_lines(files["texts.txt"])) == 8 and all(line[0] != "#" for line in read_lines(files["texts.txt"]))
    for name in ("forget.jsonl", "retain.jsonl", "unknown.txt"):
        assert files[name].read_text().startswith("# ")
    for word in ("forget.jsonl", "retain.jsonl", "texts.txt", "facts check", "audit"):
        assert word in files["README.md"].read_text()


def test_the_command_names_the_files(tmp_path, call):
    status, out, _ = call("init", tmp_path)
    assert status == 0 and out.count(str(tmp_path)) == 6 and (tmp_path / "README.md").exists()
    refused(call("init", tmp_path), "forget.jsonl")


def test_a_folder_that_holds_one_of_the_files_is_left_alone(tmp_path):
    (tmp_path / "retain.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="holds retain.jsonl already; name another folder"):
        init(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["retain.jsonl"]
