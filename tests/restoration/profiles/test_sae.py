"""Restoration by profile: planted latents, both sides of a block, nulls, and nothing where nothing is written."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import make_queries
from mech_unlearn.restoration.engine.levels import make_levels
from mech_unlearn.restoration.profiles import experts, sae
from mech_unlearn.restoration.profiles.experts import expert_scores, leaking_units, make_profiles, read_span, unspecific
from mech_unlearn.restoration.profiles.steer import Steer, null_donors, null_rows
from tests.planted import FORGOTTEN, NAMES, fresh_planted_model, planted_case, planted_facts, planted_model, planted_sae
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer


@pytest.fixture(scope="module")
def world():
    case = planted_case()
    return case, sae.prepare(case)


def steer(case, ready, arm, alpha, query_set, **extra):
    states = read_span(case.full, query_set.queries, case.write_site)[0]
    return Steer(ready.profiles, arm, alpha, sae._fact_index(ready.profiles, query_set), states=states, **extra)


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
    queries = make_levels(case, "test").query_set.queries
    barred = leaking_units(case.full, planted_sae().w_dec, queries, torch.ones(64))
    for e, name in enumerate(NAMES[:FORGOTTEN]):
        assert barred[name].nonzero()[:, 0].tolist() == [32 + e]


def plain_effects(hf, rows, state):
    """Derivative of all logits along each row's direction, by autograd through the model's own norm and read-out."""
    body = hf.base_model
    norm = next(getattr(body, n) for n in ("ln_f", "final_layer_norm", "norm") if hasattr(body, n))
    along = rows / rows.norm(dim=1, keepdim=True)
    return torch.stack(
        [torch.func.jvp(lambda x: hf.get_output_embeddings()(norm(x)), (state,), (v,))[1] for v in along]
    )


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ("gpt2", "gpt_neox", "llama", "gemma2"))
def test_direct_effects_are_those_of_plain_autograd_in_half_precision_too(architecture):
    """On the tokens asked for only; bfloat16 weights act as they are, in float32."""
    draw = torch.Generator().manual_seed(0)
    rows, state, tokens = torch.randn(6, 32, generator=draw), torch.randn(32, generator=draw), torch.tensor([7, 3, 20])
    half = tiny_hf(architecture).bfloat16()
    for hf, plain in ((tiny_hf(architecture), tiny_hf(architecture)), (half, tiny_hf(architecture).bfloat16().float())):
        got = experts.direct_effect(load(hf, tokenizer=tiny_tokenizer()), rows, state, tokens)
        want = plain_effects(plain, rows, state).detach()[:, tokens]
        assert got.shape == (6, 3) and (got - want).abs().max() < 2e-3 * want.abs().max()


def test_strength_zero_changes_no_bit(world):
    case, ready = world
    query_set = ready.test.query_set
    plain = query_set.margins(case.full)
    for arm in ("amplify", "profile", "oracle", "full"):
        assert torch.equal(
            query_set.margins(case.full, {case.write_site: steer(case, ready, arm, 0.0, query_set)}), plain
        )


def test_all_latents_and_the_error_together_are_the_full_arm(world):
    case, ready = world
    early, query_set = planted_model("early"), ready.test.query_set
    everything = ready.profiles.chosen.clone()
    everything[:, :64], everything[:, 64:] = True, False
    all_latents = replace(ready.profiles, chosen=everything)
    states = read_span(case.full, query_set.queries, case.write_site)[0]
    sae_ = case.sae

    def oracle_with_error(x, batch):
        out = Steer(all_latents, "oracle", 1.0, sae._fact_index(all_latents, query_set), states=states)(x, batch)
        row, at = torch.arange(len(x)), batch.span[:, 1] - 1
        theirs, ours = states[batch.query, 0], x[row, at]
        out[row, at] += (theirs - sae_.reconstruct(theirs)) - (ours - sae_.reconstruct(ours))
        return out

    got = query_set.margins(early, {case.write_site: oracle_with_error})
    want = query_set.margins(early, {case.write_site: steer(case, ready, "full", 1.0, query_set)})
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


@pytest.mark.slow
def test_a_fact_keeps_its_own_profile_where_other_facts_reuse_its_id(world):
    """A facts file without ids numbers its lines, and so does the file of the kept facts."""
    facts = planted_facts()
    others = tuple(replace(f, id=facts[(i + 1) % FORGOTTEN].id) for i, f in enumerate(facts[FORGOTTEN:]))
    case = planted_case(others=others)
    ready = sae.prepare(case)
    got, want = (sae.audit(c, r, planted_model("early"), "early") for c, r in ((case, ready), world))
    assert torch.equal(got.recoverability, want.recoverability) and got.alpha == want.alpha


@pytest.mark.slow
def test_where_nothing_was_restored_no_null_was_drawn_and_none_is_reported(world):
    case, ready = world
    late = sae.audit(case, ready, planted_model("late"), "late")
    assert (late.p_null == 1).all() and (late.recoverability < sae.MIN_RHO).all()
    assert all(late.columns[name].isnan().all() for name in ("rr_n1", "rr_n2", "rr_control_adjusted"))
    early = sae.audit(case, ready, planted_model("early"), "early")
    assert all(early.columns[name].isfinite().all() for name in ("rr_n1", "rr_n2", "rr_control_adjusted"))
    knowing = planted_case(retrained=(fresh_planted_model(), fresh_planted_model()), draws=1)
    unknown = sae.audit(knowing, sae.prepare(knowing), planted_model("early"), "early")
    assert unknown.recoverability.isnan().all() and unknown.p_null.isnan().all()


def test_a_late_block_cannot_be_undone_by_any_state_below_it(world):
    case, ready = world
    late = planted_model("late")
    result = sae.audit(case, ready, late, "late")
    query_set = ready.test.query_set
    forced = query_set.margins(late, {case.write_site: steer(case, ready, "full", 1.0, query_set)})
    assert (forced - query_set.margins(late)).abs().max() <= 1e-5
    assert (result.columns["rr_full"] <= 1e-5).all()


def test_in_the_full_model_nothing_is_lost_and_in_a_retrained_one_nothing_returns(world):
    case, ready = world
    full = sae.audit(case, ready, case.full, "full")
    assert all("not_lost" in full.flags_of(i) for i in range(FORGOTTEN)) and full.columns["rr_profile"].isnan().all()
    retrained = sae.audit(case, ready, case.retrained[0], "R")
    assert retrained.recoverability.mean() <= 0.05


@pytest.mark.slow
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


def relu_sae():
    """The planted SAE with ReLU in place of TopK; like most pretrained ones it does not say how many latents fire."""
    from sae_lens import StandardSAE, StandardSAEConfig

    made = StandardSAE(StandardSAEConfig(d_in=64, d_sae=64))
    with torch.no_grad():
        made.load_state_dict(planted_sae().sae.state_dict())
    return replace(planted_sae(), sae=made.eval().requires_grad_(False))


def test_an_sae_that_does_not_say_how_many_latents_fire_is_measured_on_the_subjects():
    values = torch.tensor([[[1.0, 0.0, 2.0], [3.0, 3.0, 3.0]], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]])
    valid = torch.tensor([[True, False], [True, True]])
    assert relu_sae().mean_l0 is None
    assert experts.active_latents(relu_sae(), values, valid) == pytest.approx(4 / 3)
    assert experts.active_latents(planted_sae(), values, valid) == 2.0
    profiles = make_profiles(planted_case(sae=relu_sae()))
    for e in range(len(NAMES)):
        assert profiles.chosen[e].nonzero()[:, 0].tolist() == [e]


def test_latents_of_generic_text_are_no_experts_however_long_the_text_is():
    """The second name stands behind the model's 64 positions."""
    long = " ".join([NAMES[0]] * 63 + [NAMES[1]] * 20)
    assert experts.generic(planted_model(), planted_sae(), [long], 2.0).nonzero()[:, 0].tolist() == [0, 1, 8]
    assert not experts.generic(planted_model(), planted_sae(), [], 2.0).any()
    rare = " ".join([NAMES[0]] * 60 + [NAMES[1]])
    assert experts.generic(planted_model(), planted_sae(), [rare], 2.0).nonzero()[:, 0].tolist() == [0, 8]
    profiles = make_profiles(planted_case(texts=(long,)))
    assert [profiles.flags[n] for n in NAMES[:3]] == [("no_expert", "direction")] * 2 + [()]


