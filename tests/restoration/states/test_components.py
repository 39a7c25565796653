"""Restored components: all of them give F back, none nothing, and a planted block lies where it was planted."""

import pytest
import torch

from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import make_queries
from mech_unlearn.restoration import Case
from mech_unlearn.restoration.engine.case import require_same_shape
from mech_unlearn.restoration.states import components
from mech_unlearn.restoration.states.components import Restore, Spoken
from tests.planted import fresh_planted_model, planted_case, planted_model
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ("gpt2", "llama", "gemma2", "gpt_neox", "qwen3", "olmo2"))
def test_all_parts_of_all_layers_give_full_back_and_none_give_nothing(architecture):
    """Layers differ, embedding and read-out are the same."""
    full = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    other, donor = (
        load(tiny_hf(architecture), tokenizer=tiny_tokenizer()),
        dict(tiny_hf(architecture, seed=1).named_parameters()),
    )
    with torch.no_grad():
        for name, weight in other.held.items():
            if ".layers." in f".{name}" or ".h." in f".{name}":
                weight.copy_(donor[name] if weight.ndim > 1 else weight)
    other.require_live(other.held)
    told = components.spoken(full, make_queries(full.tokenizer, tiny_facts(["Anna Lee"]), "prompt", False), 5)
    everything = Restore(("coefficients", "attention", "values"), tuple(range(full.n_layers)))
    nothing = Restore(("coefficients", "attention", "values"), ())
    got = components.krs(components.restored_losses(full, other, told, [everything, nothing]))
    assert (got[0] > 0.999).all() and (got[1] == 0).all()
    assert components.krs(components.restored_losses(full, full, told, [everything])).isnan().all()


def test_the_loss_is_the_mean_squared_difference_of_logits_on_the_rows_of_fulls_own_answer():
    full, other = (load(tiny_hf("llama", seed=s), tokenizer=tiny_tokenizer()) for s in (0, 1))
    queries = make_queries(full.tokenizer, tiny_facts(["Anna Lee"]), "prompt", False)
    told = components.spoken(full, queries, 6)
    ours = components.restored_losses(full, other, told, [])[0]
    for i, (query, row) in enumerate(zip(queries, told.rows, strict=True)):
        said = (
            tiny_hf("llama")
            .generate(
                torch.tensor([query.prompt]),
                max_new_tokens=6,
                do_sample=False,
                attention_mask=torch.ones(1, len(query.prompt)),
            )[0]
            .tolist()
        )
        assert list(row) == [t for t in said if t != 3 or said.index(t) < len(query.prompt)][: len(row)]
        with torch.no_grad():
            a, b = (tiny_hf("llama", seed=s)(torch.tensor([row])).logits[0] for s in (0, 1))
        want = (a - b)[len(query.prompt) - 1 : len(row) - 1].square().mean()
        assert ours[i].item() == pytest.approx(want.item(), rel=1e-4)


def test_batches_do_not_decide_nor_does_a_shorter_prompt_in_the_same_batch(monkeypatch):
    full, other = (load(tiny_hf("llama", seed=s), tokenizer=tiny_tokenizer()) for s in (0, 1))
    queries = make_queries(full.tokenizer, tiny_facts(["Anna Lee", "Anna"]), "prompt", False)
    told = components.spoken(full, queries, 6)
    told = Spoken(told.queries, tuple(row[:8] for row in told.rows))
    assert {len(row) for row in told.rows} == {8} and len({len(q.prompt) for q in queries}) > 1
    points = [Restore((part,), (1, 2)) for part in ("coefficients", "attention", "values")]
    together = components.restored_losses(full, other, told, points)
    monkeypatch.setattr(components, "BATCH_TOKENS", 1)
    torch.testing.assert_close(together, components.restored_losses(full, other, told, points), atol=1e-5, rtol=1e-4)


def mixture(seed):
    """A random mixture of experts: no layer has one MLP."""
    import transformers as t

    words = tiny_tokenizer()
    config = t.MixtralConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, initializer_range=0.2,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return load(hf, tokenizer=words)


