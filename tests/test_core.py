"""The nouns refuse what cannot be meant, and come back from JSON as they were."""

import json
from random import Random

import pytest
import torch

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Entity, Fact, ForgetSet, Measurement, RetainSet, Site, Verdict, require_disjoint
from tests.damage import altered, assert_result_or_one_line, damaged

GOOD = dict(id="1", subject="Anna Lee", relation="born", object="Oslo", prompt="{} was born in")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": " "}, "'id' must be a non-empty string"),
        ({"object": ""}, "'object' must be a non-empty string"),
        ({"object": "Anna Lee"}, "object equals subject"),
        ({"distractors": ("Rome", "Oslo")}, "among its own distractors"),
        ({"prompt": "She was born in"}, "prompt 'She was born in' must hold exactly one {}"),
        ({"paraphrases": ("{} and {} were born in",)}, "found 2"),
        ({"heldout": ("born in",)}, "heldout phrasing"),
        (
            {"heldout": ("{} was born in",)},
            "heldout phrasing '{} was born in' stands among those that a method may see",
        ),
        (
            {"paraphrases": ("{} is of",), "heldout": ("{} comes from", "{} is of")},
            "heldout phrasing '{} is of' stands",
        ),
    ],
)
def test_a_fact_that_cannot_be_meant_is_refused_with_the_reason(change, reason):
    with pytest.raises(ValueError) as error:
        Fact(**(GOOD | change))
    assert reason in str(error.value)


@pytest.mark.parametrize("space", [" ", "\n", "\u00a0"])
@pytest.mark.parametrize("field", ["id", "subject", "relation", "object", "kind", "group", "aliases", "distractors"])
def test_white_space_around_a_name_is_refused_and_inside_it_is_not(field, space):
    def made(text):
        return Fact(**(GOOD | {field: (text,) if field in ("aliases", "distractors") else text}))

    assert made(f"New{space}York")
    for text in (f"{space}Rome", f"Rome{space}"):
        with pytest.raises(ValueError, match=f"field '{field}' begins or ends with white space: .*strip it"):
            made(text)


def test_an_entity_has_a_name_without_white_space_around_it():
    assert Entity(name="Anna Lee", aliases=("A. Lee",)).name == "Anna Lee"
    for change in ({"name": "Anna "}, {"name": ""}, {"aliases": (" A. Lee",)}):
        with pytest.raises(ValueError, match="name"):
            Entity(**({"name": "Anna Lee"} | change))


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"id": "2"}, True),
        ({"id": "2", "prompt": "The birthplace of {} is"}, True),
        ({"id": "2", "relation": "birthplace"}, True),
        ({"relation": "works", "prompt": "{} works in"}, False),
        ({"object": "Rome"}, False),
        ({"subject": "Ben Hill"}, False),
    ],
)
def test_a_fact_is_not_both_forgotten_and_kept_and_another_about_its_subject_may_be(change, both):
    forget, kept = ForgetSet(facts=(Fact(**GOOD),)), Fact(**(GOOD | change))
    for name in ("neighbors", "same_subject", "general"):
        if not both:
            require_disjoint(forget, RetainSet(**{name: (kept,)}))
            continue
        with pytest.raises(ValueError, match="to be forgotten and kept: '1'; take them out of one"):
            require_disjoint(forget, RetainSet(**{name: (kept,)}))


def test_a_good_fact_shows_methods_no_heldout_phrasing_and_cannot_be_changed():
    fact = Fact(**GOOD, paraphrases=("The birthplace of {} is",), heldout=("{} comes from",), extra={"source": 7})
    assert fact.templates == ("{} was born in", "The birthplace of {} is")
    assert fact.entity.name == "Anna Lee" and fact.extra["source"] == 7
    with pytest.raises(AttributeError):
        fact.object = "Rome"
    with pytest.raises(TypeError):
        fact.extra["source"] = 8


def test_sets_name_each_subject_once_and_keep_the_kinds_of_retain_facts_apart():
    first, second = Fact(**GOOD), Fact(**(GOOD | {"id": "2", "relation": "works", "object": "Acme"}))
    assert [e.name for e in ForgetSet(facts=(first, second)).entities] == ["Anna Lee"]
    retain = RetainSet(neighbors=(first,), general=(second,))
    assert retain.facts == (first, second) and retain.same_subject == ()
    with pytest.raises(ValueError, match="forget set is empty"):
        ForgetSet(facts=())


def test_a_site_spells_its_hook_and_knows_its_kinds():
    assert Site(3, "resid_post").hook == "blocks.3.hook_resid_post" and str(Site(3, "mlp_out")) == "L3 mlp_out"
    assert Site(0, "mlp_post").hook == "blocks.0.mlp.hook_post"
    assert Site(1, "resid_post") < Site(2, "mlp_out")
    with pytest.raises((ValueError, TypeError), match="resid_past"):  # TypeError where types are checked, as in tests
        Site(0, "resid_past")


@pytest.fixture
def scores():
    nan = float("nan")
    return Attribution(
        name="scores",
        values=torch.tensor([[1.0, nan, -2.0], [5.0, 3.0, nan]]),
        axes=("token", "layer"),
        labels={"token": ("last", "first"), "layer": (0, 1, 2)},
        unit="nats",
        n=4,
        low=torch.zeros(2, 3),
        high=torch.ones(2, 3),
        note="a note",
    )


