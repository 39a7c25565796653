"""WMDP: choices with their answer, corpora by name, MMLU-shaped rows; bad rows are named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_unlearn.benchmarks.wmdp.data import MultipleChoice, load_choices, load_corpus, load_wmdp

PLAIN = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20)
ROW = {"question": "Which pot is blue?", "choices": ["the first", "the second", "the third", "none"], "answer": 2}


def write(folder, name, rows):
    file = folder / name
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return file


def test_a_domain_is_its_file_and_its_name_is_the_subject(tmp_path):
    for i, domain in enumerate(("bio", "cyber", "chem")):
        write(tmp_path, f"wmdp-{domain}.json", [ROW] * (i + 1))
    wmdp = load_wmdp(tmp_path)
    assert {domain: len(rows) for domain, rows in wmdp.questions.items()} == {"bio": 1, "cyber": 2, "chem": 3}
    row = wmdp.questions["cyber"][0]
    assert row.subject == "cyber" and row.letter == "C" and row.correct == "the third" and row.letters == "ABCD"
    assert row.wrong == ("the first", "the second", "none") and row.choices == tuple(ROW["choices"])
    assert list(load_wmdp(tmp_path, ["chem"]).questions) == ["chem"]


def test_a_table_with_a_column_of_lists_gives_the_same_rows(tmp_path):
    import pandas as pd

    pd.DataFrame([ROW, ROW | {"answer": 0}]).to_parquet(tmp_path / "wmdp-bio.parquet")
    rows = load_wmdp(tmp_path, ["bio"]).questions["bio"]
    assert [row.answer for row in rows] == [2, 0] and rows[0] == MultipleChoice(**ROW, subject="bio")


def test_mmlu_rows_keep_their_own_subject(tmp_path):
    file = write(tmp_path, "all.jsonl", "\n".join(map(json.dumps, [ROW | {"subject": "anatomy"}, ROW])))
    assert [row.subject for row in load_choices(file, subject="other")] == ["anatomy", "other"]
    write(tmp_path, "wmdp-bio.json", [ROW])
    assert len(load_wmdp(tmp_path, ["bio"], general=tmp_path).general) == 2


def test_corpora_are_texts_by_name_and_one_that_was_not_loaded_is_refused(tmp_path):
    write(tmp_path, "wmdp-bio.json", [ROW])
    write(tmp_path, "bio-retain-corpus.jsonl", json.dumps({"text": "kept"}))
    lone = write(tmp_path, "any.jsonl", json.dumps({"title": "t", "abstract": "a", "text": "gone"}))
    corpora = {"bio-retain-corpus": tmp_path, "bio-forget-corpus": lone}
    wmdp = load_wmdp(tmp_path, ["bio"], corpora=corpora)
    assert wmdp.forget_texts("bio") == ("gone",) and wmdp.retain("bio").texts == ("kept",)
    assert load_corpus(lone) == ("gone",)
    with pytest.raises(ValueError, match="'cyber-forget-corpus' was not loaded; there are bio-retain-corpus"):
        wmdp.forget_texts("cyber")


@pytest.mark.parametrize(
    ("settings_", "reason"),
    [
        ({"domains": ["bio", "law"]}, "WMDP has no domain 'law'"),
        ({"domains": ["chem"]}, "lacks wmdp-chem.json"),
        ({"source": "not here"}, "no file, neither a folder nor a hub id"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_reason(tmp_path, settings_, reason):
    write(tmp_path, "wmdp-bio.json", [ROW])
    with pytest.raises(ValueError) as error:
        load_wmdp(**{"source": tmp_path, "domains": ["bio"]} | settings_)
    assert reason in str(error.value)


def test_one_file_holds_one_domain(tmp_path):
    file = write(tmp_path, "mine.json", [ROW])
    assert load_wmdp(file, ["bio"]).questions["bio"][0].subject == "bio"
    with pytest.raises(ValueError, match="name the one domain"):
        load_wmdp(file)


GOOD = {
    "question": PLAIN.filter(str.strip),
    "choices": st.lists(PLAIN, min_size=3, max_size=26),
    "answer": st.integers(0, 2),
}
BAD = {
    "question": st.sampled_from([None, 3, "", " ", ["a"], "\ud800"]),
    "choices": st.sampled_from([None, "abc", [], ["one"], ["a", 3], ["a", None], {"a": 1}, ["x"] * 27]),
    "answer": st.sampled_from([None, "2", "C", True, 1.0, -1, 99, [2], 10**30]),
}


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.fixed_dictionaries(GOOD), min_size=1, max_size=4),
    at=st.integers(0, 3),
    field=st.sampled_from(list(GOOD)),
    how=st.sampled_from(["good", "bad", "remove"]),
    data=st.data(),
)
def test_a_row_is_parsed_or_named_by_file_row_and_field_and_none_is_lost(tmp_path_factory, rows, at, field, how, data):
    at %= len(rows)
    before = json.loads(json.dumps(rows))
    if how == "bad":
        rows[at][field] = data.draw(BAD[field])
    elif how == "remove":
        del rows[at][field]
    file = write(tmp_path_factory.mktemp("wmdp"), "wmdp-chem.json", rows)
    try:
        found = load_wmdp(file.parent, ["chem"]).questions["chem"]
    except ValueError as error:
        assert how != "good"
        assert all(part in str(error) for part in ("wmdp-chem.json", f"row {at}:", f"'{field}")) and "\n" not in str(
            error
        )
    else:
        assert how == "good"
        assert [row.model_dump(exclude={"subject"}) for row in found] == [
            row | {"choices": tuple(row["choices"])} for row in before
        ]
        assert all(row.correct == row.choices["ABC".index(row.letter)] for row in found)


@settings(max_examples=120, deadline=None)
@given(content=st.binary(max_size=40) | st.sampled_from([b"[]", b"{}", b"[[]]", b"[" * 50_000, b"null", b"[3]"]))
def test_a_file_that_holds_no_rows_is_refused_by_name(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("wmdp") / "wmdp-bio.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="wmdp-bio.json"):
        load_wmdp(file.parent, ["bio"])
