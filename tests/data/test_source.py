"""Rows from files: read in every form alike; a bad file is named with row and field, in one line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mech_unlearn.data.source import Record, Text, find, read_json, read_rows, read_text


class Animal(Record):
    name: Text
    legs: str


ANIMALS = [{"name": "cat", "legs": "4"}, {"name": 'the "odd", ant', "legs": "6"}, {"name": "söl\u2028e", "legs": ""}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    ending = path.name.partition(".")[2]
    frame = pd.DataFrame(rows)
    if ending == "parquet":
        frame.to_parquet(path)
    elif ending in ("csv", "tsv"):
        frame.to_csv(path, sep="," if ending == "csv" else "\t", index=False)
    else:
        text = (
            json.dumps(rows)
            if "jsonl" not in ending
            else "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        )
        path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    return path


@pytest.mark.parametrize("ending", ["json", "jsonl", "json.gz", "jsonl.gz", "csv", "tsv", "parquet"])
def test_every_form_of_a_file_gives_the_same_rows(tmp_path, ending):
    file = write(tmp_path / f"animals.{ending}", ANIMALS)
    rows = read_rows(file, None, Animal)
    assert [row.model_dump() for row in rows] == ANIMALS
    assert read_rows(tmp_path, "animals", Animal) == rows


def test_a_json_file_may_hold_a_list_one_object_or_lines(tmp_path):
    for text, count in (
        (json.dumps(ANIMALS), 3),
        (json.dumps(ANIMALS[0], indent=1), 1),
        ("\n".join(map(json.dumps, ANIMALS)), 3),
    ):
        (tmp_path / "a.json").write_text(f"\ufeff{text}\n")  # a byte-order mark does not matter
        assert len(read_rows(tmp_path / "a.json", None, Animal)) == count


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"", "holds no rows"),
        ("a.csv", b"name,legs\n", "holds no rows"),
        ("a.json", b'[{"name": "a"', "not JSON"),
        ("a.json", b'{"name": "a",\n "legs" 4}', "line 2 column 9"),
        ("a.jsonl", b'{"name": "a", "legs": ""}\n{', "a.jsonl:2: not JSON"),
        ("a.json", b"[" * 100_000, "nested too deep"),
        ("a.json", b'[{"name": "a", "name": "b", "legs": ""}]', "key 'name' stands twice in one object"),
        ("a.json", b"[3]", "row 0: expected a JSON object, found int"),
        ("a.json", b'[{"name": " ", "legs": ""}]', "row 0: field 'name' must be a non-empty string, found ' '"),
        ("a.json", b'[{"name": "\\ud800", "legs": ""}]', "row 0: field 'name' must be text without lone surrogates"),
        ("a.json", b'[{"name": "a"}]', "row 0: field 'legs' must be given"),
        ("a.json", b"\xff\xfe[]", "not UTF-8 text: invalid start byte at byte 0"),
        ("a.json.gz", b"[]", "cannot be read: Not a gzipped file"),
        ("a.json", b"\x1f\x8b\x08", "cannot be read"),
        ("a.csv", b"name,name\na,b\n", "column 'name' stands twice"),
        ("a.csv", b"name,legs\na,b,c\n", "row 0: 3 columns, the header has 2"),
        ("a.csv", b"name,legs\na,4\nb\n", "row 1: 1 columns, the header has 2"),
        ("a.csv", b'name,legs\n"a,4\n', "not a table: unexpected end of data"),
        ("a.parquet", b"PAR1", "not a table"),
    ],
)
def test_a_bad_file_is_named_with_row_and_field(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        read_rows(tmp_path / name, None, Animal)
    assert reason in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_source_that_is_not_there_is_named_with_what_there_is(tmp_path):
    write(tmp_path / "animals.json", ANIMALS)
    for source, name, reason in (
        (tmp_path, "plants", "lacks plants.json; it holds animals.json"),
        (tmp_path, None, "is a folder; give one of its files: it holds animals.json"),
        (tmp_path / "animals.json", "animals", "is a file; give the folder of animals"),
        (tmp_path / "none.json", None, "is no file, neither a folder nor a hub id"),
        ("a" * 5_000, None, "is no file"),
        ("a\0b", None, "is no file"),
    ):
        with pytest.raises(ValueError) as error:
            read_rows(source, name, Animal)
        assert reason in str(error.value)
    for read in (read_text, read_json):
        with pytest.raises(ValueError, match="none.json does not exist"):
            read(tmp_path / "none.json")


def snapshot(root: Path, files: dict[str, list[dict[str, Any]]]) -> Path:
    """A folder laid out as the hub's datasets are."""
    for name, rows in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(root / name)
    (root / "README.md").write_text("---\nlicense: mit\n---\n")
    return root