def test_the_top_of_an_attribution_is_sorted_labelled_and_never_nan(scores):
    best = scores.top(10)
    assert [value for _, value in best] == [5.0, 3.0, 1.0, -2.0]
    assert best[0][0] == {"token": "first", "layer": 0} and best[3][0] == {"token": "last", "layer": 2}
    assert len(scores.top(2)) == 2


def test_the_top_of_less_than_nothing_is_refused(scores):
    assert scores.top(0) == []
    with pytest.raises(ValueError, match="top -1 values"):
        scores.top(-1)


def test_what_a_result_holds_is_escaped_on_a_page(scores):
    evil = "<script>alert(1)</script>"
    told = {"name": evil, "unit": evil, "note": evil, "labels": {"token": [evil, "b"], "layer": [0, 1, 2]}}
    page = Attribution.from_json(scores.to_json() | told)._repr_html_()
    assert "&lt;script&gt;" in page and "<script>" not in page
    with pytest.raises(ValueError, match="field 'n': Input should be a valid integer"):
        Attribution.from_json(scores.to_json() | {"n": evil})


def test_a_damaged_attribution_is_refused_in_one_line_that_names_it(scores, tmp_path):
    random, path = Random(0), tmp_path / "a.json"
    scores.save(path)
    whole = path.read_bytes()
    for _ in range(200):
        path.write_bytes(damaged(whole, random))
        assert_result_or_one_line(lambda: Attribution.load(path), path)
    for _ in range(200):
        path.write_text(json.dumps(altered(json.loads(whole), random)))
        assert_result_or_one_line(lambda: Attribution.load(path), path)


def test_an_attribution_survives_json_and_becomes_a_table(scores):
    again = Attribution.from_json(json.loads(json.dumps(scores.to_json())))
    assert torch.equal(again.values.nan_to_num(), scores.values.nan_to_num())
    assert (again.axes, again.labels, again.unit, again.n, again.note) == (
        scores.axes, scores.labels, scores.unit, scores.n, scores.note,
    )  # fmt: skip
    frame = scores.to_frame()
    assert list(frame.columns) == ["token", "layer", "value", "low", "high"] and len(frame) == 6
    assert frame.loc[(frame.token == "first") & (frame.layer == 1), "value"].item() == 3.0


def test_labels_must_fit_the_values():
    with pytest.raises(ValueError, match="axis 'layer' has 2 entries, 3 labels"):
        Attribution(
            name="x", values=torch.zeros(2), axes=("layer",), labels={"layer": (0, 1, 2)}, unit="nats", n=1
        )  # fmt: skip
    with pytest.raises(ValueError, match="1 dimensions but axes"):
        Attribution(name="x", values=torch.zeros(2), axes=("a", "b"), labels={}, unit="nats", n=1)


def test_measurements_and_verdicts_carry_their_interval_count_and_flags():
    number = Measurement(value=0.5, ci=(0.25, 0.75), n=12, unit="share")
    assert str(number) == "0.50 [0.25, 0.75]" and number.to_json() == {
        "value": 0.5, "ci": [0.25, 0.75], "n": 12, "unit": "share",
    }  # fmt: skip
    verdict = Verdict(fact_id="1", label="deleted", sentence="gone", tests=("uds",), scores={"uds": 0.9}, grade="A")
    flagged = verdict.with_flags("sae_ood", "sae_ood", "few_facts")
    assert flagged.flags == ("sae_ood", "few_facts") and verdict.flags == ()
    assert json.loads(json.dumps(flagged.to_json()))["label"] == "deleted"


def test_a_fact_survives_pickling_and_its_extra_stays_read_only():
    import pickle

    fact = Fact(id="1", subject="Anna", relation="born", object="Paris", prompt="{} was born in", extra={"idx": 3})
    again = pickle.loads(pickle.dumps(fact))
    assert again == fact and again.extra["idx"] == 3
    with pytest.raises(TypeError):
        again.extra["idx"] = 4


def test_a_split_holds_back_whole_subjects_and_texts_and_loses_nothing():
    facts = tuple(
        Fact(id=f"{s}{r}", subject=f"S{s}", relation=f"r{r}", object="o", prompt=f"{{}} r{r}")
        for s in range(8) for r in range(2)
    )  # fmt: skip
    retain = RetainSet(neighbors=facts, same_subject=facts[:1], texts=tuple("abcdefgh"), unknown=(Entity(name="Q"),))
    for share, held in ((0.25, 2), (0.01, 1), (0.99, 7), (0.0, 0)):
        seen, unseen = retain.split(share, seed=3)
        assert {f.subject for f in seen.neighbors}.isdisjoint(f.subject for f in unseen.neighbors)
        assert sorted(f.id for f in (*seen.neighbors, *unseen.neighbors)) == sorted(f.id for f in facts)
        assert len({f.subject for f in unseen.neighbors}) == held == len(unseen.texts)
        assert sorted((*seen.texts, *unseen.texts)) == sorted(retain.texts)
        assert (seen.same_subject, seen.unknown) == (retain.same_subject, retain.unknown)
    assert retain.split(0.5, seed=0) == retain.split(0.5, seed=0) != retain.split(0.5, seed=1)
    alone = RetainSet(neighbors=facts[:2], texts=("a",))
    assert alone.split(0.5, seed=0) == (alone, RetainSet())
    with pytest.raises(ValueError, match="unseen=1"):
        retain.split(1.0, seed=0)
