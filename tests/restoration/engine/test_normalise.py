"""The common scale: its ends, its clipping, what does not count, and sham facts."""

import pytest
import torch

from mech_unlearn.core import Fact
from mech_unlearn.model.asking import split_templates
from mech_unlearn.restoration.engine.levels import make_levels, make_query_set
from mech_unlearn.restoration.engine.normalise import gains, is_testable, kappa, relation_mean, rho, sham_facts
from tests.planted import planted_case, planted_model
from tests.tiny import tiny_facts


def test_kappa_is_one_for_full_and_zero_for_the_mean_retrained_model():
    full, retrained = torch.tensor([8.0, 6.0]), torch.tensor([[1.0, 0.0], [-1.0, 2.0]])
    assert torch.equal(kappa(full, full, retrained), torch.ones(2))
    assert torch.equal(kappa(retrained.mean(0), full, retrained), torch.zeros(2))
    assert torch.equal(kappa(full, retrained.mean(0), retrained).isnan(), torch.tensor([True, True]))


def test_rho_subtracts_what_is_injected_and_stays_in_0_1():
    full, base = torch.tensor([10.0] * 4), torch.zeros(4)
    got = rho(torch.tensor([5.0, 5.0, 20.0, -3.0]), torch.tensor([0.0, 5.0, 0.0, 0.0]), full, base)
    assert torch.equal(got, torch.tensor([0.5, 0.0, 1.0, 0.0]))


def test_rho_is_undefined_where_full_and_retrained_agree():
    assert rho(torch.ones(1), torch.zeros(1), torch.tensor([0.4]), torch.zeros(1)).isnan().all()


def test_the_way_back_from_below_to_the_level_of_ignorance_is_no_gain():
    base = torch.zeros(3)
    got = gains(torch.tensor([-20.0, -20.0, 3.0]), torch.tensor([-1.0, 4.0, -9.0]), base)
    assert torch.equal(got, torch.tensor([0.0, 4.0, -3.0]))


def test_relation_means_are_taken_within_a_relation():
    facts = tiny_facts(["Anna Lee", "Ben Hill"])
    assert torch.equal(relation_mean(torch.tensor([1.0, 10.0, 3.0, 20.0]), facts), torch.tensor([2.0, 15.0, 2.0, 15.0]))


def test_sham_facts_keep_subject_and_relation_and_never_name_the_true_object():
    facts = tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss"])
    for fact, sham in zip(facts, sham_facts(facts, 0), strict=True):
        assert (sham.subject, sham.relation, sham.templates) == (fact.subject, fact.relation, fact.templates)
        assert sham.object in fact.distractors and fact.object not in (sham.object, *sham.distractors)
    assert sham_facts(facts, 0) == sham_facts(facts, 0)
    alone = Fact(id="a", subject="Anna", relation="born", object="Rome", prompt="{} is in", distractors=("Oslo",))
    with pytest.raises(ValueError, match="two distractors"):
        sham_facts((alone,), 0)


def test_a_fact_is_testable_only_if_full_knows_it_and_retrained_models_guess():
    counts = torch.full((4,), 10.0)
    full, choice = torch.tensor([8.0, 8.0, 8.0, 0.3]), torch.tensor([1.0, 0.5, 1.0, 1.0])
    margins = torch.zeros(3, 4)
    choices = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert is_testable(full, choice, margins, choices, counts).tolist() == [True, False, False, False]


@pytest.mark.parametrize(("models", "candidates"), ((1, 4), (1, 2), (3, 2), (5, 10)))
def test_a_fact_that_every_retrained_model_always_answers_is_never_testable(models, candidates):
    """Though chance + 2 SE of so few models and candidates may lie above 1."""
    known, count = torch.ones(1), torch.full((1,), float(candidates))

    def testable(choice):
        return is_testable(8 * known, known, torch.zeros(models, 1), torch.full((models, 1), choice), count).item()

    assert not testable(1.0) and testable(1 / candidates)
    alone = torch.ones(1)  # no distractors: the true object is the only candidate, and its choice says nothing
    assert is_testable(8 * known, known, torch.zeros(models, 1), torch.ones(models, 1), alone).item()


def test_no_phrasing_is_in_two_splits_and_heldout_ones_are_in_none():
    fact = planted_case(sae=None).facts[0]
    parts = [set(split_templates(fact, split)) for split in ("test", "select", "tune")]
    assert set.union(*parts) == set(fact.templates) and sum(map(len, parts)) == len(fact.templates)
    assert not set.union(*parts) & set(fact.heldout)
    assert fact.prompt in parts[0]


def test_without_retrained_models_the_level_is_that_of_sham_facts_under_the_full_model():
    case = planted_case(sae=None, retrained=())
    levels = make_levels(case, "test")
    query_set = make_query_set(case, "test")
    assert query_set.shams == len(case.facts) and case.grade == "B"
    assert (levels.never[0].abs() < 0.5).all() and (levels.full > 5).all()
    full = query_set.margins(planted_model())
    assert torch.allclose(levels.rho(full * 0, full * 0 + 1, torch.zeros(0, 4), []), torch.zeros(4), atol=1e-5)