def test_a_snapshot_of_a_hub_dataset_is_read_by_configuration_and_split(tmp_path):
    cat, ant, sole = ANIMALS
    root = snapshot(
        tmp_path,
        {
            "data/train-00000-of-00001.parquet": [cat],
            "data/test-00000-of-00001-0a1b2c3d4e5f6071.parquet": [ant],
            "small/train-00000-of-00001.parquet": [sole],
            "small/forget_qa-00000-of-00001.parquet": [ant, cat],
            "plain/train.parquet": [ant],
        },
    )
    asked = {
        (None, None, "train"): [cat],
        (None, "default", "test"): [ant],
        (None, "small", "train"): [sole],
        ("small", None, "train"): [sole],
        ("small/forget_qa", "small", "forget_qa"): [ant, cat],
        ("plain", None, "train"): [ant],
    }
    for (name, config, split), rows in asked.items():
        found = read_rows(root, name, Animal, config=config, split=split)
        assert [row.model_dump() for row in found] == rows, (name, config, split)


def test_the_shards_of_a_split_are_joined_in_their_order_and_errors_name_the_shard(tmp_path):
    rows = [{"name": f"animal {i}", "legs": str(i)} for i in range(23)]
    parts = {f"data/train-{i:05d}-of-00012.parquet": rows[2 * i : 2 * i + 2] for i in reversed(range(12))}
    root = snapshot(tmp_path, parts)
    assert [row.model_dump() for row in read_rows(root, None, Animal)] == rows
    assert [file.name[6:11] for file in find(root, None)] == [f"{i:05d}" for i in range(12)]
    pd.DataFrame([rows[6], {"name": " ", "legs": ""}]).to_parquet(root / "data/train-00003-of-00012.parquet")
    with pytest.raises(ValueError, match=r"train-00003-of-00012.parquet, row 1: field 'name'"):
        read_rows(root, None, Animal)


def test_a_snapshot_that_lacks_something_says_what_it_holds(tmp_path):
    files = ("data/train-00000-of-00002.parquet", "small/test-00000-of-00001.parquet")
    root = snapshot(tmp_path, dict.fromkeys(files, ANIMALS))
    holds = "it holds data/train, small/test"
    for name, config, split, reason in (
        (None, None, "validation", f"lacks data/validation (configuration/split); {holds}"),
        ("small", None, "train", f"lacks small/train (configuration/split); {holds}"),
        ("forget", "large", "train", f"lacks large/train (configuration/split); {holds}"),
        (None, None, "train", "lacks train-00001-of-00002.parquet; split 'train' has 2 files"),
    ):
        with pytest.raises(ValueError) as error:
            read_rows(root, name, Animal, config=config, split=split)
        assert reason in str(error.value) and "\n" not in str(error.value)
    snapshot(root, dict.fromkeys(("data/train-00000-of-00001.parquet", "data/train-00001-of-00002.parquet"), ANIMALS))
    with pytest.raises(ValueError, match="two versions of split 'train'"):
        read_rows(root, None, Animal)


def test_a_file_of_the_given_name_goes_before_a_folder_of_that_name(tmp_path):
    snapshot(tmp_path, {"animals/train-00000-of-00001.parquet": ANIMALS[:1]})
    write(tmp_path / "animals.json", ANIMALS)
    assert len(read_rows(tmp_path, "animals", Animal)) == 3
