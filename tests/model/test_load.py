"""Loading proves that booting changes nothing, and finds out what a model keeps of a prefix."""

import pytest
import torch

from mech_unlearn.model import scores
from mech_unlearn.model.forward import next_logits
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import greedy
from tests.tiny import tiny_hf, tiny_tokenizer
from tests.zoo import zoo_hf


def test_a_model_that_booting_changes_is_refused_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=r"CohereForCausalLM is another model .* differ by \d\d% of the largest"):
            load(zoo_hf("cohere", dtype), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("kind", ("gpt2", "glm4", "falcon-alibi", "mixtral"))
def test_half_precision_rounds_and_is_no_other_model(kind):
    for dtype in (torch.bfloat16, torch.float16):
        assert load(zoo_hf(kind, dtype), tokenizer=tiny_tokenizer()).dtype == dtype


def test_a_model_whose_own_forward_pass_gives_no_numbers_is_refused():
    hf = tiny_hf().to(torch.float16)
    hf.model.norm.weight.data.fill_(60000.0)
    with pytest.raises(ValueError, match="forward pass fails .*no numbers"):
        load(hf, tokenizer=tiny_tokenizer())


def test_loading_leaves_the_random_state_and_the_weights_alone():
    hf = tiny_hf()
    before, state = {name: w.clone() for name, w in hf.state_dict().items()}, torch.get_rng_state()
    model = load(hf, tokenizer=tiny_tokenizer())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.weights[name], before[name]) for name in model.weights)


@pytest.mark.parametrize(("kind", "keeps"), [("mpt", False), ("mamba", False), ("llama", True)])
def test_a_model_with_alibi_or_states_reads_whole_rows_and_one_with_rotary_angles_its_cache(kind, keeps, monkeypatch):
    model, cached = load(zoo_hf(kind), tokenizer=tiny_tokenizer()), []
    monkeypatch.setattr(scores, "next_logits", lambda *given: cached.append(given) or next_logits(*given))
    greedy(model, [[2, 9, 10, 11]], 3)
    assert model.keeps_prefix == keeps == bool(cached)
