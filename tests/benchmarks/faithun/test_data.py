"""FaithUn: clusters and strata in each layout of the file; splits; base questions as facts; bad rows are named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_unlearn.benchmarks.faithun.data import SPLIT_FILES, load_faithun

PLAIN = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20)


def question(text, answer="Vell", **more):
    return {"question": text, "answers": [answer], "false_options": ["Hull", "Oban"]} | more


def entity(name):
    """Three base questions, each with its paraphrases; two have multi-hop questions, one a same-answer question."""
    base = [question(f"{what} of {name}?", what[:3]) for what in ("Who is the mother", "What is the job", "Who is kin")]
    return {
        "hop1_unlearn": base,
        "hop1_test": [[question(f"Say, {b['question']}"), question("who is it?")] for b in base],
        "hop2_test": [[question("Where was that mother born?")], [], [question("Kin of kin?"), question("Again?")]],
        "same_object": [[], [question("What is the job of Al Oak?")], []],
    }


FILE = {"Q1": entity("Ida Quill"), "Q2": entity("Bo Marsh")}


def write(folder, value, name="FaithUn_Dataset.json"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


def split(folder, **numbers):
    for name, file in SPLIT_FILES.items():
        write(folder, "\n".join(map(str, numbers[name])) + "\n", f"splits/{file}")


def test_each_base_question_founds_a_cluster_numbered_through_all_entities(tmp_path):
    found = load_faithun(write(tmp_path, FILE))
    assert [(c.entity, c.key) for c in found.clusters] == [(q, k) for q in ("Q1", "Q2") for k in "012"]
    assert [len(c.paraphrased) for c in found.clusters] == [2] * 6
    assert [len(c.multi_hop) for c in found.clusters] == [1, 0, 2] * 2
    assert [len(c.same_answer) for c in found.clusters] == [0, 1, 0] * 2 and found.unaligned == {}
    assert found.splits == {"forget": tuple(range(6))} and len(found.split("forget")) == 6
    with pytest.raises(ValueError, match="no set 'test'; there are forget"):
        found.split("test")


def test_base_questions_become_facts_with_paraphrases_held_out_and_false_options_as_distractors(tmp_path):
    found = load_faithun(write(tmp_path, FILE))
    fact = found.forget_facts[3]
    assert fact.subject == "Bo Marsh" and fact.prompt == "Question: Who is the mother of {}?\nAnswer:"
    assert fact.heldout == ("Question: Say, Who is the mother of {}?\nAnswer:",) and fact.paraphrases == ()
    assert fact.distractors == ("Hull", "Oban") and fact.extra["entity"] == "Q2" and fact.object == "Who"
    assert len(found.forget_facts) == 6
    assert {left.reason for left in found.left_out} == {"held-out phrasing: the subject does not occur"}
    assert [left.row for left in found.left_out] == list(range(6))


def test_splits_say_what_is_forgotten_and_what_is_kept(tmp_path):
    split(tmp_path, forget=[0, 4], retain=[1], test=[2, 3, 5])
    write(tmp_path, FILE)
    found = load_faithun(tmp_path)
    forget, retain = found.sets
    assert [f.id for f in forget.facts] == ["FaithUn_Dataset/0", "FaithUn_Dataset/4"]
    assert [f.id for f in retain.neighbors] == ["FaithUn_Dataset/1"]
    assert [c.entity for c in found.split("test")] == ["Q1", "Q2", "Q2"]
    assert load_faithun(tmp_path / "FaithUn_Dataset.json", splits=tmp_path / "splits") == found


def test_categories_by_property_and_other_field_names_give_the_same_clusters(tmp_path):
    base = {"P22": {"query": "Who is the father of Ida Quill?", "answer": "Al", "options": ["Al", "Bo"]}}
    more = {"P22": [{"query": "Ida Quill's father?", "answer": ["Al"]}]}
    value = {"Q1": {"name": "Ida Quill", "hop1_unlearn": base, "hop1_test": more}}
    found = load_faithun(write(tmp_path, value))
    (fact,) = found.forget_facts
    assert fact.relation == "P22" and fact.object == "Al" and fact.distractors == ("Bo",) and len(fact.heldout) == 1
    assert found.clusters[0].multi_hop == () and found.left_out == ()


def test_a_category_that_fits_no_clusters_is_kept_by_entity(tmp_path):
    value = {"Q1": entity("Ida Quill") | {"hop2_test": [question("a?"), question("b?")], "same_object": {"P1": []}}}
    found = load_faithun(write(tmp_path, value))
    assert {stratum: len(rows) for stratum, rows in found.unaligned["Q1"].items()} == {"multi_hop": 2, "same_answer": 0}
    assert all(c.multi_hop == () and len(c.paraphrased) == 2 for c in found.clusters)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("0\n6", "forget_set_split.txt:2: must be a cluster from 0 to 5, found '6'"),
        ("x", "forget_set_split.txt:1: must be a cluster"),
        ("-1", "forget_set_split.txt:1: must be a cluster"),
        ("²", "forget_set_split.txt:1: must be a cluster"),
        ("9" * 5000, "forget_set_split.txt:1: must be a cluster"),
        ("0\n\n0", "forget_set_split.txt:3: cluster 0 stands twice"),
        ("", "forget_set_split.txt holds no cluster numbers"),
        ("1", "cluster 1 stands in the forget set and in the retaining set"),
    ],
)
def test_a_bad_split_is_refused_with_file_and_line(tmp_path, lines, reason):
    write(tmp_path, FILE)
    split(tmp_path, forget=[0], retain=[1], test=[2])
    write(tmp_path, lines, f"splits/{SPLIT_FILES['forget']}")
    with pytest.raises(ValueError) as error:
        load_faithun(tmp_path)
    assert reason in str(error.value)
    with pytest.raises(ValueError, match="does not exist"):
        load_faithun(tmp_path, splits=tmp_path / "none")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"Q1": []}, "field 'Q1'"),
        ({"Q1": {}}, "field 'Q1.hop1_unlearn' must be given"),
        ({"Q1": {"hop1_unlearn": "x"}}, "'Q1.hop1_unlearn'"),
        ({"Q1": {"hop1_unlearn": [[]]}}, "one base question under each key, found 0 under '0'"),
        ({"Q1": {"hop1_unlearn": []}}, "no entity has a question"),
        ({}, "no entity has a question"),
        ([FILE, {"Q2": entity("Al Oak")}], "entity 'Q2' stands twice"),
        ([], "holds no rows"),
        ("{", "not JSON"),
        ('{"Q1": 1, "Q1": 2}', "stands twice"),
    ],
)
def test_a_file_that_is_not_the_benchmark_is_refused_with_the_reason(tmp_path, value, reason):
    with pytest.raises(ValueError, match="FaithUn_Dataset.json") as error:
        load_faithun(write(tmp_path, value))
    assert reason in str(error.value)


BAD = {
    "question": st.sampled_from([None, 3, "", " ", ["a"], "\ud800"]),
    "answers": st.sampled_from([None, 3, "", [], [3], [""], {"a": 1}]),
    "false_options": st.sampled_from([None, 3, [3], [" "], {"a": 1}]),
}


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(PLAIN, min_size=1, max_size=4),
    category=st.sampled_from(["hop1_unlearn", "hop1_test", "hop2_test", "same_object"]),
    at=st.integers(0, 3),
    field=st.sampled_from(list(BAD)),
    how=st.sampled_from(["good", "bad", "remove"]),
    data=st.data(),
)
def test_a_question_is_parsed_or_named_by_file_and_field_and_none_is_lost(
    tmp_path_factory, texts, category, at, field, how, data
):
    names = ("hop1_unlearn", "hop1_test", "hop2_test", "same_object")
    one = {name: [[question(f"{text} Ida Quill")] for text in texts] for name in names}
    at %= len(texts)
    if how == "bad":
        one[category][at][0][field] = data.draw(BAD[field])
    elif how == "remove":
        del one[category][at][0][field]
    file = write(tmp_path_factory.mktemp("faithun"), {"Q1": one})
    good = how == "good" or (how == "remove" and field == "false_options")
    try:
        found = load_faithun(file)
    except ValueError as error:
        assert not good
        assert all(part in str(error) for part in ("FaithUn_Dataset.json", f"'Q1.{category}.{at}.0.{field}"))
        assert "\n" not in str(error)
    else:
        assert good and len(found.clusters) == len(texts) and found.unaligned == {}
        facts = [int(f.id.split("/")[-1]) for f in found.forget_facts]
        left = [item.row for item in found.left_out if not item.reason.startswith("held-out")]
        assert sorted(facts + left) == list(range(len(texts)))
        heldout = sum(len(f.heldout) for f in found.forget_facts)
        assert heldout + len(found.left_out) - len(left) == len(facts)
