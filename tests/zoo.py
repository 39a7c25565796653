"""Tiny random models of many architectures, each from its own config, whether `load` takes them or not."""

import torch

from tests.tiny import tiny_tokenizer

VOCABULARY = len(tiny_tokenizer())
SPECIAL = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    **SPECIAL,
)  # fmt: skip
WIDE = dict(SHAPE, intermediate_size=64)
GQA = dict(WIDE, num_key_value_heads=2)
MHA = dict(WIDE, num_key_value_heads=4)
GPT = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL)
HEAD = dict(head_dim=8)
WINDOW = dict(sliding_window=8)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
LATENT = dict(kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
ROUTED = dict(EXPERTS, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1)
WINDOWS = dict(layer_types=["sliding_attention", "full_attention"])

CONFIGS = {
    "gpt2": ("GPT2Config", GPT),
    "openai-gpt": ("OpenAIGPTConfig", GPT),
    "gptj": ("GPTJConfig", dict(GPT, rotary_dim=4)),
    "codegen": ("CodeGenConfig", dict(GPT, rotary_dim=4)),
    "bigcode": ("GPTBigCodeConfig", dict(GPT, n_inner=64)),
    "gpt_neo": (
        "GPTNeoConfig",
        dict(
            vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64, window_size=8,
            attention_types=[[["global", "local"], 1]], **SPECIAL,
        ),
    ),
    "gpt_neox": ("GPTNeoXConfig", WIDE),
    "opt": ("OPTConfig", dict(SHAPE, ffn_dim=64, word_embed_proj_dim=32)),
    "xglm": (
        "XGLMConfig",
        dict(
            vocab_size=VOCABULARY, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64, max_position_embeddings=64,
            **SPECIAL,
        ),
    ),
    "bloom": ("BloomConfig", dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **SPECIAL)),
    "mpt": ("MptConfig", dict(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)),
    "falcon": ("FalconConfig", SHAPE),
    "falcon-alibi": (
        "FalconConfig", dict(SHAPE, alibi=True, multi_query=False, parallel_attn=False, bias=True)
    ),
    "llama": ("LlamaConfig", GQA),
    "llama-tied": ("LlamaConfig", dict(GQA, tie_word_embeddings=True)),
    "mistral": ("MistralConfig", dict(GQA, **WINDOW)),
    "gemma": ("GemmaConfig", dict(GQA, **HEAD)),
    "gemma2": ("Gemma2Config", dict(GQA, **HEAD, **WINDOW, attn_logit_softcapping=5.0, final_logit_softcapping=3.0)),
    "gemma3": ("Gemma3TextConfig", dict(GQA, **HEAD, **WINDOW, **WINDOWS)),
    "gemma4": (
        "Gemma4TextConfig",
        dict(
            GQA, **HEAD, **WINDOW, **WINDOWS, global_head_dim=8, vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=8,
        ),
    ),
    "qwen2": ("Qwen2Config", GQA),
    "qwen3": ("Qwen3Config", dict(GQA, **HEAD)),
    "olmo": ("OlmoConfig", GQA),
    "olmo2": ("Olmo2Config", GQA),
    "olmo3": ("Olmo3Config", dict(GQA, **WINDOW)),
    "phi": ("PhiConfig", WIDE),
    "phi3": ("Phi3Config", GQA),
    "stablelm": ("StableLmConfig", GQA),
    "starcoder2": ("Starcoder2Config", GQA),
    "granite": ("GraniteConfig", GQA),
    "glm": ("GlmConfig", dict(GQA, **HEAD)),
    "glm4": ("Glm4Config", dict(GQA, **HEAD)),
    "smollm3": ("SmolLM3Config", GQA),
    "nemotron": ("NemotronConfig", GQA),
    "ernie4_5": ("Ernie4_5Config", dict(GQA, **HEAD)),
    "exaone4": ("Exaone4Config", GQA),
    "arcee": ("ArceeConfig", GQA),
    "apertus": ("ApertusConfig", GQA),
    "mixtral": ("MixtralConfig", dict(GQA, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": ("Qwen2MoeConfig", dict(GQA, **EXPERTS, num_experts=4, shared_expert_intermediate_size=16)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(GQA, **HEAD, **EXPERTS, num_experts=4)),
    "olmoe": ("OlmoeConfig", dict(GQA, num_experts=4, num_experts_per_tok=2)),
    "gpt_oss": ("GptOssConfig", dict(GQA, **HEAD, **WINDOW, num_local_experts=4, num_experts_per_tok=2)),
    "granitemoe": ("GraniteMoeConfig", dict(GQA, num_local_experts=4, num_experts_per_tok=2)),
    "deepseek_v2": ("DeepseekV2Config", dict(MHA, **LATENT, **ROUTED, **HEAD, q_lora_rank=8)),
    "deepseek_v3": ("DeepseekV3Config", dict(MHA, **LATENT, **ROUTED, q_lora_rank=8, n_group=1, topk_group=1)),
    "llama4": (
        "Llama4TextConfig",
        dict(
            GQA, **HEAD, intermediate_size_mlp=64, num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=8
        ),
    ),
    "lfm2": ("Lfm2Config", dict(GQA, layer_types=["conv", "full_attention"])),
    "jamba": (
        "JambaConfig",
        dict(
            GQA, attn_layer_period=2, attn_layer_offset=1, num_experts=2, expert_layer_period=2, expert_layer_offset=1,
            use_mamba_kernels=False, mamba_d_state=8,
        ),
    ),
    "falcon_h1": (
        "FalconH1Config",
        dict(GQA, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1),
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        dict(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
            lru_width=32, attention_window_size=8, **SPECIAL,
        ),
    ),
    "mamba": (
        "MambaConfig", dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, **SPECIAL)
    ),
    "mamba2": (
        "Mamba2Config",
        dict(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1,
            state_size=8, **SPECIAL,
        ),
    ),
    "rwkv": (
        "RwkvConfig",
        dict(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=64,
            **SPECIAL,
        ),
    ),
    "cohere": ("CohereConfig", GQA),
    "cohere2": ("Cohere2Config", dict(GQA, **WINDOW)),
    "biogpt": ("BioGptConfig", WIDE),
    "ctrl": ("CTRLConfig", dict(GPT, dff=64)),
    "helium": ("HeliumConfig", dict(GQA, **HEAD)),
    "persimmon": ("PersimmonConfig", WIDE),
    "phimoe": ("PhimoeConfig", dict(GQA, num_local_experts=4, num_experts_per_tok=2)),
    "xlnet": ("XLNetConfig", dict(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=64)),
    "bert": ("BertConfig", WIDE),
}  # fmt: skip
"""Name -> (class of the config, its arguments)."""


def zoo_hf(kind: str, dtype: torch.dtype = torch.float32):
    """A random HF model in evaluation mode whose weights are large enough that every part of it tells in its logits."""
    import transformers as t

    name, arguments = CONFIGS[kind]
    config = getattr(t, name)(**arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = t.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    for weight in hf.parameters():
        if weight.ndim > 1:
            weight.data = (torch.randn(weight.shape, generator=generator) * 1.5 / weight.shape[-1] ** 0.5).to(dtype)
    return hf
