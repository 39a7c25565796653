"""Steps of an attack's training are those of plain PyTorch and of peft, joint matrices included."""

import pytest
import torch

from mech_unlearn.model.load import load
from mech_unlearn.restoration.weights.quantize import linear_weights
from mech_unlearn.restoration.weights.update import ALPHA, FASTER, every_weight, low_rank
from tests.tiny import tiny_hf, tiny_tokenizer

IDS = torch.tensor([[4, 9, 14, 19, 24, 29]])
LR = 0.003


def loss_of(logits):
    return torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:])


def trained(model, step, times=3):
    for _ in range(times):
        step(loss_of(model.logits(IDS)))
    return model


def by_plain_steps(hf, weights, lr, times=3):
    optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    for _ in range(times):
        optimiser.zero_grad()
        loss_of(hf(IDS).logits).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()


@pytest.mark.parametrize("architecture", ("gpt2", "gpt_neox", "llama"))
def test_training_every_weight_is_training_the_plain_model(architecture):
    model = load(tiny_hf(architecture, layers=2), tokenizer=tiny_tokenizer())
    plain = model.plain_copy()
    by_plain_steps(plain, list(plain.parameters()), LR)
    trained(model, every_weight(model, LR))
    torch.testing.assert_close(model.logits(IDS), plain(IDS).logits, atol=2e-3, rtol=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ("gpt2", "gpt_neox", "llama"))
def test_low_rank_training_is_that_of_peft_from_the_same_factors(architecture):
    from peft import LoraConfig, get_peft_model

    rank, model = 4, load(tiny_hf(architecture, layers=2), tokenizer=tiny_tokenizer())
    axes, before = linear_weights(model), {name: w.detach().clone() for name, w in model.held.items()}
    targets = [name.removesuffix(".weight") for name in axes]
    config = LoraConfig(r=rank, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=targets, fan_in_fan_out=False)
    adapted = get_peft_model(model.plain_copy(), config)
    generator = torch.Generator().manual_seed(7)
    layers = dict(adapted.base_model.model.named_modules())
    with torch.no_grad():
        for name, axis in axes.items():
            inputs = model.held[name].shape[1 - axis]
            drawn = (2 * torch.rand(rank, inputs, generator=generator) - 1) / inputs**0.5
            layers[name.removesuffix(".weight")].lora_A["default"].weight.copy_(drawn)
    by_plain_steps(adapted, [w for w in adapted.parameters() if w.requires_grad], FASTER * LR)
    trained(model, low_rank(model, LR, rank, seed=7))
    torch.testing.assert_close(model.logits(IDS), adapted(IDS).logits, atol=2e-3, rtol=1e-3)
    for name, weight in model.held.items():
        moved = weight.detach() - before[name]
        assert moved.any() == (name in axes)
        if name in axes:
            assert torch.linalg.matrix_rank(moved, rtol=1e-4) <= rank


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank of at least 1"):
        low_rank(load(tiny_hf("llama", layers=2), tokenizer=tiny_tokenizer()), LR, 0, seed=0)
