"""Checkpoints on disk that any text can be asked of: bytes as tokens, a random Llama with many positions."""

import json

import torch

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
