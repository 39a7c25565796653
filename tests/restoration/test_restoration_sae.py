"""Restoration by profile: planted latents, both sides of a block, nulls, and nothing where nothing is written."""

import pytest
import torch
from planted import FORGOTTEN, NAMES, fresh_planted_model, planted_case, planted_model, planted_sae

from mech_unlearn.core import Site
from mech_unlearn.restoration import sae
from mech_unlearn.restoration.experts import expert_scores, leaks, make_profiles, read_span, unspecific
from mech_unlearn.restoration.levels import make_levels
from mech_unlearn.restoration.steer import Steer, null_donors, null_rows


@pytest.fixture(scope="module")
def world():
    case = planted_case()
    return case, sae.prepare(case)


def steer(case, ready, arm, alpha, probe, **extra):
    states = read_span(case.full, probe.queries, case.write_site)[0]
    return Steer(ready.profiles, arm, alpha, sae._fact_index(ready.profiles, probe), states=states, **extra)


def test_f1_counts_hits_misses_and_false_alarms():
    fires = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 1]]).bool()
    f1, hits = expert_scores(fires, torch.tensor([0, 0, 1, 1]), 2)
    assert f1[0].tolist() == pytest.approx([1.0, 2 * 1 / (2 + 3)])
    assert f1[1].tolist() == pytest.approx([0.0, 2 * 2 / (2 + 3)])
    assert hits.tolist() == [[2, 1], [0, 2]]


def test_a_latent_that_fires_for_most_entities_is_unspecific():
    entity = torch.arange(10).repeat_interleave(10)
    fires = torch.zeros(100, 3, dtype=torch.bool)
    fires[::10, 0] = True
    fires[: 6 * 10, 1] = True
    fires[:10, 2] = True
    assert unspecific(fires, entity, 10).tolist() == [True, False, False]


def test_the_planted_latent_is_chosen_and_nothing_else(world):
    _, ready = world
    for e in range(len(NAMES)):
        assert ready.profiles.chosen[e].nonzero()[:, 0].tolist() == [e]
    assert all(flags == () for flags in ready.profiles.flags.values())


def test_latents_that_write_an_answer_directly_are_barred(world):
    case, _ = world
    queries = make_levels(case, "test").probe.queries
    barred = leaks(case.full, planted_sae().w_dec, queries, torch.ones(64))
    for e, name in enumerate(NAMES[:FORGOTTEN]):
        assert barred[name].nonzero()[:, 0].tolist() == [32 + e]


def test_strength_zero_changes_no_bit(world):
    case, ready = world
    probe = ready.test.probe
    plain = probe.margins(case.full)
    for arm in ("amplify", "profile", "oracle", "full"):
        assert torch.equal(probe.margins(case.full, {case.write_site: steer(case, ready, arm, 0.0, probe)}), plain)


def test_all_latents_and_the_error_together_are_the_full_arm(world):
    from dataclasses import replace

    case, ready = world
    early, probe = planted_model("early"), ready.test.probe
    everything = ready.profiles.chosen.clone()
    everything[:, :64], everything[:, 64:] = True, False
    all_latents = replace(ready.profiles, chosen=everything)
    states = read_span(case.full, probe.queries, case.write_site)[0]
    sae_ = case.sae

    def oracle_with_error(x, batch):
        out = Steer(all_latents, "oracle", 1.0, sae._fact_index(all_latents, probe), states=states)(x, batch)
        row, at = torch.arange(len(x)), batch.span[:, 1] - 1
        theirs, ours = states[batch.query, 0], x[row, at]
        out[row, at] += (theirs - sae_.reconstruct(theirs)) - (ours - sae_.reconstruct(ours))
        return out

    got = probe.margins(early, {case.write_site: oracle_with_error})
    want = probe.margins(early, {case.write_site: steer(case, ready, "full", 1.0, probe)})
    assert (got - want).abs().max() < 1e-4


