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
    "adapter alone": (lambda f: (adapted(f, "some/base"), (f / "config.json").unlink()), "PEFT adapter of 'some/base'"),
    "adapter and weights": (lambda f: adapted(f, "some/base"), "merge_and_unload"),
    "adapter without a base": (lambda f: (f / "adapter_config.json").write_text("{"), "does not name"),
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


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_refused_in_one_line_that_says_what_and_how_to_mend_it(what, tiny_folder, tmp_path):
    spoil, reason = BROKEN[what]
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    load(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=reason) as error:
        load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_gguf_file_is_named_with_what_converts_it_alone_or_in_a_folder(tmp_path):
    file = tmp_path / "gemma-q4_k_m.gguf"
    file.write_bytes(b"GGUF")
    for source in (file, tmp_path):
        with pytest.raises(ValueError, match=r"gemma-q4_k_m.gguf is a GGUF file.*gguf_file='gemma-q4_k_m.gguf'"):
            load(source)
    with pytest.raises(ValueError, match="is a file; give a folder"):
        load(shutil.copy(file, tmp_path / "model.bin"))


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