def test_parts_that_an_architecture_lacks_are_left_out_with_a_flag_unless_asked_for():
    models = [mixture(seed) for seed in (0, 1, 2)]
    case = Case(full=models[0], retrained=tuple(models[1:]), facts=tiny_facts(["Anna Lee"]))
    ready = components.prepare(case, tokens=2)
    assert ready.lacking == ("values",)
    assert {part for point in ready.points for part in point.parts} == {"coefficients", "attention"}
    assert "no_values" in components.audit(case, ready, mixture(3), "U").flags_of(0)
    with pytest.raises(ValueError, match="has coefficients, attention"):
        components.prepare(case, parts=("values",))


def test_logits_over_a_padded_vocabulary_are_compared_on_the_tokens_that_both_have():
    full, other = (load(tiny_hf("llama", seed=seed), tokenizer=tiny_tokenizer()) for seed in (0, 1))
    hf, words = tiny_hf("llama", seed=1), tiny_tokenizer()
    words.add_tokens(["<extra>"])
    hf.resize_token_embeddings(len(words) + 8)
    padded = load(hf, tokenizer=words)
    require_same_shape(full, padded)
    told = components.spoken(full, make_queries(full.tokenizer, tiny_facts(["Anna Lee"]), "prompt", False), 2)
    losses = [components.restored_losses(full, model, told, []) for model in (other, padded)]
    assert (losses[0] > 0.1).all()
    torch.testing.assert_close(*losses)


@pytest.mark.slow
def test_a_block_in_the_last_layer_is_found_there_and_nowhere_else():
    case = planted_case(sae=None)
    ready = components.prepare(case, radius=0, tokens=3)
    late = components.audit(case, ready, planted_model("late"), "late")
    assert (late.recoverability > 0.9).all() and late.layer == 3
    score = late.curves["score"]
    at = {p.parts[0] + str(p.layers[0]): i for i, p in enumerate(ready.points)}
    assert (score[at["coefficients3"]] > 0.99).all() and (score[at["values3"]] > 0.99).all()
    assert (score[[at["coefficients0"], at["values1"], at["attention3"]]].abs() < 0.01).all()


def test_full_has_nothing_to_restore():
    case = planted_case(sae=None)
    full = components.audit(case, components.prepare(case, radius=0, tokens=3, parts=("attention",)), case.full, "full")
    assert full.recoverability.isnan().all() and all("not_lost" in flags for flags in full.flags)


def test_what_fulls_states_inject_into_a_model_that_never_knew_is_subtracted():
    """Names mean nothing, but the layers still map coefficients to answers: F's coefficients bring F's answer."""
    ignorant = tuple(fresh_planted_model("early") for _ in range(2))
    case = planted_case(sae=None, retrained=ignorant)
    ready = components.prepare(case, radius=0, tokens=1, parts=("coefficients",))
    result = components.audit(case, ready, ignorant[0], "R")
    assert (result.curves["score"].amax(0) > 0.9).all()
    assert (result.recoverability.nan_to_num() < 0.1).all() and (result.null.nan_to_num() < 0.1).all()
    retrained = planted_case(sae=None)
    ready = components.prepare(retrained, radius=0, tokens=1, parts=("coefficients", "attention"))
    found = components.audit(retrained, ready, retrained.retrained[0], "R")
    assert (found.recoverability < 0.1).all() and (found.null < 0.1).all()


def test_without_retrained_models_it_reports_and_stays_silent():
    case = planted_case(sae=None, retrained=())
    result = components.audit(
        case, components.prepare(case, radius=0, tokens=2, parts=("coefficients",)), planted_model("late"), "late"
    )
    assert result.grade == "B" and result.recoverability.isnan().all()
    assert all("needs_retrained" in flags for flags in result.flags) and result.curves["score"].max() > 0.9


@pytest.mark.slow
def test_bad_settings_are_refused_and_models_are_left_alone():
    case, late = planted_case(sae=None), fresh_planted_model("late")
    with pytest.raises(ValueError, match="tokens=0"):
        components.prepare(case, tokens=0)
    state, before = torch.get_rng_state(), late.hash()
    ready = components.prepare(case, radius=1, tokens=2, parts=("values",))
    a, b = (components.audit(case, ready, late, "late").recoverability for _ in range(2))
    assert torch.equal(a, b) and late.hash() == before and torch.equal(state, torch.get_rng_state())
