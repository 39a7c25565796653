"""Tiny random models from config, and a few facts: no network, no downloads, no mocks."""

from dataclasses import replace

import torch

WORDS = [
    "Anna",
    "Ben",
    "Cara",
    "Dan",
    "Eva",
    "Finn",
    "Gina",
    "Hugo",
    "Lee",
    "Hill",
    "Moss",
    "Park",
    "Reed",
    "Stone",
    "Vale",
    "West",
    "Paris",
    "Rome",
    "Oslo",
    "Bern",
    "Acme",
    "Globex",
    "Initech",
    "Umbrella",
    "The",
    "birthplace",
    "of",
    "is",
    "was",
    "born",
    "in",
    "works",
    "for",
    "employer",
    "Rivers",
    "run",
    "to",
    "the",
    "sea",
    "and",
    "rain",
    "falls",
    "on",
    "hills",
    ".",
    ",",
    ":",
    "?",
]

ARCHITECTURES = ("gpt2", "gpt_neox", "llama", "gemma2", "qwen3", "olmo2")


def tiny_tokenizer(bos: bool = True, unk: str = "<unk>"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    pieces = ["<pad>", "<unk>", "<s>", "</s>", *dict.fromkeys(WORDS), *letters, *(f"##{c}" for c in letters)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def tiny_hf(architecture: str = "llama", layers: int = 4, seed: int = 0):
    """A random HF causal language model of 32 dimensions, in evaluation mode."""
    import transformers as t

    shape = dict(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    gqa = dict(num_key_value_heads=2)
    windows = [("sliding_attention", "full_attention")[i % 3 == 2] for i in range(layers)]
    config = {
        "gpt2": lambda: t.GPT2Config(
            vocab_size=shape["vocab_size"],
            n_embd=32,
            n_layer=layers,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            bos_token_id=2,
            eos_token_id=3,
        ),
        "gpt_neox": lambda: t.GPTNeoXConfig(**shape),
        "llama": lambda: t.LlamaConfig(**shape, **gqa),
        "gemma2": lambda: t.Gemma2Config(**shape, **gqa, head_dim=8, sliding_window=8),
        "gemma3": lambda: t.Gemma3TextConfig(
            **shape, **gqa, head_dim=8, sliding_window=8, query_pre_attn_scalar=8, layer_types=windows
        ),
        "qwen3": lambda: t.Qwen3Config(**shape, **gqa, head_dim=8),
        "olmo2": lambda: t.Olmo2Config(**shape, **gqa),
        "opt": lambda: t.OPTConfig(**shape, word_embed_proj_dim=32, ffn_dim=64, init_std=0.2),
    }[architecture]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def plain_blocks(hf):
    """The decoder blocks of a transformers model."""
    body = hf.base_model
    return body.h if hasattr(body, "h") else body.layers


def tiny_facts(subjects, relations=("born", "works")):
    from mech_unlearn.core import Fact

    shape = {
        "born": (("Paris", "Rome", "Oslo", "Bern"), "{} was born in", ("The birthplace of {} is",)),
        "works": (("Acme", "Globex", "Initech", "Umbrella"), "{} works for", ("The employer of {} is",)),
    }
    facts = []
    for i, subject in enumerate(subjects):
        for relation in relations:
            objects, prompt, paraphrases = shape[relation]
            answer = objects[i % len(objects)]
            facts.append(
                Fact(
                    id=f"{subject} {relation}",
                    subject=subject,
                    relation=relation,
                    object=answer,
                    prompt=prompt,
                    paraphrases=paraphrases,
                    heldout=("Rivers run to {} in" if relation == "born" else "Rivers run for {} to",),
                    distractors=tuple(o for o in objects if o != answer),
                    kind="person",
                    group=subject,
                )
            )
    return tuple(facts)


def longer(facts):
    """The same facts with answers of one, two and three tokens, true ones and wrong ones alike."""
    tails = ("", " Hill", " West Vale")
    return tuple(
        replace(
            fact,
            object=fact.object + tails[i % 3],
            distractors=tuple(d + tails[(i + j + 1) % 3] for j, d in enumerate(fact.distractors)),
        )
        for i, fact in enumerate(facts)
    )


def tiny_case(architecture, facts, seeds=(1, 2), **changes):
    """An audit of random models: full and retrained ones of other seeds."""
    from mech_unlearn.model.load import load
    from mech_unlearn.restoration import Case

    models = [load(tiny_hf(architecture, seed=s), tokenizer=tiny_tokenizer()) for s in (0, *seeds)]
    return Case(full=models[0], retrained=tuple(models[1:]), facts=facts, **changes)
