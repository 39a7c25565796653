"""Files are whole or absent, their own, and as open as the umask says; a broken one is named in one line."""

import json
import os
import stat
from multiprocessing import get_context

import pytest

from mech_unlearn.files import claim, inside, parse_json, read_json, replacing, write_atomic, write_json


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_what_is_written_is_as_open_as_the_umask_says_whoever_writes_it(tmp_path, umask):
    def private(part):
        part.unlink()
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does

    with replacing(tmp_path / "weights") as part:
        private(part)
    write_atomic(tmp_path / "text", "x")
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("weights", "text")} == {0o666 & ~umask}


def test_a_file_that_could_not_be_finished_is_absent_and_the_one_before_stays(tmp_path):
    write_atomic(tmp_path / "a.txt", "before")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.txt") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "before"


@pytest.mark.parametrize("planted", [".a.json.partial", "a.json.partial", "a.json"])
def test_a_planted_link_is_not_written_through(tmp_path, planted):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / planted).symlink_to(tmp_path / "theirs")
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert not (tmp_path / "a.json").is_symlink() and read_json(tmp_path / "a.json") == {"a": 1}


def write_often(path, tag):
    for _ in range(100):
        write_json(path, [tag] * 2000)


@pytest.mark.slow
def test_of_two_writers_of_one_file_each_reader_sees_the_whole_of_one(tmp_path):
    path, context = tmp_path / "a.json", get_context("fork")
    write_json(path, [])
    writers = [context.Process(target=write_often, args=(path, tag)) for tag in (1, 22222)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert len(set(read_json(path))) <= 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_text_is_written_as_utf_8_whatever_the_locale(tmp_path):
    write_json(tmp_path / "a.json", {"ü": "\u2028"})
    assert json.loads((tmp_path / "a.json").read_bytes().decode("utf-8")) == {"ü": "\u2028"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("", "Expecting"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("[" * 200_000, "nested too deep"),
    ],
)
def test_json_that_cannot_be_meant_is_refused_and_a_file_of_it_is_named(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json: not JSON: .*{reason}"):
        read_json(tmp_path / "a.json")


def test_a_file_of_a_folder_lies_in_it(tmp_path):
    folder = tmp_path / "run"
    (folder / "cells").mkdir(parents=True)
    (tmp_path / "secret.json").write_text("{}")
    (folder / "link.json").symlink_to(tmp_path / "secret.json")
    (folder / "own.json").write_text("{}")
    (folder / "alias.json").symlink_to(folder / "own.json")
    for name in ("own.json", "alias.json", "cells/../own.json", "absent.json"):
        assert inside(folder, name) == folder / name
    for name in ("link.json", "cells/../../secret.json", "../secret.json", str(tmp_path / "secret.json")):
        with pytest.raises(ValueError, match="leads out of"):
            inside(folder, name)


def test_a_folder_is_claimed_once_and_a_damaged_claim_is_named(tmp_path):
    assert claim(tmp_path / "f", {"of": "a"}) == claim(tmp_path / "f", {"of": "a"}) == tmp_path / "f"
    with pytest.raises(ValueError, match="of differ"):
        claim(tmp_path / "f", {"of": "b"})
    (tmp_path / "f" / "manifest.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"manifest\.json: not JSON"):
        claim(tmp_path / "f", {"of": "a"})
