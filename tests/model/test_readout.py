"""The differentiable readout against the model's own output, finite differences, and the model left as it was."""

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.model.load import load
from mech_unlearn.model.readout import readout
from mech_unlearn.model.tokens import make_queries
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer


def some_states(count=7, width=32):
    return 2 * torch.randn(count, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_states_read_out_to_the_models_logits(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    ids = torch.tensor([[2, 5, 9, 30, 7], [2, 8, 12, 31, 6]])
    last: list[torch.Tensor] = []
    with torch.no_grad(), model.hooks((Site(model.n_layers - 1, "resid_post"), lambda x: last.append(x))):
        logits = model.logits(ids)
        again = readout(model, last[0].flatten(0, 1))
        # what hooks the layers' outputs sees the readout no more than it sees a layer
        assert len(last) == 1
    torch.testing.assert_close(again, logits.flatten(0, 1), atol=2e-5, rtol=1e-5)
    states = some_states()
    rows = torch.zeros(len(states), 1, dtype=torch.long)
    with torch.no_grad():
        with model.hooks((Site(model.n_layers - 1, "resid_post"), lambda _: states[:, None])):
            whole = model.logits(rows)[:, 0]
        torch.testing.assert_close(readout(model, states), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_with_respect_to_the_states_are_those_of_finite_differences(architecture):
    model = load(tiny_hf(architecture).double(), tokenizer=tiny_tokenizer())
    states, direction = some_states(3).double(), torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).double()
    leaf = states.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(readout(model, leaf).log_softmax(-1)[:, 5].sum(), leaf)

    def f(step):
        with torch.no_grad():
            return readout(model, states + step * direction).double().log_softmax(-1)[:, 5].sum()

    step = 1e-3  # the logits are float32
    expected = (f(step) - f(-step)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), expected, atol=2e-3, rtol=2e-3)
    assert all(weight.grad is None for weight in model.held.values())


def test_the_layers_are_back_afterwards_also_when_reading_out_fails(tiny_model):
    ids = torch.tensor([[2, 5, 9, 30, 7]])
    with torch.no_grad():
        before = tiny_model.logits(ids)
        readout(tiny_model, some_states())
        assert torch.equal(tiny_model.logits(ids), before)
        with pytest.raises(RuntimeError, match="hooks that never fired"), tiny_model.hooks(("hook_embed", lambda x: x)):
            pass
        too_much = tiny_model.hooks(("unembed.hook_in", lambda x: x[..., :5]))
        with pytest.raises(RuntimeError), too_much:
            readout(tiny_model, some_states())
        assert torch.equal(tiny_model.logits(ids), before)
    with pytest.raises(ValueError, match="states of 31 dimensions"):
        readout(tiny_model, some_states(width=31))


def test_no_decoder_layer_runs_on_the_states(tiny_model):
    rows: list[int] = []
    handles = [b.mlp.register_forward_hook(lambda m, a, out: rows.append(len(out))) for b in tiny_model.bridge.blocks]
    readout(tiny_model, some_states(50))
    for handle in handles:
        handle.remove()
    assert rows == [1]  # the one token that shows what a layer returns


def test_under_an_intervention_the_states_are_read_as_they_are(tiny_model):
    (query, *_) = make_queries(tiny_model.tokenizer, tiny_facts(["Anna Lee"]), "prompt")
    a, b = query.span
    shift = Shift(Site(3, "resid_post"), (query.prompt[a:b],), torch.ones(1, 32))
    states = some_states()
    with torch.no_grad():
        plain = readout(tiny_model, states)
        with Edit(name="shift", base=tiny_model.hash(), interventions=(shift,)).on(tiny_model):
            tiny_model.logits(torch.tensor([query.prompt]))
            assert torch.equal(readout(tiny_model, states), plain)
