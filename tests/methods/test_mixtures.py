"""Where each token takes its own experts, methods that train work; those that write one output matrix say why not."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.locate import LOCATORS
from mech_unlearn.methods import METHODS
from mech_unlearn.methods.npo import Npo
from mech_unlearn.methods.rmu import Rmu
from mech_unlearn.model.load import load
from mech_unlearn.training.schedule import Schedule
from tests.tiny import tiny_tokenizer
from tests.zoo import zoo_hf

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "llama4")
IDS = torch.tensor([[2, 9, 10, 11, 12]])


def fit(kind, method, sets):
    model = load(zoo_hf(kind), tokenizer=tiny_tokenizer())
    return model, method.fit(model, *sets)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("name", ("rocr", "rome", "r_rome", "memit", "needle"))
def test_a_method_that_writes_one_output_matrix_is_refused_in_a_line_that_names_the_experts(kind, name, tiny_sets):
    with pytest.raises(
        KeyError, match=r"ForCausalLM is a mixture of experts \(.*experts.down_proj \[\d, \d+, \d+\]\).*npo"
    ) as error:
        fit(kind, METHODS[name](), tiny_sets)
    assert "\n" not in error.value.args[0]


def test_knowledge_neurons_of_a_mixture_are_refused_likewise(tiny_sets):
    model = load(zoo_hf("mixtral"), tokenizer=tiny_tokenizer())
    with pytest.raises(KeyError, match="is a mixture of experts"):
        LOCATORS["knowledge_neurons"].run(model, tiny_sets[0].facts)


@pytest.mark.parametrize("kind", MIXTURES)
def test_rmu_trains_all_experts_of_its_layers_and_nothing_else(kind, tiny_sets):
    model, edit = fit(kind, replace(Rmu(layer=1, layers=(1,)), schedule=Schedule(lr=1e-2, epochs=1)), tiny_sets)
    assert set(edit.deltas) == set(model.mlp_writers(1)) and f"{model.block(1)}." in next(iter(edit.deltas))
    before = model.logits(IDS)
    with edit.on(model):
        assert (model.logits(IDS) - before).abs().max() > 1e-4
    assert torch.equal(model.logits(IDS), before)


@pytest.mark.parametrize("kind", ("mixtral", "gpt_oss", "lfm2", "mamba"))
def test_a_method_with_a_loss_on_outputs_needs_no_output_matrix(kind, tiny_sets):
    model, edit = fit(kind, replace(Npo(), schedule=Schedule(lr=1e-2, epochs=1)), tiny_sets)
    before = model.logits(IDS)
    with edit.on(model):
        assert (model.logits(IDS) - before).abs().max() > 1e-4
    assert torch.equal(model.logits(IDS), before)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ("opt", "xglm", "bloom", "lfm2", "falcon", "phi", "mpt"))
@pytest.mark.parametrize("name", ("rocr", "rome", "memit"))
def test_a_dense_mlp_is_written_whatever_the_architecture_calls_it(kind, name, tiny_sets):
    model, edit = fit(kind, METHODS[name](), tiny_sets)
    written = {model.w_out(layer)[0] for layer in range(model.n_layers)}
    before = model.logits(IDS)
    assert edit.deltas and set(edit.deltas) <= written
    with edit.on(model):
        assert (model.logits(IDS) - before).abs().max() > 1e-5
    assert torch.equal(model.logits(IDS), before)
