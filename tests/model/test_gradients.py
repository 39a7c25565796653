"""Gradients by held weights are those of the plain model, also where the bridge reads parts of a joint matrix."""

import pytest
import torch
import transformers as t

from mech_unlearn.model.gradients import gradient_of
from mech_unlearn.model.load import load
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

IDS = torch.tensor([[4, 9, 14, 19, 24, 29]])
SHAPE = dict(vocab_size=len(tiny_tokenizer()), initializer_range=0.2, pad_token_id=0, bos_token_id=2, eos_token_id=3)
GPT = dict(SHAPE, n_embd=32, n_layer=2, n_head=4, n_positions=64)
LLAMA = dict(SHAPE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
JOINT = {
    "bloom": (lambda: t.BloomConfig(**SHAPE, hidden_size=32, n_layer=2, n_head=4), 2),
    "codegen": (lambda: t.CodeGenConfig(**GPT, rotary_dim=4), 2),
    "falcon": (lambda: t.FalconConfig(**LLAMA), 2),
    "gpt_bigcode": (lambda: t.GPTBigCodeConfig(**GPT), 2),
    "mpt": (lambda: t.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=SHAPE["vocab_size"]), 2),
    "phi3": (lambda: t.Phi3Config(**LLAMA, intermediate_size=64, num_key_value_heads=2), 4),
}
"""Architecture -> its config, and how many joint matrices are read in parts (Phi-3 joins gate and up as well)."""


def loss_of(logits):
    return torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:])


def random_hf(config):
    """With random biases too: a bias of zeros could have been taken from anywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for weight in hf.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
    return hf


def plain_gradients(model):
    plain = model.plain_copy()
    loss_of(plain(IDS).logits).backward()
    return {name: w.grad for name, w in plain.named_parameters() if w.grad is not None and w.grad.any()}


def assert_plain(model):
    found, wanted = gradient_of(model)(loss_of(model.logits(IDS))), plain_gradients(model)
    assert wanted.keys() == {name for name, gradient in found.items() if gradient.any()}
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * gradient.abs().max().item(), rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_of_every_held_weight_is_the_plain_models(architecture):
    assert_plain(load(tiny_hf(architecture, layers=2), tokenizer=tiny_tokenizer()))


@pytest.mark.parametrize("architecture", JOINT)
def test_however_a_joint_matrix_is_stored_its_gradient_is_the_plain_models(architecture):
    config, n_joint = JOINT[architecture]
    model = load(random_hf(config()), tokenizer=tiny_tokenizer())
    assert len(model.joints()) == n_joint
    assert_plain(model)


def test_of_chosen_weights_only_those_are_given():
    model = load(tiny_hf("gpt_neox", layers=2), tokenizer=tiny_tokenizer())
    names = ["gpt_neox.layers.1.attention.query_key_value.weight", "gpt_neox.layers.0.mlp.dense_h_to_4h.bias"]
    every, some = (gradient_of(model, wanted)(loss_of(model.logits(IDS))) for wanted in (None, names))
    assert some.keys() == set(names)
    assert all(torch.equal(some[name], every[name]) for name in names)


def test_parts_that_no_longer_are_the_joint_matrix_are_refused():
    model = load(tiny_hf("gpt_neox", layers=2), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        model.joints()[1].parts[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"layers\.1\.attention: weight of a part"):
        gradient_of(model)
