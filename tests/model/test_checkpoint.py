"""What is no whole, plain checkpoint of a text model is refused in one line that names the file and the mend."""

import inspect
import json
import shutil
import subprocess

import pytest
import torch

from mech_unlearn.model.checkpoint import MODALITIES
from mech_unlearn.model.load import load
from tests.tiny import tiny_hf, tiny_tokenizer


def adapted(folder, base):
    """Beside what lies in a folder, a LoRA adapter of a base model."""
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny_hf(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": base}))


def quantized(folder, method):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": method}}))


def cut(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def write_gguf(path, hf):
    """A Llama of float32 weights as llama.cpp writes it: other names, and queries and keys rotated in pairs."""
    from gguf import GGUFWriter

    config, out = hf.config, GGUFWriter(path, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_block_count(config.num_hidden_layers)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(config.vocab_size)
    names = {"self_attn.": "attn_", "o_proj": "output", "mlp.": "ffn_", "_proj": "", "model.layers": "blk"}
    names |= {"post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm", "model.norm": "output_norm"}
    names |= {"model.embed_tokens": "token_embd", "lm_head": "output"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for key, weight in hf.state_dict().items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        for part, n in heads.items():
            if part in key:
                weight = weight.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)
        out.add_tensor(key, weight.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def without_a_shard(folder):
    tiny_hf().save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def in_a_checkpoint_below(folder):
    shutil.copytree(folder, folder / "checkpoint-500")
    (folder / "config.json").unlink()


def of_shape(folder, **changes):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


BROKEN = {
    "adapter of no base": (
        lambda f: (adapted(f, "no/base"), (f / "config.json").unlink()), "'no/base': not a local folder"
    ),
    "adapter and weights": (lambda f: adapted(f, "some/base"), "adapter beside a whole model: move one"),
    "adapter without a base": (lambda f: (adapted(f, ""), (f / "config.json").unlink()), "names no base model: write"),
    "adapter cut off": (
        lambda f: ((f / "adapter_config.json").write_text("{"), (f / "config.json").unlink()),
        "adapter_config.json cannot be read",
    ),
    "bitsandbytes": (lambda f: quantized(f, "bitsandbytes"), r"quantized \(bitsandbytes\).*plain weights"),
    "gptq": (lambda f: quantized(f, "gptq"), r"quantized \(gptq\)"),
    "fp8": (lambda f: quantized(f, "fp8"), r"quantized \(fp8\)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights.*download it again"),
    "cut off": (lambda f: cut(f, "model.safetensors"), "model.safetensors is cut off or damaged"),
    "lfs pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "pointer of git-lfs; run git lfs pull",
    ),
    "a shard missing": (without_a_shard, "weights missing, files model-00002"),
    "index cut off": (
        lambda f: (without_a_shard(f), cut(f, "model.safetensors.index.json")), "index.json cannot be read"
    ),
    "config cut off": (lambda f: cut(f, "config.json"), "config.json cannot be read"),
    "config of a wrong type": (lambda f: of_shape(f, hidden_size="wide"), "cannot be read"),
    "config of another shape": (lambda f: of_shape(f, intermediate_size=48), "its weights cannot be read"),
    "tokenizer cut off": (lambda f: cut(f, "tokenizer.json"), "no tokenizer that can be read"),
    "checkpoints below": (in_a_checkpoint_below, "give one of checkpoint-500 in it"),
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_refused_in_one_line_that_says_what_and_how_to_mend_it(what, tiny_folder, tmp_path):
    spoil, reason = BROKEN[what]
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    load(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=reason) as error:
        load(folder)
    assert (
        ("no/base" if "no base" in what else str(folder)) in str(error.value)
        and "\n" not in str(error.value)
        and len(str(error.value)) < 600
    )


def test_a_gguf_file_is_the_model_that_it_was_made_from_alone_or_in_a_folder(tmp_path):
    hf, tokenizer = tiny_hf(), tiny_tokenizer()
    file = write_gguf(tmp_path / "tiny.gguf", hf)
    ids = torch.arange(4, 12)[None]
    for source in (file, tmp_path):
        model = load(source, tokenizer=tokenizer)
        torch.testing.assert_close(model.logits(ids), hf(ids).logits, atol=1e-5, rtol=1e-5)
    assert load(file, tokenizer=tokenizer, dtype=torch.bfloat16).held["lm_head.weight"].dtype == torch.bfloat16
    model.plain_copy().save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").exists()


def test_a_gguf_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, monkeypatch):
    file = tmp_path / "gemma-q4_k_m.gguf"
    file.write_bytes(b"GGUF")
    for source in (file, tmp_path):
        with pytest.raises(ValueError, match=r"cannot be read as a GGUF file .*; download the file again"):
            load(source)
    with pytest.raises(ValueError, match="is a file; give a folder"):
        load(shutil.copy(file, tmp_path / "model.bin"))
    shutil.copy(file, tmp_path / "another.gguf")
    with pytest.raises(ValueError, match="holds 2 GGUF files; give one, .*another.gguf"):
        load(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'mech_unlearn\[gguf\]'"):
        load(file)


def test_an_adapter_that_hangs_on_a_model_in_memory_is_refused_and_merged_it_loads():
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny_hf(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PeftModel is neither.*merge_and_unload"):
        load(wrapped, tokenizer=tiny_tokenizer())
    assert load(wrapped.merge_and_unload(), tokenizer=tiny_tokenizer()).n_layers == 4
    hung = tiny_hf()
    hung.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="holds a PEFT adapter beside its weights"):
        load(hung, tokenizer=tiny_tokenizer())


def saved_adapter(folder, base, config, hf=None):
    """A folder with an adapter of random weights of a base model's folder; gives the base model that wears it."""
    from peft import get_peft_model

    worn = get_peft_model(hf or tiny_hf(), config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (w for w in worn.parameters() if w.requires_grad):
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.1)
    worn.save_pretrained(folder)
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(base)}))
    return worn


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_rslora": True, "alpha_pattern": {"q_proj": 8}}])
def test_the_folder_of_an_adapter_loads_as_its_base_with_the_adapter_merged_in(changes, tiny_folder, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **changes)
    base = shutil.copytree(tiny_folder("llama"), tmp_path / "base")
    worn = saved_adapter(tmp_path / "adapter", "../base", config, load(base).plain_copy())
    ids, state = torch.arange(4, 12)[None], torch.get_rng_state()
    model = load(tmp_path / "adapter")
    assert torch.equal(state, torch.get_rng_state()) and model.name == str(tmp_path / "adapter")
    torch.testing.assert_close(model.logits(ids), worn.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    assert (model.logits(ids) - load(base).logits(ids)).abs().max() > 0.01
    assert sorted(model.held) == sorted(load(base).held)  # plain weights, to be edited and exported


def test_an_adapter_that_no_weights_can_hold_or_that_is_incomplete_or_of_another_shape_is_refused(
    tiny_folder, tmp_path
):
    from peft import LoraConfig, PromptTuningConfig
    from safetensors.torch import load_file, save_file

    base, lora = tiny_folder("llama"), LoraConfig(r=2, target_modules=["q_proj"])
    saved_adapter(tmp_path / "prompts", base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    saved_adapter(tmp_path / "partly", base, lora)
    weights = load_file(tmp_path / "partly" / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, tmp_path / "partly" / "adapter_model.safetensors")
    saved_adapter(tmp_path / "other", tiny_folder("gpt2"), lora)
    saved_adapter(tmp_path / "twice", tmp_path / "partly", lora)
    for name, reason in {
        "prompts": "PROMPT_TUNING .*is nothing that is added to weights",
        "partly": "cannot be merged .*[Mm]issing adapter keys",
        "other": "cannot be merged into .*Target modules",
        "twice": "which is an adapter as well: merge that one",
    }.items():
        with pytest.raises(ValueError, match=reason) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_a_checkpoint_in_shards_loads_as_the_model_that_it_was(tmp_path):
    hf = tiny_hf()
    hf.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model, ids = load(tmp_path, tokenizer=tiny_tokenizer()), torch.arange(4, 12)[None]
    torch.testing.assert_close(model.logits(ids), hf(ids).logits, atol=1e-5, rtol=1e-5)


def multimodal_hf():
    import transformers as t

    shape = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        head_dim=8, vocab_size=len(tiny_tokenizer()), max_position_embeddings=64,
    )  # fmt: skip
    sight = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    tokens = dict(mm_tokens_per_image=4, boi_token_index=3, eoi_token_index=4, image_token_index=5)
    return t.Gemma3ForConditionalGeneration(t.Gemma3Config(text_config=shape, vision_config=sight, **tokens)).eval()


def test_a_model_of_text_and_images_is_refused_before_anything_could_be_installed_for_it(tmp_path, monkeypatch):
    asked = []
    for name in ("check_call", "run", "Popen", "check_output", "call"):
        monkeypatch.setattr(subprocess, name, lambda *args, **_: asked.append(args))
    hf = multimodal_hf()
    hf.save_pretrained(tmp_path / "gemma3")
    tiny_tokenizer().save_pretrained(tmp_path / "gemma3")
    for source in (tmp_path / "gemma3", hf):
        with pytest.raises(
            ValueError, match=r"'gemma3' model, which reads more than text \(text_config, vision_config\)"
        ):
            load(source, tokenizer=tiny_tokenizer())
    disguised = tiny_hf()
    disguised.config.original_architecture = "Gemma3ForConditionalGeneration"  # the bridge would go by this name
    with pytest.raises(ValueError, match="no adapter for LlamaForCausalLM"):
        load(disguised, tokenizer=tiny_tokenizer())
    assert not asked


def test_every_architecture_for_which_the_bridge_would_install_software_is_known_by_its_config():
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    at_risk = [
        name
        for name, adapter in SUPPORTED_ARCHITECTURES.items()
        if "is_multimodal = True" in inspect.getsource(inspect.getmodule(adapter))
    ]
    assert len(at_risk) > 8
    for name in at_risk:
        parts = getattr(transformers, name).config_class.sub_configs
        assert set(parts) & set(MODALITIES), name


def test_what_is_no_model_at_all_is_refused():
    with pytest.raises(ValueError, match="Linear is neither a hub id, a folder nor a transformers model"):
        load(torch.nn.Linear(2, 2))
