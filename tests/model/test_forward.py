"""Passes that leave out what nobody reads give what whole passes give, and notice whatever else acts on a model."""

import pytest
import torch

from experiments.ensemble import join
from mech_unlearn.core import Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.edit.interventions import Ban
from mech_unlearn.model.forward import last_logits, logits_at, next_logits
from mech_unlearn.model.load import load
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

IDS = torch.randint(4, 60, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", (*ARCHITECTURES, "opt"))
@torch.no_grad()
def test_last_and_next_logits_are_those_of_the_whole_pass(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    whole, cache = model.logits(IDS), None
    for positions in (1, 7, 20):
        torch.testing.assert_close(last_logits(model, IDS, positions), whole[:, -positions:], rtol=1e-6, atol=1e-6)
    for length in range(11, 21):  # ten tokens are more than the window of the tiny Gemma
        found, cache = next_logits(model, IDS[:, :length], cache)
        torch.testing.assert_close(found, whole[:, length - 1], rtol=1e-5, atol=1e-5)
        assert cache.get_seq_length() == length


@pytest.mark.parametrize("architecture", (*ARCHITECTURES, "opt"))
def test_chosen_logits_and_their_gradients_are_those_of_the_whole_pass(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    mask = torch.ones_like(IDS)
    mask[1, 12:] = 0
    places, grads = (torch.tensor([0, 1, 1, 2]), torch.tensor([0, 3, 11, 19])), []
    for read in (lambda: model.logits(IDS, mask)[places], lambda: logits_at(model, IDS, mask, places)):
        weight = next(iter(model.held.values())).requires_grad_()
        found = read()
        grads.append((found, *torch.autograd.grad(found.square().sum(), weight)))
        weight.requires_grad_(False)
    for whole, part in zip(*grads, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)
    assert not model.hf.get_output_embeddings()._forward_pre_hooks


@torch.no_grad()
def test_only_the_last_positions_are_unembedded_unless_something_reads_logits_by_position(tiny_model):
    seen = []
    head = tiny_model.hf.get_output_embeddings()
    plain = tiny_model.logits(IDS)

    def first_to_zero(x):
        seen.append(x.shape[1])
        return torch.cat([x[:, :1] * 0, x[:, 1:]], 1)

    with tiny_model.hooks(("ln_final.hook_out", lambda x: seen.append(x.shape[1]))):
        assert last_logits(tiny_model, IDS, 2).shape[1] == 2  # hooks in front of the unembedding see whole rows
    with tiny_model.hooks(("unembed.hook_out", first_to_zero)):
        changed = last_logits(tiny_model, IDS, 20)
        assert (changed[:, 0] == 0).all() and torch.equal(last_logits(tiny_model, IDS, 2), changed[:, -2:])
    handle = head.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    assert torch.equal(last_logits(tiny_model, IDS, 2), plain[:, -2:])
    handle.remove()
    assert seen == [20] * 4
    ban = Ban(subjects=(tuple(IDS[0, 3:5].tolist()),), tokens=((7,),), penalty=100.0)
    with Edit(name="b", base="", interventions=(ban,)).on(tiny_model):
        banned = last_logits(tiny_model, IDS, 2)
    expected = plain[:, -2:].clone()
    expected[0, :, 7] -= 100
    torch.testing.assert_close(banned, expected)
    with pytest.raises(ValueError, match="65 tokens; .* has 64 positions"):
        last_logits(tiny_model, torch.ones(1, 65, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="65 tokens; .* has 64 positions"):
        next_logits(tiny_model, torch.ones(1, 65, dtype=torch.long))


def test_a_model_is_untouched_until_anything_is_hung_onto_it_and_again_when_it_is_gone(tiny_model):
    shift = Shift(Site(1, "resid_post"), ((9, 10),), torch.ones(1, 32))
    block = tiny_model.bridge.blocks[0]
    assert tiny_model.in_force.nothing()
    with tiny_model.hooks(("blocks.2.hook_resid_post", lambda x: None)):
        assert not tiny_model.in_force.nothing()
        tiny_model.logits(IDS)
    with Edit(name="s", base="", interventions=(shift,)).on(tiny_model):
        assert not tiny_model.in_force.nothing()
        tiny_model.logits(IDS)
    for register in (block.register_forward_hook, block.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert not tiny_model.in_force.nothing()
        handle.remove()
    object.__setattr__(block, "forward", block.forward)
    assert not tiny_model.in_force.nothing()
    block.__dict__.pop("forward")
    weight = tiny_model.held["lm_head.weight"]
    with Edit(name="w", base=tiny_model.hash(), deltas={"lm_head.weight": torch.ones_like(weight)}).on(tiny_model):
        assert tiny_model.in_force.nothing()  # weights are what a cache is made of
    assert tiny_model.in_force.nothing()


@torch.no_grad()
def test_models_that_answer_together_are_asked_together():
    parts = [load(tiny_hf("llama", seed=seed), tokenizer=tiny_tokenizer()) for seed in (0, 1)]
    both = join(parts)
    ids = torch.arange(4, 16).reshape(2, 6)
    assert not both.in_force.nothing()
    whole = torch.stack([part.logits(ids).log_softmax(-1) for part in parts]).mean(0)
    assert not torch.allclose(whole[:, -1], parts[0].logits(ids)[:, -1].log_softmax(-1), atol=1e-3)
    torch.testing.assert_close(last_logits(both, ids, 2), whole[:, -2:])
