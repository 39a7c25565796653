"""What attacks share: the setting is chosen on TUNE, damage is counted fact by fact, samples cut across relations."""

import pytest
import torch

from mech_unlearn.core import Fact
from mech_unlearn.model.load import load
from mech_unlearn.restoration.engine import attack
from mech_unlearn.restoration.engine.attack import Curves, Ready
from mech_unlearn.restoration.engine.gain import ignorant
from mech_unlearn.restoration.engine.levels import Levels
from mech_unlearn.restoration.engine.normalise import relation_mean
from tests.planted import FORGOTTEN, planted_case, planted_model
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer

FULL = 8.0
"""Margin of the full model in these worked examples; models that never knew stand at 0."""


def curves(tune, test, lost=None):
    """One margin per setting, the same for all facts."""
    tune, test = (torch.tensor(x, dtype=torch.float32)[:, None, None].expand(-1, 1, FORGOTTEN) for x in (tune, test))
    return Curves(tune, test, torch.zeros(len(tune)) if lost is None else torch.tensor(lost))


def made(*retrained):
    """A case, and what retrained models with these curves make ready; the audited one never knew and stands at 0."""
    case = planted_case(sae=None)
    tune, test = attack.both_levels(case, None)
    flat = [
        Levels(x.query_set, torch.full((FORGOTTEN,), FULL), torch.zeros(len(retrained), FORGOTTEN))
        for x in (tune, test)
    ]
    points = tuple(f"setting {i}" for i in range(retrained[0].tune.shape[0]))
    return case, Ready(points, *flat, retrained)


def run(case, ready, found, model=None):
    return attack.attack_result(
        case, ready, model or planted_model("retrained", 5), found, test="t", name="m", cost_fe=1.0
    )


NOTHING = curves([0.0, 0.0], [0.0, 0.0])
TABLE = {
    "the best on TUNE, though TEST likes the other": (curves([4.0, 6.0], [8.0, 2.0]), [NOTHING] * 3, 1, 0.25, False),
    "the best on TUNE, not the last": (curves([6.0, 4.0], [2.0, 8.0]), [NOTHING] * 3, 0, 0.25, False),
    "one that breaks other facts is passed over": (
        curves([8.0, 4.0], [8.0, 4.0], [0.05, 0.02]), [NOTHING] * 3, 1, 0.5, False,
    ),
    "where all break some, the one that breaks least": (
        curves([8.0, 4.0], [8.0, 4.0], [0.5, 0.3]), [NOTHING] * 3, 1, 0.5, True,
    ),
    "what is injected counts for nothing": (
        curves([8.0, 4.0], [8.0, 4.0]), [curves([8.0, 0.0], [8.0, 0.0])] * 3, 1, 0.5, False,
    ),
    "a gain that retrained models have in part": (
        curves([6.0, 0.0], [6.0, 0.0]), [curves([2.0, 0.0], [2.0, 0.0])] * 3, 0, 0.5, False,
    ),
    "the way up to ignorance is no gain": (curves([-1.0, 0.0], [-1.0, 0.0]), [NOTHING] * 3, 0, 0.0, False),
}  # fmt: skip


@pytest.mark.parametrize("what", TABLE)
def test_the_setting_is_chosen_on_tune_among_those_that_spare_other_facts_and_reported_on_test(what):
    found, retrained, best, want, warned = TABLE[what]
    case, ready = made(*retrained)
    got = run(case, ready, found)
    torch.testing.assert_close(got.recoverability, torch.full((FORGOTTEN,), want))
    assert got.alpha == best and torch.equal(got.score_raw, found.test[best, 0])
    assert all(flags == (*(("collateral",) if warned else ()), f"setting:setting {best}") for flags in got.flags)
    assert torch.equal(got.columns["lost_others"], found.lost[best].expand(FORGOTTEN))


def test_each_heldout_retrained_model_chooses_its_own_setting_on_tune():
    lucky, other = curves([0.0, 4.0], [8.0, 2.0]), curves([2.0, 0.0], [4.0, 8.0])
    _, ready = made(lucky, other, NOTHING)
    null = attack.setting_null(ready)
    assert null.shape == (3, FORGOTTEN)
    # Injected on TEST is the mean of the two others: 4 at setting 1 for the first, 4 at setting 0 for the second.
    torch.testing.assert_close(null[0], torch.zeros(FORGOTTEN))
    torch.testing.assert_close(null[1], torch.zeros(FORGOTTEN))
    alone, quiet = curves([0.0, 4.0], [8.0, 2.0]), NOTHING
    torch.testing.assert_close(attack.setting_null(made(alone, quiet, quiet)[1])[0], torch.full((FORGOTTEN,), 0.25))
    broken = curves([0.0, 4.0], [8.0, 2.0], [0.0, 0.5])
    torch.testing.assert_close(attack.setting_null(made(broken, quiet, quiet)[1])[0], torch.full((FORGOTTEN,), 1.0))
    assert attack.setting_null(made(NOTHING)[1]).shape == (0, FORGOTTEN)


