"""Rounding: bounds, a no-op at many bits, the right matrices, and a planted suppression that rounding undoes."""

import sys

import pytest
import torch

from mech_unlearn.edit.edit import clone
from mech_unlearn.model.load import load
from mech_unlearn.restoration.engine.normalise import relation_mean
from mech_unlearn.restoration.weights import quantize
from tests.planted import fresh_planted_model, planted_case, planted_model
from tests.tiny import tiny_hf, tiny_tokenizer


def random_weight(seed=0):
    return torch.randn(12, 40, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", (3, 4, 8))
@pytest.mark.parametrize("axis", (0, 1))
def test_rounding_is_off_by_half_a_step_at_the_most(bits, axis):
    weight = random_weight()
    step = weight.double().abs().amax(1 - axis, keepdim=True) / (2 ** (bits - 1) - 1)
    error = (quantize.round_to_nearest(weight, bits, axis).double() - weight.double()).abs()
    assert (error <= step / 2 + 1e-6).all()
    assert error.max() > 0.4 * step.min()


def test_rounding_to_4_bits_leaves_15_values_per_channel_and_32_bits_change_nothing():
    weight = random_weight()
    assert max(len(row.unique()) for row in quantize.round_to_nearest(weight, 4)) <= 15
    assert torch.allclose(quantize.round_to_nearest(weight, 32), weight, atol=1e-8)
    assert not torch.allclose(quantize.round_to_nearest(weight, 4), weight, atol=1e-2)


def test_rounding_again_changes_nothing():
    once = quantize.round_to_nearest(random_weight(), 4)
    assert torch.allclose(quantize.round_to_nearest(once, 4), once, atol=1e-6)


def test_a_channel_of_zeros_stays_zero_and_one_bit_is_refused():
    weight = random_weight()
    weight[3] = 0
    assert (quantize.round_to_nearest(weight, 4)[3] == 0).all()
    with pytest.raises(ValueError, match="2 bits"):
        quantize.codes(weight, 1)


@pytest.mark.parametrize("architecture", ("gpt2", "gpt_neox", "llama"))
def test_linear_layers_are_rounded_and_embeddings_and_output_matrix_are_not(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    before = {name: weight.detach().clone() for name, weight in model.held.items()}
    axes = quantize.linear_weights(model)
    ids = torch.tensor([[2, 5, 6, 7, 8]])
    logits = model.logits(ids)
    quantize.quantize_(model, 4)
    changed = {name for name, weight in model.held.items() if not torch.equal(weight, before[name])}
    assert changed == set(axes)
    per_layer = {"gpt2": 4, "gpt_neox": 4, "llama": 7}[architecture]
    assert len(axes) == per_layer * model.n_layers
    assert not any(word in name for name in axes for word in ("wte", "wpe", "embed", "lm_head"))
    fresh = tiny_hf(architecture)
    with torch.no_grad():
        for name, weight in fresh.named_parameters():
            if name in axes:
                weight.copy_(quantize.round_to_nearest(weight, 4, axes[name]))
        plain = fresh(ids).logits
        assert (model.logits(ids) - plain).abs().max() < 1e-5 < (logits - plain).abs().max()


def test_conv1d_is_rounded_along_its_columns():
    assert set(quantize.linear_weights(load(tiny_hf("gpt2"), tokenizer=tiny_tokenizer())).values()) == {1}


def test_codes_agree_with_themselves_and_part_with_distance():
    a, b, c = planted_model(), fresh_planted_model(), fresh_planted_model()
    with torch.no_grad():
        b.held["model.layers.0.self_attn.q_proj.weight"].add_(1e-5)
        c.held["model.layers.0.self_attn.q_proj.weight"].mul_(-1)
    assert quantize.code_agreement(a, a, 4) == 1
    assert quantize.code_agreement(a, b, 4) > 0.99 > quantize.code_agreement(a, c, 4)


def test_a_suppression_smaller_than_half_a_step_is_undone_by_rounding_and_the_model_is_left_alone():
    case = planted_case(sae=None)
    masked = fresh_planted_model()
    gate = masked.held["model.layers.2.mlp.gate_proj.weight"]
    with torch.no_grad():
        # The person direction closes each name's gate a little: below half a step of the row's largest entry.
        masked.held["model.layers.2.mlp.down_proj.weight"][40:44].fill_(0.02 * 3 / 64)
        gate[:4, 8] = -0.06
        masked.held["model.layers.2.mlp.up_proj.weight"][:4, 8] = -0.06
    weights = {name: w.clone() for name, w in masked.held.items()}
    ready = quantize.prepare(case, bits=4)
    before, after = ready.levels.query_set.margins(masked)[0], quantize.audit(case, ready, masked, "masked").score_raw
    assert (after > before + 0.1).all() and torch.allclose(after, ready.levels.full, atol=0.3)
    assert (quantize.audit(case, ready, masked, "masked").recoverability > 0.01).all()
    assert all(torch.equal(w, masked.held[name]) for name, w in weights.items())


def test_rounding_gives_a_retrained_model_nothing():
    case = planted_case(sae=None)
    ready = quantize.prepare(case, bits=4)
    assert (quantize.audit(case, ready, case.retrained[0], "R").recoverability <= 0.05).all()


def test_the_16_values_of_nf4_are_the_published_ones():
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    torch.testing.assert_close(
        quantize.normal_quantiles(), torch.tensor(published, dtype=torch.float64), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("axis", (0, 1))
def test_nf4_gives_each_weight_the_nearest_value_of_its_block(axis):
    weight = random_weight()
    how = quantize.Rounding(bits=4, group=16, code="nf4")
    code, near = quantize.rounded(weight, how, axis)
    rows, got, index = (x if axis == 0 else x.T for x in (weight, near, code))
    values = quantize.normal_quantiles()
    for r in range(len(rows)):
        for start in range(0, rows.shape[1], 16):
            block = rows[r, start : start + 16].double()
            table = values * block.abs().max()
            nearest = (block[:, None] - table).abs().argmin(1)
            assert index[r, start : start + 16].tolist() == nearest.tolist()
            torch.testing.assert_close(got[r, start : start + 16], table[nearest].float())


@pytest.mark.parametrize("bits", (3, 4))
def test_smaller_groups_round_more_finely_and_one_group_is_the_whole_channel(bits):
    weight = random_weight()
    whole = quantize.rounded(weight, quantize.Rounding(bits=bits))[1]
    assert torch.equal(whole, quantize.round_to_nearest(weight, bits))
    torch.testing.assert_close(quantize.rounded(weight, quantize.Rounding(bits=bits, group=40))[1], whole)
    torch.testing.assert_close(quantize.rounded(weight, quantize.Rounding(bits=bits, group=64))[1], whole)
    fine = quantize.rounded(weight, quantize.Rounding(bits=bits, group=8))[1]
    assert (fine - weight).square().mean() < (whole - weight).square().mean()


def test_rounding_that_makes_no_sense_is_refused():
    for wrong in (
        dict(bits=1),
        dict(group=0),
        dict(bits=8, code="nf4", group=64),
        dict(code="nf4"),
        dict(code="bitsandbytes", group=32),
    ):
        with pytest.raises(ValueError, match="bits"):
            quantize.Rounding(**wrong)


def test_nf4_undoes_a_small_suppression_and_carries_its_own_name():
    case = planted_case(sae=None)
    ready = quantize.prepare(case, bits=4, group=64, code="nf4")
    masked = fresh_planted_model()
    with torch.no_grad():
        for part in ("gate_proj", "up_proj"):
            masked.held[f"model.layers.2.mlp.{part}.weight"][:4, 8] = -0.035
    found = quantize.audit(case, ready, masked, "masked")
    assert (
        found.test == "nf4" and (found.score_raw > found.columns["before"]).all() and (found.recoverability > 0).all()
    )
    assert (quantize.audit(case, ready, case.retrained[0], "R").recoverability <= 0.05).all()


def test_without_bitsandbytes_rounding_by_it_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ValueError, match=r"pip install 'mech_unlearn\[bitsandbytes\]'"):
        quantize.prepare(planted_case(sae=None, retrained=()), bits=4, group=64, code="bitsandbytes")


@pytest.mark.parametrize("axis", (0, 1))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_bitsandbytes_rounds_to_our_nf4_but_for_the_8_bits_of_its_steps(axis, dtype):
    pytest.importorskip("bitsandbytes", reason="the optional extra mech_unlearn[bitsandbytes] is not installed")
    shape = (64, 128) if axis == 0 else (128, 64)  # blocks of 64 along the whole matrix end where channels do
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = (
        quantize.rounded(weight, quantize.Rounding(bits=4, group=64, code=code), axis)
        for code in ("nf4", "bitsandbytes")
    )
    assert theirs[1].dtype == dtype and theirs[1].shape == weight.shape
    assert (ours[0] == theirs[0]).float().mean() > 0.999  # ties in float32
    torch.testing.assert_close(theirs[1], ours[1], atol=0.02 * weight.abs().max().item(), rtol=0)
    assert not torch.equal(theirs[1], ours[1])


def test_an_audit_by_bitsandbytes_carries_its_name_and_gives_a_retrained_model_nothing():
    pytest.importorskip("bitsandbytes", reason="the optional extra mech_unlearn[bitsandbytes] is not installed")
    case = planted_case(sae=None)
    ready, digest = quantize.prepare(case, bits=4, group=64, code="bitsandbytes"), case.retrained[0].hash()
    found = quantize.audit(case, ready, case.retrained[0], "R")
    assert found.test == "nf4_bitsandbytes" and case.retrained[0].hash() == digest
    assert (found.recoverability <= 0.05).all()
    with clone(case.full) as copy:
        quantize.quantize_(copy, quantize.Rounding(bits=4, group=64, code="bitsandbytes"))
        scored = ready.levels.query_set.margins(copy)[0]
    torch.testing.assert_close(quantize.audit(case, ready, case.full, "F").score_raw, scored)


def tiny_mixture(kind):
    """A random mixture of four experts."""
    import transformers as t

    shape = dict(vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    config = {"mixtral": t.MixtralConfig, "gpt_oss": t.GptOssConfig}[kind](
        **shape, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind, axis", (("mixtral", 0), ("gpt_oss", 1)))
def test_each_expert_of_a_mixture_is_rounded_by_itself_along_its_own_output_channels(kind, axis):
    model = load(tiny_mixture(kind), tokenizer=tiny_tokenizer())
    experts = quantize.expert_weights(model)
    assert len(experts) == 2 * model.n_layers and set(experts.values()) == {axis}
    before = {name: model.held[name].detach().clone() for name in experts}
    ids = torch.tensor([[2, 5, 6, 7, 8]])
    logits = model.logits(ids)
    linear = quantize.linear_weights(model)
    (flag,) = quantize.coverage_flags(model, linear)
    assert float(flag.removeprefix("covers:")) < 0.5
    assert quantize.code_agreement(model, model, 4) == 1
    quantize.quantize_(model, 4)
    for name, weight in before.items():
        for e in range(4):
            assert torch.equal(model.held[name][e], quantize.round_to_nearest(weight[e], 4, axis))
    assert (model.logits(ids) - logits).abs().max() > 1e-6


def test_a_dense_model_is_covered_and_part_of_one_is_flagged_with_its_share():
    model = planted_model()
    linear = quantize.linear_weights(model)
    assert quantize.coverage_flags(model, linear) == ()
    attention = {name: axis for name, axis in linear.items() if "self_attn" in name}
    share = sum(model.held[n].numel() for n in attention) / sum(model.held[n].numel() for n in linear)
    assert quantize.coverage_flags(model, attention) == (f"covers:{share:.2f}",)


def test_without_retrained_models_the_level_of_ignorance_is_that_of_shams_after_rounding():
    case = planted_case(sae=None, retrained=())
    ready, model = quantize.prepare(case, bits=3), planted_model("early")
    found = quantize.audit(case, ready, model, "early")
    with clone(model) as copy:
        quantize.quantize_(copy, 3)
        shams = ready.levels.query_set.margins(copy)[1:]
    assert found.grade == "B" and torch.equal(found.score_retrained, relation_mean(shams, case.facts))
