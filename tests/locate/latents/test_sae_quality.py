"""The quality of SAEs whose quality is known: perfect, empty, constant; and against a plain loop."""

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.locate.latents.sae_quality import sae_quality
from mech_unlearn.model.latents import Sae, fvu, load_sae
from mech_unlearn.model.load import load
from mech_unlearn.model.pieces import token_rows
from mech_unlearn.testbed import open_world
from tests.tiny import tiny_hf, tiny_tokenizer

SITE = Site(2, "resid_post")


@pytest.fixture(scope="module")
def world():
    """The full model of the shipped biographies and some of its texts: ablating a layer costs it much."""
    opened = open_world("biographies")
    return load(opened.full), opened.retain.texts[:24]


def standard(encoder, decoder, bias=None, b_enc=None):
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    d_in, d_sae = encoder.shape
    sae = StandardSAE(
        StandardSAEConfig(d_in=d_in, d_sae=d_sae, dtype="float32", device="cpu", apply_b_dec_to_input=False)
    )
    with torch.no_grad():
        for weight, value in ((sae.W_enc, encoder), (sae.W_dec, decoder)):
            weight.copy_(value)
        sae.b_enc.copy_(torch.zeros(d_sae) if b_enc is None else b_enc)
        sae.b_dec.copy_(torch.zeros(d_in) if bias is None else bias)
    return sae.eval().requires_grad_(False)


def both_signs(width):
    """Latents that are the positive and the negative part of each dimension: nothing is lost."""
    eye = torch.eye(width)
    return torch.cat([eye, -eye], 1), torch.cat([eye, -eye], 0)


def test_an_sae_that_loses_nothing_recovers_the_whole_loss(world):
    model, texts = world
    found = sae_quality(model, Sae(SITE, standard(*both_signs(128))), texts)
    assert found.fvu.value == pytest.approx(0.0, abs=1e-12) and found.ce_clean.value < found.ce_zero.value
    assert found.recovered.value == pytest.approx(1.0, abs=1e-6)
    assert found.recovered_mean.value == pytest.approx(1.0, abs=1e-6)
    assert found.fvu.n == sum(len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def test_an_empty_sae_recovers_nothing_and_a_constant_one_nothing_beyond_the_mean(world):
    model, texts = world
    empty = torch.zeros(128, 8), torch.zeros(8, 128)
    found = sae_quality(model, Sae(SITE, standard(*empty)), texts)
    assert found.recovered.value == 0.0 and found.recovered.ci == (0.0, 0.0)
    assert found.ce_sae == found.ce_zero and found.l0.value == 0.0 and found.dead == 1.0
    constant = sae_quality(model, Sae(SITE, standard(*empty, _states(model, texts).mean(0))), texts)
    assert constant.fvu.value == pytest.approx(1.0, rel=1e-5)
    assert constant.recovered_mean.value == pytest.approx(0.0, abs=1e-5)
    assert constant.ce_sae.value == pytest.approx(constant.ce_mean.value, abs=1e-5)


@pytest.mark.slow
def test_the_shipped_sae_recovers_the_loss_and_one_of_another_layer_does_not(world):
    model, texts = world
    sae = load_sae(open_world("biographies").sae, model)
    fine = sae_quality(model, sae, texts)
    assert fine.recovered.value > 0.99 and fine.fvu.value < 0.05 and fine.l0.value == pytest.approx(32, abs=0.1)
    wrong = sae_quality(model, Sae(Site(4, "resid_post"), sae.sae), texts)
    assert wrong.fvu.ci[0] > fine.fvu.ci[1] and wrong.recovered.ci[1] < fine.recovered.ci[0]


def _states(model, texts):
    kept = []
    with torch.no_grad(), model.hooks((SITE, lambda x: kept.append(x[0, 1:]))):
        for text in texts:
            model.logits(torch.tensor([model.tokenizer(text)["input_ids"]]))
    return torch.cat(kept)


def test_every_number_is_that_of_a_plain_loop_over_single_texts():
    model = load(tiny_hf("gpt2"), tokenizer=tiny_tokenizer())
    texts = ("Rivers run to the sea .", "rain falls on hills and the sea .", "Anna Lee was born in Rome .")
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(32, 48, generator=generator), torch.randn(48, 32, generator=generator) / 50
    sae = Sae(SITE, standard(*weights, b_enc=torch.full((48,), -6.0)))
    found = sae_quality(model, sae, texts)
    mean = _states(model, texts).mean(0)
    replaced = {"clean": lambda h: h, "sae": sae.reconstruct, "zero": torch.zeros_like, "mean": mean.expand_as}
    for name, make in replaced.items():
        losses = []
        for text in texts:
            ids = torch.tensor([model.tokenizer(text)["input_ids"]])
            with torch.no_grad(), model.hooks((SITE, lambda x, m=make: torch.cat([x[:, :1], m(x[:, 1:])], 1))):
                table = model.logits(ids)[0].log_softmax(-1)
            losses += [-table[t, ids[0, t + 1]].item() for t in range(ids.shape[1] - 1)]
        measured = getattr(found, f"ce_{name}")
        assert measured.value == pytest.approx(sum(losses) / len(losses), rel=1e-5) and measured.n == len(losses)
    active = sae.encode(_states(model, texts)) > 1e-6
    assert found.l0.value == pytest.approx(active.sum(1).double().mean().item())
    assert 0 < found.dead < 1 and found.dead == pytest.approx(1 - active.any(0).float().mean().item())
    assert found.fvu.value == pytest.approx(fvu(model, sae, token_rows(model, texts)), rel=1e-5)
    assert all(m.ci[0] <= m.value <= m.ci[1] for m in (found.fvu, found.ce_clean, found.ce_sae, found.l0))
    shares = [found.ce_zero.value - x.value for x in (found.ce_sae, found.ce_clean)]
    if shares[1] > 0:
        assert found.recovered.value == pytest.approx(shares[0] / shares[1], rel=1e-5)
    else:  # ablation that costs nothing leaves nothing to recover
        assert found.recovered.value != found.recovered.value


def test_the_size_of_batches_changes_nothing_and_the_random_state_is_left_alone(world):
    model, texts = world
    sae, state = Sae(SITE, standard(*both_signs(128))), torch.get_rng_state()
    first, second = (sae_quality(model, sae, texts, max_tokens=n) for n in (2048, 20))
    assert first.ce_zero.value == pytest.approx(second.ce_zero.value, rel=1e-5) and first.l0.value == second.l0.value
    assert torch.equal(torch.get_rng_state(), state)


def test_too_little_text_and_saes_of_other_models_are_refused(world):
    model, texts = world
    for few in ((), ("",)):
        with pytest.raises(ValueError, match="fewer than two tokens"):
            sae_quality(model, Sae(SITE, standard(*both_signs(128))), few)
    with pytest.raises(ValueError, match="reads 32 dimensions, L2 resid_post of .* has 128"):
        sae_quality(model, Sae(SITE, standard(*both_signs(32))), texts)
    with pytest.raises(ValueError, match="sits at L9 resid_post"):
        sae_quality(model, Sae(Site(9, "resid_post"), standard(*both_signs(128))), texts)
