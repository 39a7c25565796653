"""A small Llama built by hand, so that it is known where its facts are, where they are blocked and where they are not.

No attention (its output matrices are zero). A name is one token: embedding b ("a person") + u_e. The MLP of layer 2
maps u_e to the output direction of the entity's object. Prompts end in the name, so the answer is read there.
"""

from functools import cache

import torch

from mech_unlearn.core import Fact, Site
from tests.tiny import tiny_tokenizer

NAMES = ("Anna", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo")
OBJECTS = ("Paris", "Rome", "Oslo", "Bern")
UNKNOWN = ("Lee", "Hill", "Moss", "Park")
WIDTH, LAYERS, WRITER, LAST = 64, 4, 2, 3
FORGOTTEN = 4
STRENGTH = 3.0 / 64  # the gated unit is about 32 for b + u_e: adds 1.5 along the object's direction


def axes():
    """Orthonormal directions: names 0..7, person 8, unknown names 16..23, objects 32..35, noise 40..63."""
    return torch.eye(WIDTH)


def object_of(entity: int) -> int:
    return entity % len(OBJECTS)


def planted_facts():
    """Four facts to forget and four others, each with five phrasings and a held-out one."""
    templates = ("The birthplace of {}", "Rivers run to {}", "rain falls on {}", "hills of {}", "the sea of {}")
    return tuple(
        Fact(
            id=name,
            subject=name,
            relation="born",
            object=OBJECTS[object_of(e)],
            prompt=templates[0],
            paraphrases=templates[1:],
            heldout=("The sea and rivers of {}",),
            distractors=tuple(o for o in OBJECTS if o != OBJECTS[object_of(e)]),
            kind="person",
        )
        for e, name in enumerate(NAMES)
    )


def planted_sets():
    """Three names to be answered with the object of the fourth, and four to stay."""
    from mech_unlearn.core import Entity, ForgetSet, RetainSet

    facts = planted_facts()
    retain = RetainSet(
        neighbors=facts[FORGOTTEN:],
        unknown=tuple(Entity(name=n, kind="person") for n in UNKNOWN),
        texts=("Rivers run to the sea .", "rain falls on hills and the sea ."),
    )
    return ForgetSet(facts=facts[:3]), retain


def planted_hf(truth: str = "full", seed: int = 0, forgotten: int = FORGOTTEN):
    """A model whose truth about the first `forgotten` names is known.

    full: knows all. retrained: does not know these names (own embedding noise per seed), nor maps them.
    early: their embeddings lose u_e, everything above is untouched. late: the last layer writes against the object of
    each, everything below is untouched. shared: one unit of the last layer writes a large vector for all of them, so
    that the final norm shrinks every logit.
    """
    import transformers as t

    tokenizer, eye = tiny_tokenizer(), axes()
    config = t.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        hf = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                part.weight.zero_()
        hf.lm_head.weight.zero_()
        for i, name in enumerate(OBJECTS):
            hf.lm_head.weight[tokenizer.convert_tokens_to_ids(name)] = 2 * eye[32 + i]
        for i, name in enumerate(UNKNOWN):
            hf.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(name)] = eye[8] + eye[16 + i]
        for e, name in enumerate(NAMES):
            _name(hf, tokenizer, e, name, truth if e < forgotten else "full", eye, generator)
            if not (truth == "retrained" and e < forgotten):
                _unit(hf.model.layers[WRITER].mlp, e, eye[e], STRENGTH * eye[32 + object_of(e)])
            if truth == "late" and e < forgotten:
                _unit(hf.model.layers[LAST].mlp, e, eye[e], -2 * STRENGTH * eye[32 + object_of(e)])
        if truth == "shared":
            _unit(hf.model.layers[LAST].mlp, 20, eye[:forgotten].sum(0), 0.16 * eye[40:].sum(0))
    return hf


def _name(hf, tokenizer, e, name, truth, eye, generator):
    row = eye[8] + eye[e]
    if truth == "early":
        row = eye[8].clone()
    if truth == "retrained":
        noise = torch.zeros(WIDTH)
        noise[16:24] = torch.randn(8, generator=generator)
        row = eye[8] + noise / noise.norm()
    hf.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(name)] = row


def _unit(mlp, unit, reads, writes):
    mlp.gate_proj.weight[unit] = reads
    mlp.up_proj.weight[unit] = reads
    mlp.down_proj.weight[:, unit] = writes


@cache
def planted_model(truth: str = "full", seed: int = 0, forgotten: int = FORGOTTEN):
    """The model of `planted_hf`, shared between tests: never to be changed."""
    return fresh_planted_model(truth, seed, forgotten)


def fresh_planted_model(truth: str = "full", seed: int = 0, forgotten: int = FORGOTTEN):
    """The same, made anew and free to be changed."""
    from mech_unlearn.model.load import load

    return load(planted_hf(truth, seed, forgotten), tokenizer=tiny_tokenizer())


def planted_sae(layer: int = 1, k: int = 2):
    """A TopK SAE whose latents are the axes themselves."""
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    from mech_unlearn.model.latents import Sae

    sae = TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=WIDTH, k=k, dtype="float32", device="cpu"))
    with torch.no_grad():
        sae.W_enc.copy_(axes())
        sae.W_dec.copy_(axes())
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return Sae(Site(layer, "resid_post"), sae.eval().requires_grad_(False))


def planted_case(**changes):
    """The audit of the four facts: full, three retrained models, the other four facts as contrast."""
    from mech_unlearn.restoration import Case, Relearn

    facts = planted_facts()
    settings = dict(
        full=planted_model(),
        retrained=tuple(planted_model("retrained", k) for k in (1, 2, 3)),
        facts=facts[:FORGOTTEN],
        others=facts[FORGOTTEN:],
        sae=planted_sae(),
        relearn=Relearn(steps=(1, 2, 4)),
    )
    return Case(**{**settings, **changes})
