"""A Model gives the logits of plain transformers, names every place once, and refuses what it cannot use."""

import os

import pytest
import torch
from torch import nn

from mech_unlearn.core import Site
from mech_unlearn.edit.edit import clone
from mech_unlearn.edit.export import export
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import pad
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

ROWS = [(2, 9, 10, 11, 12), (2, 13, 14), (2, 15, 16, 17, 18, 19, 20)]
IDS = torch.tensor([[2, 9, 10, 11, 12], [2, 13, 14, 15, 16]])


def plain(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", (*ARCHITECTURES, "opt"))
@torch.no_grad()
def test_logits_are_those_of_plain_transformers_from_a_folder(architecture, tiny_folder):
    folder = tiny_folder(architecture)
    model, reference = load(folder), plain(folder)
    torch.testing.assert_close(model.logits(IDS), reference(IDS).logits, atol=1e-5, rtol=1e-5)
    for side in ("left", "right"):
        ids, mask, _ = pad(ROWS, 0, side)
        ours, theirs = model.logits(ids, mask), reference(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-5, rtol=1e-5)
        if side == "right":
            alone = torch.cat([reference(torch.tensor([row])).logits[0] for row in ROWS])
            torch.testing.assert_close(ours[mask.bool()], alone, atol=1e-5, rtol=1e-5)
    name, transposed = model.w_out(1)
    d_mlp = 128 if architecture == "gpt2" else 64
    assert model.held[name].shape == ((d_mlp, 32) if transposed else (32, d_mlp))
    assert transposed == (architecture == "gpt2") and name.startswith(f"{model.block(1)}.")
    assert (model.n_layers, model.d_model, model.dtype) == (4, 32, torch.float32)
    for of in (model.w_out, model.block):
        with pytest.raises(KeyError, match="no layer 4; layers 0..3"):
            of(4)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", (*ARCHITECTURES, "opt"))
@torch.no_grad()
def test_writing_to_the_output_matrix_moves_the_logits_as_in_plain_transformers(architecture, tiny_folder):
    model, reference = load(tiny_folder(architecture)), plain(tiny_folder(architecture))
    name, _ = model.w_out(2)
    before = model.logits(IDS)
    delta = torch.randn(model.held[name].shape, generator=torch.Generator().manual_seed(0)) / 8
    model.held[name].add_(delta)
    model.require_live([name])
    dict(reference.named_parameters())[name].add_(delta)
    assert (model.logits(IDS) - before).abs().max() > 1e-3
    torch.testing.assert_close(model.logits(IDS), reference(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
@torch.no_grad()
def test_copies_have_the_same_logits_and_none_of_the_storage_also_with_tied_embeddings(architecture, tiny_folder):
    model = load(tiny_folder(architecture))
    logits, seen = model.logits(IDS), model.hash()
    tied = architecture != "llama"
    assert model.hf.config.tie_word_embeddings == tied
    copy = model.plain_copy()
    assert torch.equal(copy(IDS).logits, logits) or (copy(IDS).logits - logits).abs().max() < 1e-5
    same = copy.get_input_embeddings().weight.data_ptr() == copy.get_output_embeddings().weight.data_ptr()
    assert same == tied
    with clone(model) as second:
        torch.testing.assert_close(second.logits(IDS), logits, atol=1e-5, rtol=1e-5)
        assert second.hash() == seen and list(second.held) == list(model.held)
        for weight in second.held.values():
            weight.mul_(1.5)
        assert (second.logits(IDS) - logits).abs().max() > 1e-3
    assert model.hash() == seen and torch.equal(model.logits(IDS), logits)


def tiny_of(kind, dtype=torch.float32):
    """A random model of two layers of a kind that few tests need; what the config leaves at zero or one is drawn."""
    import transformers as t

    shape = dict(
        vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    ranks = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=4)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16)
    config = {
        "gemma4": lambda: t.Gemma4TextConfig(
            **shape, head_dim=8, global_head_dim=8, vocab_size_per_layer_input=shape["vocab_size"],
            hidden_size_per_layer_input=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        ),
        "deepseek_v3": lambda: t.DeepseekV3Config(
            **{**shape, **experts, **ranks, "num_key_value_heads": 4, "first_k_dense_replace": 1}
        ),
        "mixtral": lambda: t.MixtralConfig(**shape, num_local_experts=4),
        "mpt": lambda: t.MptConfig(
            d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64, vocab_size=shape["vocab_size"]
        ),
        "openai-gpt": lambda: t.OpenAIGPTConfig(
            vocab_size=shape["vocab_size"], n_embd=32, n_layer=2, n_head=4, n_positions=64
        ),
    }[kind]()  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = t.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
        for name, weight in hf.state_dict().items():
            if name.endswith(("layer_scalar", "e_score_correction_bias")):
                weight.copy_(torch.rand(weight.shape) + 0.5)
    return hf


def test_a_decoder_layer_and_its_output_matrix_are_found_whatever_the_architecture_calls_them():
    matrix = {
        "mpt": ("transformer.blocks.1", "ffn.down_proj", False),
        "openai-gpt": ("transformer.h.1", "mlp.c_proj", True),
        "mixtral": ("model.layers.1", None, None),
    }
    for kind, (block, path, transposed) in matrix.items():
        model = load(tiny_of(kind), tokenizer=tiny_tokenizer())
        again = load(model.hf, tokenizer=tiny_tokenizer())  # a bridge over a bridge
        for one in (model, again):
            assert one.block(1) == block and block in one.hf_hooks
            if path is None:
                with pytest.raises(KeyError, match="layer 1 of MixtralForCausalLM is a mixture of experts"):
                    one.w_out(1)
            else:
                assert one.w_out(1) == (f"{block}.{path}.weight", transposed)
                assert (one.held[f"{block}.{path}.weight"].shape[1] == 32) == transposed


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("kind", ("gemma4", "deepseek_v3"))
@torch.no_grad()
def test_buffers_that_are_saved_with_the_weights_are_hashed_copied_and_exported_with_them(kind, dtype, tmp_path):
    model = load(tiny_of(kind, dtype), tokenizer=tiny_tokenizer())
    logits, seen = model.logits(IDS), model.hash()
    assert model.buffers and not model.buffers.keys() & model.held.keys()
    assert torch.equal(model.plain_copy()(IDS).logits, logits)
    with clone(model) as second:
        assert second.hash() == seen and torch.equal(second.logits(IDS), logits)
    export(model, tmp_path / "out", {})
    torch.testing.assert_close(load(tmp_path / "out", dtype=dtype).logits(IDS), logits)
    for buffer in model.buffers.values():
        buffer.mul_(-2)
        assert model.hash() != seen
        buffer.div_(-2)
    assert model.hash() == seen


def test_a_copy_that_would_be_another_model_is_refused():
    untied, more = tiny_hf("gemma2"), tiny_hf("llama")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach() + 1)
    more.model.register_parameter("extra", nn.Parameter(torch.ones(3)))
    for hf, name in ((untied, "lm_head.weight"), (more, "model.extra")):
        model = load(hf, tokenizer=tiny_tokenizer())
        with pytest.raises(RuntimeError, match=f"the plain copy of .* has other weights: {name}"):
            model.plain_copy()


def test_the_model_of_somebody_elses_bridge_is_refused():
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs |= {"name_or_path": "tiny", "add_bos_token": True}
    bridge = TransformerBridge.boot_transformers("tiny", hf_model=tiny_hf("llama"), tokenizer=tokenizer, device="cpu")
    with pytest.raises(ValueError, match="lies in a TransformerBridge already"):
        load(bridge.original_model, tokenizer=tiny_tokenizer())


@torch.no_grad()
def test_copying_leaves_the_config_and_the_logits_of_the_model_as_they_were():
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_config(tiny_hf("llama").config, attn_implementation="sdpa").to(torch.bfloat16)
    model = load(hf, tokenizer=tiny_tokenizer())
    hf.config.dtype = torch.float32  # what a model says that was cast after it was read
    logits, said = model.logits(IDS), (model.hf.config.to_dict(), model.hf.config._attn_implementation)
    model.plain_copy()
    with clone(model) as second:
        assert second.hash() == model.hash()
    assert (model.hf.config.to_dict(), model.hf.config._attn_implementation) == said
    assert torch.equal(model.logits(IDS), logits)


@torch.no_grad()
def test_the_hash_changes_if_and_only_if_a_weight_changes(tiny_folder):
    model = load(tiny_folder("llama"))
    seen = model.hash()
    assert load(tiny_folder("llama")).hash() == seen == model.hash()
    for weight in model.held.values():
        first = weight.flatten()[0].clone()
        weight.view(-1)[0] += 1
        assert model.hash() != seen
        weight.view(-1)[0] = first
    assert model.hash() == seen


def test_an_alias_a_canonical_name_a_site_and_a_module_path_name_the_same_place(tiny_model):
    assert tiny_model.resolve("blocks.2.hook_resid_post") == "blocks.2.hook_out"
    assert tiny_model.resolve("blocks.2.hook_out") == "blocks.2.hook_out"
    assert tiny_model.resolve(Site(2, "resid_post")) == "blocks.2.hook_out"
    assert tiny_model.resolve("model.layers.2") == "blocks.2.hook_out"
    assert tiny_model.resolve("model.layers.1.mlp") == tiny_model.resolve(Site(1, "mlp_out"))


def test_an_unknown_place_is_refused_with_the_nearest_that_exist(tiny_model):
    for name, near in [
        ("blocks.0.hook_mlp_ouT", "blocks.0.hook_mlp_out"),
        ("model.layers.1.mpl", "model.layers.1.mlp"),
    ]:
        with pytest.raises(KeyError) as error:
            tiny_model.resolve(name)
        assert near in str(error.value) and "layers 0..3" in str(error.value)
    with (
        pytest.raises(KeyError, match="no hook 'blocks.9.hook_resid_post'"),
        tiny_model.hooks((Site(9, "resid_post"), lambda x: None)),
    ):
        pass


def test_hooks_write_only_while_in_force_and_one_that_never_fires_is_refused(tiny_model):
    before = tiny_model.logits(IDS)
    with tiny_model.hooks((Site(1, "resid_post"), lambda x: x * 0), (Site(2, "mlp_out"), lambda x: None)):
        assert (tiny_model.logits(IDS) - before).abs().max() > 1e-3
    assert torch.equal(tiny_model.logits(IDS), before)
    with (
        pytest.raises(RuntimeError, match="never fired.*blocks.3.hook_out"),
        tiny_model.hooks((Site(3, "resid_post"), lambda x: x)),
    ):
        pass
    with pytest.raises(ZeroDivisionError), tiny_model.hooks((Site(3, "resid_post"), lambda x: 1 / 0)):
        tiny_model.logits(IDS)
    assert torch.equal(tiny_model.logits(IDS), before)


def test_a_replaced_parameter_is_noticed(tiny_model):
    name, _ = tiny_model.w_out(0)
    module = next(m for k, m in tiny_model.hf.named_modules() if k.replace("._original_component", "") == name[:-7])
    inner = getattr(module, "original_component", module)
    inner.weight = nn.Parameter(inner.weight.clone())
    with pytest.raises(RuntimeError, match="is a copy, not the live weight"):
        tiny_model.require_live([name])


def test_an_in_memory_model_loads_twice_with_the_same_names_and_needs_its_tokenizer(tiny_model):
    again = load(tiny_model.hf, tokenizer=tiny_model.tokenizer)
    assert list(again.held) == list(tiny_model.held) and again.hash() == tiny_model.hash()
    assert all(again.held[k] is tiny_model.held[k] for k in again.held)
    with torch.no_grad():
        torch.testing.assert_close(again.logits(IDS), tiny_model.logits(IDS))
    with pytest.raises(ValueError, match="needs its tokenizer"):
        load(tiny_hf())


def broken(folder, tmp_path, what):
    """A copy of a model folder with one thing wrong."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / what.replace(" ", "_")
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    if what == "no tokenizer":
        for path in copy.glob("tokenizer*"):
            path.unlink()
    elif what == "no config":
        (copy / "config.json").unlink()
    elif what == "not finite":
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif what == "weights missing":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.down_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif what == "encoder":
        (copy / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 32}))
    elif what == "unknown type":
        (copy / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    return copy


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("no tokenizer", "has no tokenizer"),
        ("no config", "holds no config.json"),
        ("not finite", "'model.layers.1.mlp.down_proj.weight' holds NaN"),
        ("weights missing", "weights missing from the checkpoint.*model.layers.1.mlp.down_proj.weight"),
        ("encoder", "is a 't5' model, not a causal language model"),
        ("unknown type", "nonsense"),
    ],
)
def test_a_folder_with_something_wrong_is_refused_in_one_line_that_says_what(what, reason, tiny_folder, tmp_path):
    path = broken(tiny_folder("llama"), tmp_path, what)
    with pytest.raises(ValueError, match=reason) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_refused_without_asking_the_hub(tmp_path):
    for source in (tmp_path / "absent", "./absent", os.fspath(tmp_path / "a" / "b")):
        with pytest.raises(ValueError, match="no such folder"):
            load(source)


def test_a_tokenizer_without_offsets_is_refused():
    from types import SimpleNamespace

    with pytest.raises(ValueError, match="no character offsets"):
        load(tiny_hf(), tokenizer=SimpleNamespace(is_fast=False))


def test_a_model_in_half_precision_stays_so():
    model = load(tiny_hf().to(torch.bfloat16), tokenizer=tiny_tokenizer())
    assert model.dtype == torch.bfloat16 and model.logits(IDS).dtype == torch.bfloat16