def test_an_early_block_is_undone_by_the_profile_and_by_the_full_state(world):
    case, ready = world
    result = sae.audit(case, ready, planted_model("early"), "early")
    assert (result.columns["rr_profile"] >= 0.95).all()
    assert (result.columns["rr_full"] > 0.9999).all()
    assert (result.recoverability >= 0.95).all()
    assert (result.p_null <= 1 / 4).all()
    assert (result.columns["rr_control_adjusted"] > 0.5).all()
    assert (result.columns["rr_n1"] <= 0.2).all()  # a random latent is that of a name with the same object at times


def test_a_late_block_cannot_be_undone_by_any_state_below_it(world):
    case, ready = world
    late = planted_model("late")
    result = sae.audit(case, ready, late, "late")
    probe = ready.test.probe
    forced = probe.margins(late, {case.write_site: steer(case, ready, "full", 1.0, probe)})
    assert (forced - probe.margins(late)).abs().max() <= 1e-5
    assert (result.columns["rr_full"] <= 1e-5).all()


def test_in_the_full_model_nothing_is_lost_and_in_a_retrained_one_nothing_returns(world):
    case, ready = world
    full = sae.audit(case, ready, case.full, "full")
    assert all("not_lost" in full.flags_of(i) for i in range(FORGOTTEN)) and full.columns["rr_profile"].isnan().all()
    retrained = sae.audit(case, ready, case.retrained[0], "R")
    assert retrained.recoverability.mean() <= 0.05


def test_without_an_sae_a_direction_per_entity_does_the_same():
    case = planted_case(sae=None, site=Site(1, "resid_post"))
    ready = sae.prepare(case)
    assert all("direction" in flags for flags in ready.profiles.flags.values())
    early = sae.audit(case, ready, planted_model("early"), "early")
    assert (early.recoverability > 0.8).all()
    assert sae.audit(case, ready, case.retrained[0], "R").recoverability.mean() <= 0.05


def test_an_sae_without_a_telling_latent_gives_way_to_the_direction():
    blind = planted_sae()
    with torch.no_grad():
        blind.sae.W_enc[:8].zero_()
    profiles = make_profiles(planted_case(sae=blind))
    assert all(flags == ("no_expert", "direction") for flags in profiles.flags.values())
    assert (profiles.chosen.nonzero()[:, 1] >= 64).all()


def test_an_sae_out_of_its_domain_is_flagged(world):
    case, ready = world
    assert "sae_ood" not in sae.audit(case, ready, planted_model("early"), "early").flags_of(0)
    noisy = fresh_planted_model("retrained", 9)
    with torch.no_grad():
        noisy.held["model.embed_tokens.weight"].add_(
            torch.randn(noisy.held["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(0))
        )
    assert sae.subject_fvu(case, ready.test, noisy) > 0.3


def test_null_rows_keep_lengths_and_leave_their_own_latent(world):
    _, ready = world
    units, used = ready.profiles.units, torch.arange(8)
    rows = null_rows(units, used, ready.profiles.rate, seed=0)
    assert torch.allclose(rows[:8].norm(dim=1), units.rows[:8].norm(dim=1))
    assert not (rows[:8] == units.rows[:8]).all(1).any()


def test_null_donors_are_other_subjects_with_other_objects(world):
    import random

    _, ready = world
    facts = ready.profiles.facts
    for i, j in enumerate(null_donors(facts, random.Random(0)).tolist()):
        assert facts[i].subject != facts[j].subject and facts[i].object != facts[j].object


def test_strength_is_the_best_within_the_bounds_or_the_smallest_with_a_flag():
    rho = torch.tensor([0.1, 0.5, 0.9])
    assert sae.choose_alpha(rho, [(0.0, 0.0), (0.02, 0.1), (0.5, 3.0)]) == (1, ())
    assert sae.choose_alpha(rho, [(0.5, 0.0), (0.5, 0.1), (0.5, 3.0)]) == (0, ("collateral",))
