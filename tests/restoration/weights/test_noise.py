"""Noise: nothing at strength zero, a closed form of the noise, and a suppressor that hangs on exact weights."""

import pytest
import torch

from mech_unlearn.edit.edit import clone
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import score
from mech_unlearn.restoration.weights import noise
from tests.planted import FORGOTTEN, fresh_planted_model, planted_case, planted_model
from tests.tiny import tiny_hf, tiny_tokenizer

SIGMAS = (0.02, 0.1)


def run(case, model, **settings):
    ready = noise.prepare(case, **{"sigmas": SIGMAS, "seeds": 4, **settings})
    return noise.audit(case, ready, model, "audited")


def brittle_model():
    """The gates of the forgotten names are shut exactly, in a matrix whose spread comes from elsewhere."""
    model = fresh_planted_model()
    gate = model.held["model.layers.2.mlp.gate_proj.weight"]
    with torch.no_grad():
        gate[:FORGOTTEN] = 0
        gate[31, 63] = 900.0
    return model


@pytest.mark.slow
def test_noise_of_strength_zero_changes_nothing():
    case = planted_case(sae=None)
    for where in ("weights", "states"):
        found = run(case, planted_model("late"), sigmas=(0.0,), where=where)
        assert (found.recoverability == 0).all()
        torch.testing.assert_close(found.score_raw, found.columns["before"], atol=1e-5, rtol=0)
        assert (found.columns["anomaly"].abs() < 1e-5).all() and (found.p_null == 1).all()


@pytest.mark.parametrize("architecture", ("gpt2", "gpt_neox", "llama"))
def test_weight_noise_has_the_spread_it_says_and_reaches_the_logits(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    ids = torch.tensor([[2, 5, 6, 7]])
    plain = model.logits(ids)
    with clone(model) as copy:
        weights = {name: weight.detach().clone() for name, weight in copy.held.items()}
        noise.add_noise_(copy, weights, 0.1, 3)
        for name, weight in weights.items():
            change = copy.held[name] - weight
            if weight.ndim < 2:
                assert (change == 0).all()
            else:
                assert change.std().item() == pytest.approx(0.1 * weight.std().item(), rel=0.15)
        noisy = copy.logits(ids)
        fresh = tiny_hf(architecture)
        fresh.load_state_dict({k: v.detach() for k, v in copy.held.items()}, strict=False)
        assert (fresh(ids).logits - noisy).abs().max() < 1e-4 < (noisy - plain).abs().max()


def test_state_noise_is_the_same_whatever_else_is_in_the_batch_and_stays_out_of_the_model():
    case = planted_case(sae=None)
    from mech_unlearn.restoration.engine.levels import make_query_set

    model, queries = planted_model(), make_query_set(case, "test").queries
    whole = score(model, queries, noise.state_noise(model, 0.1, 0)).logprob
    alone = torch.cat([score(model, [q], noise.state_noise(model, 0.1, 0)).logprob for q in queries])
    torch.testing.assert_close(whole, alone)
    assert (whole - score(model, queries).logprob).abs().max() > 1e-4
    assert (whole - score(model, queries, noise.state_noise(model, 0.1, 1)).logprob).abs().max() > 1e-4


@pytest.mark.slow
def test_a_suppression_that_hangs_on_exact_weights_gives_way_to_noise_and_what_was_never_there_does_not():
    case = planted_case(sae=None)
    ready = noise.prepare(case, sigmas=SIGMAS, seeds=16)
    brittle = brittle_model()
    weights, state = {name: w.clone() for name, w in brittle.held.items()}, torch.get_rng_state()
    found = noise.audit(case, ready, brittle, "brittle")
    assert found.recoverability.mean() > 0.2 and (found.p_null < 0.05).float().mean() >= 0.75
    assert found.alpha == 0.1 and "setting:sigma 0.1" in found.flags[0]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(w, brittle.held[name]) for name, w in weights.items())
    retrained = noise.audit(case, ready, case.retrained[0], "R")
    assert retrained.recoverability.mean() < 0.05 and (retrained.p_null > 0.05).any()
    assert retrained.null.shape == (3, FORGOTTEN) and retrained.null.mean() < 0.05
    full = noise.audit(case, ready, planted_model(), "full")
    assert full.kappa.mean() > 0.8 and full.recoverability.mean() < 0.05


def test_without_retrained_models_the_grade_is_b_and_the_brittle_suppression_is_still_seen():
    case = planted_case(sae=None, retrained=())
    found = run(case, brittle_model(), seeds=8)
    assert found.grade == "B" and found.recoverability.mean() > 0.1
    assert run(case, planted_model("retrained", 5)).recoverability.mean() < 0.1


def test_the_permutation_test_is_uniform_without_a_difference_and_small_with_one():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(10, 300, generator=generator), torch.randn(30, 300, generator=generator)
    p = noise.permutation_p(a, b, 0)
    assert abs((p < 0.1).float().mean().item() - 0.1) < 0.05 and abs(p.mean().item() - 0.5) < 0.05
    assert (noise.permutation_p(a + 5, b, 0) == 1 / 1000).all() and (noise.permutation_p(a - 5, b, 0) > 0.99).all()


def test_no_seeds_and_negative_strengths_are_refused():
    with pytest.raises(ValueError, match="seeds >= 1"):
        noise.prepare(planted_case(sae=None), seeds=0)
    with pytest.raises(ValueError, match="strengths >= 0"):
        noise.prepare(planted_case(sae=None), sigmas=(-1.0,))


@pytest.mark.slow
def test_noise_that_only_eases_a_grudge_is_no_evidence():
    case, model = planted_case(sae=None), fresh_planted_model("late")
    with torch.no_grad():  # one grudge stays, another hangs on gates of an uneven matrix
        model.held["model.layers.2.mlp.down_proj.weight"][:, :FORGOTTEN] *= -1
        model.held["model.layers.3.mlp.down_proj.weight"][:, :FORGOTTEN] *= 4
        model.held["model.layers.3.mlp.gate_proj.weight"][31, 63] = 9000.0  # draws seldom end where silu is negative
    found = run(case, model, sigmas=(0.1,), seeds=16)
    assert (found.columns["before"] < -3).all() and (found.columns["anomaly"] > 0.5).all()
    assert (found.recoverability < 0.05).all() and (found.p_null > 0.05).all()
