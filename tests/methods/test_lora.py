"""Lora: what is merged is alpha / rank x B A and nothing else, also where weights are transposed or fused."""

import pytest
import torch

from mech_unlearn.edit.edit import Edit, LowRank
from mech_unlearn.methods import GradAscent, LastLayerAscent, Lora, Npo
from mech_unlearn.methods.lora import Factors
from mech_unlearn.model.load import load
from mech_unlearn.training.rows import answer_rows, nll, score_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.trainee import changes, trained_copy
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

FAST = Schedule(lr=1e-2, epochs=2, batch_size=4)
LINEAR = {"gpt2": 4, "gpt_neox": 4, "llama": 7, "gemma2": 7, "qwen3": 7, "olmo2": 7}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_merged_change_is_the_product_of_the_factors_and_of_low_rank(architecture, tiny_sets):
    model = load(tiny_hf(architecture, layers=2), tokenizer=tiny_tokenizer())
    hf = trained_copy(model, "")
    blocks = tuple(model.w_out(layer)[0].split(".mlp.")[0] + "." for layer in range(2))
    adapter = Factors(Lora(rank=3, alpha=6.0), model.name, blocks)
    adapted = adapter.attach(hf)
    free = {n: w for n, w in adapted.named_parameters() if w.requires_grad}
    assert len(free) == 2 * 2 * LINEAR[architecture] and all("lora_" in n for n in free)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in free.values():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    parts = {n.replace("base_model.model.", ""): w.detach().clone() for n, w in free.items()}
    found = changes(model, adapter.merge(adapted))
    assert len(found) == 2 * LINEAR[architecture]
    for name, delta in found.items():
        path = name.removesuffix(".weight")
        a, b = (parts[f"{path}.lora_{side}.default.weight"] for side in "AB")
        wanted = 2.0 * b @ a
        wanted = wanted.T if architecture == "gpt2" else wanted
        torch.testing.assert_close(delta, wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(adapter.factors()[name].dense(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ("gpt2", "gpt_neox", "llama"))
def test_the_edit_holds_factors_and_does_what_the_trained_model_did(architecture, tiny_sets, tmp_path):
    model = load(tiny_hf(architecture, layers=2), tokenizer=tiny_tokenizer())
    edit = Lora(base=Npo(schedule=FAST), rank=2).fit(model, *tiny_sets)
    assert edit.deltas and all(isinstance(d, LowRank) and d.left.shape[1] == 2 for d in edit.deltas.values())
    assert all(torch.linalg.matrix_rank(d.dense().double(), rtol=1e-5) <= 2 for d in edit.deltas.values())
    rows = answer_rows(model.tokenizer, tiny_sets[0].facts)
    before = nll(score_rows(model.hf, rows, 0, model.device)).item()
    edit.save(tmp_path / "edit.safetensors")
    with Edit.load(tmp_path / "edit.safetensors", model).on(model):
        scores = score_rows(model.hf, rows, 0, model.device)
    assert nll(scores).item() > before
    assert scores.exact.float().mean().item() == edit.recipe["report"]["forget_recall"]
    assert edit.recipe["report"]["adapted"] == len(edit.deltas)


def test_the_random_state_is_left_alone_and_the_seed_draws_the_factors(tiny_model, tiny_sets):
    state, before = torch.random.get_rng_state(), tiny_model.hash()
    one, same, other = (
        Lora(base=Npo(schedule=FAST), rank=2, seed=seed).fit(tiny_model, *tiny_sets) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state) and tiny_model.hash() == before
    name = next(iter(one.deltas))
    assert torch.equal(one.deltas[name].dense(), same.deltas[name].dense())
    assert not torch.equal(one.deltas[name].dense(), other.deltas[name].dense())
    assert not any("lora" in n for n, _ in tiny_model.hf.named_modules())


def test_only_what_matches_and_what_the_base_trains_is_adapted(tiny_model, tiny_sets):
    queries = Lora(base=Npo(schedule=FAST), targets="q_proj|v_proj", rank=2).fit(tiny_model, *tiny_sets)
    assert len(queries.deltas) == 8 and all("q_proj" in n or "v_proj" in n for n in queries.deltas)
    last = Lora(
        base=LastLayerAscent(schedule=Schedule(lr=1e-2, epochs=1, batch_size=4, weight_decay=0.0, stop_recall=0.1)),
        rank=2,
    ).fit(tiny_model, *tiny_sets)
    assert len(last.deltas) == 7 and all(".3." in n for n in last.deltas)
    everything = Lora(base=Npo(schedule=FAST), rank=2).fit(tiny_model, *tiny_sets)
    assert not any("embed" in n or "lm_head" in n or "norm" in n for n in everything.deltas)


def test_a_bfloat16_model_is_adapted_in_float32(tiny_sets):
    model = load(tiny_hf("llama", layers=2).to(torch.bfloat16), tokenizer=tiny_tokenizer())
    edit = Lora(base=Npo(schedule=Schedule(lr=1e-4, epochs=1, batch_size=4)), rank=2).fit(model, *tiny_sets)
    assert all(d.left.dtype == torch.float32 for d in edit.deltas.values())


def test_what_cannot_be_adapted_is_refused(tiny_model, tiny_sets):
    for method, message in (
        (Lora(targets="no such"), "no linear layer"),
        (Lora(base=GradAscent(only="embeddings")), "no linear layer"),
        (Lora(rank=0), "rank must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            method.fit(tiny_model, *tiny_sets)