def test_the_profile_for_a_fact_leaves_out_prompts_of_its_relation_unless_the_subject_has_no_other():
    facts = (*tiny_facts(["Anna Lee"]), *tiny_facts(["Ben Hill"], ("born",)))
    queries = make_queries(tiny_tokenizer(), facts)
    value = {"Anna Lee born": 1.0, "Anna Lee works": 2.0, "Ben Hill born": 3.0}
    values = torch.tensor([value[query.fact.id] for query in queries])[:, None, None]
    target, known = experts._targets(values, torch.ones(len(queries), 1, dtype=torch.bool), queries, facts)
    assert target[:, 0, 0].tolist() == [2.0, 1.0, 3.0] and known.all()


def test_other_entities_own_profiles_do_no_damage_and_those_of_somebody_else_do(world):
    case, ready = world
    for lost, kl in sae.collateral(case, ready.profiles, case.full):
        assert lost == 0 and abs(kl) < 1e-4
    mixed = replace(ready.profiles, target=ready.profiles.target.roll(1, 0))
    damage = sae.collateral(case, mixed, case.full)
    assert damage[1][0] == 1 and all(kl > 1 for _, kl in damage[1:])  # strength 1 takes the name itself out
    assert sae.choose_alpha(torch.arange(5.0), damage) == (0, ())
    alone = planted_case(others=(), facts=planted_facts()[:FORGOTTEN])
    assert sae.collateral(alone, make_profiles(alone), case.full) == [(0.0, 0.0)] * len(sae.ALPHAS)


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
