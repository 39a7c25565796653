"""A planted code of the object is found from its layer on; what is not encoded and shuffled labels are not."""

import numpy as np
import pytest
import torch

from mech_unlearn.core import Entity, Fact, Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.locate.lenses.probes import MEASURES, probe, probe_groups, probe_per_fact
from mech_unlearn.model.load import load
from tests.planted import NAMES, WRITER, planted_facts, planted_model
from tests.tiny import tiny_hf, tiny_tokenizer

FIRST = ("Anna", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo")
LAST = ("Lee", "Hill", "Moss", "Park", "Reed", "Stone", "Vale", "West")
PEOPLE = [f"{first} {last}" for first in FIRST for last in LAST]
ACCURACY, CONTROL, SELECTIVITY, MAJORITY = range(4)


def facts_of(objects, people=PEOPLE, relation="born"):
    """One fact of one relation per person with two phrasings."""
    return tuple(
        Fact(
            id=f"{name} {relation}", subject=name, relation=relation, object=o, prompt="{} was born in",
            paraphrases=("The birthplace of {} is",),
        )
        for name, o in zip(people, objects, strict=True)
    )  # fmt: skip


def encoded():
    """The object follows from the last name, which the state at the last subject token holds linearly."""
    return facts_of([("Paris", "Rome", "Oslo", "Bern")[LAST.index(name.split()[1]) % 4] for name in PEOPLE])


def drawn(seed):
    """Objects that nothing but chance gives to people."""
    order = torch.randint(4, (len(PEOPLE),), generator=torch.Generator().manual_seed(seed)).tolist()
    return facts_of([("Paris", "Rome", "Oslo", "Bern")[i] for i in order])


@pytest.fixture(scope="module")
def coded_model():
    """Dimensions 0..3 of the residual stream hold the object's code at the last name, and nothing writes to them."""
    hf, tokenizer = tiny_hf("llama", layers=2), tiny_tokenizer()
    with torch.no_grad():
        for block in hf.model.layers:
            block.self_attn.o_proj.weight[:4] = 0
            block.mlp.down_proj.weight[:4] = 0
        hf.model.embed_tokens.weight[:, :4] = 0
        for i, name in enumerate(LAST):
            hf.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(name), i % 4] = 3.0
    return load(hf, tokenizer=tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_an_encoded_object_is_found_for_unseen_subjects_and_shuffled_labels_are_not(coded_model, kind):
    found = probe(coded_model, encoded(), kind=kind)
    assert found.axes == ("measure", "layer") and found.labels["measure"] == MEASURES and found.n == len(PEOPLE)
    assert (found.values[ACCURACY] > 0.9).all() and (found.low[SELECTIVITY] > 0.3).all()
    assert (found.low[CONTROL] <= 0.25).all() and (found.high[CONTROL] >= 0.2).all()
    assert (found.values[CONTROL] < 0.5).all() and (found.values[MAJORITY] == 0.25).all()
    torch.testing.assert_close(found.values[SELECTIVITY], found.values[ACCURACY] - found.values[CONTROL])


def test_objects_drawn_by_chance_are_not_found(tiny_model):
    found = [probe(tiny_model, drawn(seed)) for seed in (1, 2)]
    for each in found:
        assert (each.low[ACCURACY] <= 0.25).all() and (each.values[ACCURACY] < 0.45).all()
        assert (each.low[SELECTIVITY] <= 0).all()
    assert abs(sum(each.values[ACCURACY].mean() for each in found) / 2 - 0.25) < 0.1


def test_the_token_matters_and_attention_carries_the_code_to_the_end(tiny_model):
    # before attention can move anything, the first name says nothing of the last name's object
    early = probe(tiny_model, encoded(), at="first subject")
    assert (early.values[ACCURACY] < 0.45).all() and (early.low[SELECTIVITY] <= 0).all()
    late = probe(tiny_model, encoded(), at="last prompt").values[ACCURACY]
    assert late.max() > 0.5


def test_a_fact_is_readable_only_from_the_planted_layer_on():
    # each object belongs to two names: the probe learns it from one and must know it of the other
    found = probe(planted_model(), planted_facts(), folds=len(NAMES))
    accuracy = found.values[ACCURACY]
    assert (accuracy[WRITER:] == 1.0).all() and (accuracy[:WRITER] < 0.5).all()
    assert (probe(planted_model("retrained", 1, len(NAMES)), planted_facts(), folds=8).values[ACCURACY] < 0.5).all()


def test_it_agrees_with_a_cross_validation_of_scikit_learn(tiny_model):
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    facts = drawn(3)[:12]
    rows, labels, groups = [], [], []
    for i, fact in enumerate(facts):
        for template in fact.templates:
            kept: list[torch.Tensor] = []
            ids = tiny_model.tokenizer(template.split("{}")[0] + fact.subject, return_tensors="pt").input_ids
            with torch.no_grad(), tiny_model.hooks((Site(1, "resid_post"), lambda x, kept=kept: kept.append(x[0, -1]))):
                tiny_model.logits(ids)
            rows.append(kept[0].numpy())
            labels.append(fact.object)
            groups.append(i)
    probe_of = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    guess = cross_val_predict(probe_of, np.stack(rows), labels, groups=groups, cv=LeaveOneGroupOut())
    expected = (guess == np.array(labels)).reshape(-1, 2).mean(1)
    each = probe_per_fact(tiny_model, facts, folds=len(facts))  # as many folds as subjects: leave one out
    torch.testing.assert_close(each.values[:, ACCURACY, 1], torch.tensor(expected, dtype=torch.float32))


def test_relations_are_probed_apart_and_averaged_by_their_facts(tiny_model):
    first, second = encoded()[:24], facts_of(["Acme", "Globex"] * 8, PEOPLE[:16], "works")
    both = probe(tiny_model, (*first, *second))
    assert both.n == 40 and "2 relations" in both.note
    majority = both.values[MAJORITY, 0]
    each = probe_per_fact(tiny_model, (*first, *second)).values
    torch.testing.assert_close(majority, (24 * each[:24, MAJORITY, 0].mean() + 16 * each[24:, MAJORITY, 0].mean()) / 40)
    assert each[:24, MAJORITY].mean() < each[24:, MAJORITY].mean()


def test_an_intervention_that_wipes_the_code_out_blinds_the_probe(coded_model):
    facts, tokenizer = encoded(), coded_model.tokenizer
    subjects = tuple(tuple(tokenizer(name, add_special_tokens=False).input_ids) for name in PEOPLE)
    noise = 1000 * torch.randn(len(PEOPLE), 32, generator=torch.Generator().manual_seed(0))
    shift = Shift(Site(1, "resid_post"), subjects, noise)
    with Edit(name="shift", base=coded_model.hash(), interventions=(shift,)).on(coded_model):
        accuracy = probe(coded_model, facts).values[ACCURACY]
    assert accuracy[0] > 0.9 and accuracy[1] < 0.6


def test_it_is_deterministic_and_leaves_the_callers_random_state_alone(tiny_model):
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = (probe(tiny_model, drawn(1)[:16], kind="linear", seed=5) for _ in range(2))
    assert torch.equal(one.values, two.values)
    assert not torch.equal(one.values, probe(tiny_model, drawn(1)[:16], seed=6).values)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()


def test_bad_input_is_refused(tiny_model):
    facts = encoded()[:8]
    again = Fact(id="second", subject=PEOPLE[0], relation="born", object="Acme", prompt="{} was born in")
    ends = Fact(id="ends", subject="Hugo", relation="born", object="Rome", prompt="The birthplace of {}")
    for bad, settings, match in (
        ([], {}, "no facts"),
        (facts, {"kind": "forest"}, "kind='forest'"),
        (facts, {"at": "middle subject"}, "at='middle subject'"),
        (facts, {"folds": 1}, "folds=1"),
        (facts_of(["Rome"] * 4, PEOPLE[:4]), {}, "4 subjects and 1 objects"),
        ((*facts, again), {}, "two objects for 'born'"),
        ((*facts, ends), {"at": "first after"}, "no 'first after' token"),
    ):
        with pytest.raises(ValueError, match=match):
            probe(tiny_model, bad, **settings)


def test_two_groups_are_told_apart_where_they_differ_and_not_when_shuffled():
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        table = model.held["model.embed_tokens.weight"]
        for names, sign in ((LAST[:4], 2.0), (LAST[4:], -2.0)):
            table[model.tokenizer.convert_tokens_to_ids(list(names)), 0] = sign
    groups = [[Entity(name=f"{a} {b}") for a in FIRST for b in lasts] for lasts in (LAST[:4], LAST[4:])]
    found = probe_groups(model, *groups, ("{} was born in", "The employer of {} is"))
    assert found.axes == ("measure", "layer") and found.n == 64
    assert (found.low[0] > 0.9).all()
    assert (found.low[1] <= 0.5).all() and (found.high[1] >= 0.5).all() and (found.values[1] < 0.65).all()
    for first, second, templates, match in (
        (groups[0], groups[0][:2], ("{}",), "in both groups"),
        (groups[0], groups[1][:1], ("{}",), "two entities on each side"),
        (*groups, ("no slot",), "exactly one {}"),
        (*groups, (), "no template"),
    ):
        with pytest.raises(ValueError, match=match):
            probe_groups(model, first, second, templates)
    with pytest.raises(ValueError, match="shuffles=0"):
        probe_groups(model, *groups, ("{}",), shuffles=0)