def test_an_audited_retrained_model_is_compared_with_the_others_and_not_run_again():
    case, ready = made(curves([4.0, 0.0], [4.0, 0.0]), NOTHING, curves([2.0, 0.0], [2.0, 0.0]))
    model = case.retrained[0]
    known = attack.curves_of(case, ready, model, lambda *_: pytest.fail("it was run again"))
    assert known is ready.retrained[0]
    got = run(case, ready, known, model)
    assert got.score_retrained.tolist() == [[0.0] * FORGOTTEN, [2.0] * FORGOTTEN]
    torch.testing.assert_close(got.recoverability, torch.full((FORGOTTEN,), (4 - 1) / FULL))


@pytest.mark.parametrize(
    "mean_rho, lost, best, flags",
    (
        ([0.1, 0.3, 0.2], [0.0, 0.0, 0.0], 1, ()),
        ([0.1, 0.3, 0.2], [0.0, 0.03, 0.02], 2, ()),
        ([float("nan"), 0.0, -0.1], [0.0, 0.0, 0.0], 0, ()),
        ([float("nan"), 0.1], [0.0, 0.0], 1, ()),
        ([0.9, 0.1, 0.2], [0.5, 0.03, 0.1], 1, ("collateral",)),
    ),
)
def test_the_choice_of_a_setting(mean_rho, lost, best, flags):
    assert attack.choose_setting(torch.tensor(mean_rho), torch.tensor(lost)) == (best, flags)


def test_without_retrained_models_the_level_of_ignorance_is_the_relation_mean_of_attacked_shams():
    facts = tiny_facts(["Anna Lee", "Ben Hill"])
    case = planted_case(sae=None, facts=facts, retrained=())
    after = torch.arange(8.0).reshape(2, 4)
    got = ignorant(case, [], torch.zeros(0, 4), after)
    assert torch.equal(got, relation_mean(after[1], facts)[None]) and got.tolist() == [[5.0, 6.0, 5.0, 6.0]]
    retrained = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ignorant(case, [0, 2], retrained, after), retrained[[0, 2]])


def many_others(count):
    """Facts about other subjects that take turns between two relations."""
    names = [f"{a} {b}" for a in ("Eva", "Finn", "Gina", "Hugo", "Anna") for b in ("Reed", "Stone", "Vale", "West")]
    facts = tiny_facts([f"{name} {other}" for name in names for other in names])[:count]
    return tuple(Fact(**{**vars(fact), "id": f"{i} {fact.id}", "extra": {}}) for i, fact in enumerate(facts))


def test_a_sample_of_facts_that_take_turns_between_relations_holds_both_and_keeps_their_order():
    facts = many_others(400)
    case, other = planted_case(sae=None), planted_case(sae=None, seed=1)
    some = attack.drawn(case, facts, 100)
    assert {fact.relation for fact in some} == {"born", "works"} and len(some) == len(set(map(id, some))) == 100
    assert list(some) == [fact for fact in facts if any(fact is chosen for chosen in some)]
    assert some == attack.drawn(case, facts, 100) != attack.drawn(other, facts, 100)
    assert attack.drawn(case, facts[:7], 100) == facts[:7]


def test_damage_is_read_on_enough_facts_to_tell_two_in_a_hundred_and_only_by_their_true_answers():
    full = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    case = planted_case(sae=None, full=full, facts=tiny_facts(["Anna Lee"]), retrained=(), others=many_others(400))
    queries = attack.other_queries(case)
    assert len(queries) == attack.OTHER_FACTS and attack.MAX_LOST * len(queries) >= 1
    assert all(len(query.answers) == 1 for query in queries)
    assert {query.fact.relation for query in queries} == {"born", "works"}


def test_a_fact_that_is_newly_answered_does_not_make_up_for_one_that_is_lost():
    before, after = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, True])
    assert attack.lost_share(before, after) == 0.25 and attack.lost_share(before, before) == 0
    assert attack.lost_share(before[:0], after[:0]) == 0
