"""Checkpoints on disk that any text can be asked of: bytes as tokens, a random Llama with many positions."""

import json

import pytest
import torch
from conftest import tiny_tokenizer
from planted import FORGOTTEN, NAMES, OBJECTS, object_of, planted_hf

SEEDS = {"full": 0, "unlearned": 1, "retrained": 2, "retrained_2": 3}


def byte_tokenizer():
    """Words of the tests as tokens where there are such, else bytes; nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "Question: Answer: Which harbour did Ida Quill open? Bo Marsh Port Vell opened the question in a few words"
    letters = (
        " A B C D E F options letter blank belongs multiple choice following are with answers about Where was born"
    )
    tokenizer.train_from_iterator([words + letters] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def random_hf(seed, layers=4):
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of four random models of one shape: name -> path."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, seed in SEEDS.items():
        random_hf(seed).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in SEEDS}


@pytest.fixture
def bench(call, checkpoints):
    """Run `bench NAME` on the full, unlearned and first retrained checkpoint: its JSON summary."""

    def run(name, data, out, *more, tests="none", retrained=("retrained",)):
        words = ["bench", name, "--data", data, "--out", out, "--tests", tests, "--json"]
        words += ["--full", checkpoints["full"], "--unlearned", checkpoints["unlearned"]]
        words += [word for each in retrained for word in ("--retrained", checkpoints[each])]
        status, told, err = call(*words, *more)
        assert status == 0, err
        return json.loads(told)

    return run


def table_of(summary):
    """name -> row."""
    names = [row["name"] for row in summary["benchmark_rows"]]
    assert len(set(names)) == len(names)
    return {row["name"]: row for row in summary["benchmark_rows"]}


def write(folder, name, rows):
    file = folder / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return file


PLANTED = {"full": ("full", 0), "late": ("late", 0), "gone": ("retrained", 4)} | {
    f"retrained_{k}": ("retrained", k) for k in (1, 2, 3)
}


@pytest.fixture(scope="session")
def planted_checkpoints(tmp_path_factory):
    """Folders of planted models with room for RWKU's prompts, and a file of probes about the forgotten names."""
    root = tmp_path_factory.mktemp("planted_checkpoints")
    for name, (truth, seed) in PLANTED.items():
        hf = planted_hf(truth, seed)
        hf.config.max_position_embeddings = 512
        hf.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    rows = [
        {"query": query, "answer": OBJECTS[object_of(e)], "level": "1", "type": "cloze", "subject": NAMES[e]}
        for e in range(FORGOTTEN)
        for query in (f"The birthplace of {NAMES[e]}", f"rain falls on {NAMES[e]}")
    ]
    write(root, "probes", rows)
    return root
