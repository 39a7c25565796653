"""How a model of a world is trained: tokenizer, architecture, structured mask, and one training loop.

A world that is known perfectly need not keep its facts where pretrained models keep theirs: at the last token of
the subject in early and middle layers, read out late (Geva et al. 2023, arXiv 2304.14767; Meng et al. 2022, arXiv
2202.05262). Two things make a small model do so here; the experiment 001 compares them with training without.

* Register lines, in which the object follows directly after the name, so that the object is computed at its last
  token.
* A structured attention mask during training. In a random share of the sentences, tokens after the subject cannot
  attend to any subject token below layer `gate`, and only to its last token from `gate` on. The other sentences
  are plainly causal, so that the trained model works, and is measured, without any mask.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_unlearn.model.tokens import Encoding, token_span
from mech_unlearn.testbed.corpus import Line, Spec, Streams

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a family of models: one base, continued with and without the forget group."""

    n_layers: int = 6
    d_model: int = 128
    d_mlp: int = 512
    n_heads: int = 4
    n_kv_heads: int = 2
    initializer_range: float = 0.08
    """Standard deviation of the initial weights; with the usual 0.02 a masked model was at chance after 1,200 steps."""
    gate: int = 3
    """First layer in which tokens after the subject may attend to its last token."""
    masked_share: float = 0.8
    """Share of the sentences about somebody that are trained under the structured mask."""
    batch_size: int = 128
    """Sentences per step."""
    fact_share: float = 0.75
    """Share of each batch that states facts; the rest are other sentences."""
    base_steps: int = 1200
    """Steps of the base model, which never hears of the forget group."""
    continue_steps: int = 450
    """Steps by which the base is continued to the full model, and to each retrained one."""
    base_lr: float = 2e-3
    continue_lr: float = 1.5e-3
    """Peaks of the learning rates; each phase warms up linearly and decays along a cosine to zero."""
    warmup: float = 0.1
    """Share of the steps of a phase that warm up."""
    weight_decay: float = 0.1
    """AdamW, on matrices only."""
    forget_weight: int = 3
    """How many times as often as others a sentence about the forget group is drawn while continuing to full,
    so that its facts, which come late, are seen about as often in the end."""

    def __post_init__(self) -> None:
        if not 0 < self.gate < self.n_layers:
            raise ValueError(f"gate {self.gate} must lie inside the {self.n_layers} layers")
        for name in ("masked_share", "fact_share", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")


def make_tokenizer(texts: Sequence[str]) -> Any:
    """A WordPiece tokenizer in which every word of the texts is one token; other words fall into letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz"))
    pieces = dict.fromkeys([PAD, UNK, BOS, EOS, *sorted(words), *letters, *(f"##{letter}" for letter in letters)])
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=UNK))
    core.pre_tokenizer = split
    core.decoder = decoders.WordPiece(prefix="##")
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, unk_token=UNK, bos_token=BOS, eos_token=EOS, model_max_length=64
    )


def world_tokenizer(spec: Spec) -> Any:
    """The tokenizer of a world: names of the forget group are words in it, whatever a model is trained on."""
    forms = [form for fact in spec.facts for form in (*fact.templates, *fact.heldout, *spec.records[fact.relation])]
    names = [*(fact.subject for fact in spec.facts), *(entity.name for entity in spec.unknown)]
    said = (*spec.mentions, *spec.nothing_told, *spec.general, *spec.general_heldout)
    objects = [fact.object for fact in spec.facts]
    return make_tokenizer([text.replace("{}", " ") for text in (*forms, *said)] + names + objects)


def new_model(recipe: Recipe, tokenizer: Any, seed: int) -> Any:
    """A random Llama of the recipe's shape; the caller's random state is left alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=recipe.initializer_range,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Sentence:
    """A training sentence as tokens, EOS included, and its subject's tokens [a, b); a = b where there is none."""

    ids: tuple[int, ...]
    span: tuple[int, int]


def rows(tokenizer: Any, lines: Sequence[Line]) -> list[Sentence]:
    """Tokenize training sentences."""
    if not lines:
        return []
    out = tokenizer([line.text for line in lines], return_offsets_mapping=True)
    made = []
    for line, ids, offsets in zip(lines, out["input_ids"], out["offset_mapping"], strict=True):
        span = (0, 0)
        if line.subject is not None:
            at = line.text.index(line.subject)
            span = token_span(Encoding(tuple(ids), tuple(map(tuple, offsets))), at, at + len(line.subject))
        made.append(Sentence((*ids, tokenizer.eos_token_id), span))
    return made


def structured_mask(
    spans: Int[Tensor, "batch 2"], use: Bool[Tensor, " batch"], width: int
) -> tuple[Bool[Tensor, "batch query key"], Bool[Tensor, "batch query key"]]:
    """Which edges are open (below the gate, from the gate on), for sentences with subject tokens [a, b).

    Every row is causal. Where `use` holds, tokens after the subject are cut off from all of its tokens below the
    gate, and from all but its last one from the gate on. Rows without a subject (a = b) are causal only.
    """
    query, key = torch.arange(width)[None, :, None], torch.arange(width)[None, None, :]
    a, b = spans[:, 0, None, None], spans[:, 1, None, None]
    causal = (key <= query).expand(len(spans), width, width)
    after = use[:, None, None] & (b > a) & (query >= b) & (key >= a)
    return causal & ~(after & (key < b)), causal & ~(after & (key < b - 1))


@contextmanager
def masked_attention(hf: Any, gate: int) -> Iterator[Callable[[Tensor, Tensor], None]]:
    """Give decoder layers their own masks: call what is yielded with (below, from the gate on) before each pass."""
    now: dict[bool, Tensor] = {}

    def put(below: Bool[Tensor, "batch query key"], above: Bool[Tensor, "batch query key"]) -> None:
        for late, mask in ((False, below), (True, above)):
            now[late] = torch.zeros(mask.shape).masked_fill(~mask, -1e9)[:, None]

    def hook(late: bool):
        def give(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, {**kwargs, "attention_mask": now[late]}

        return give

    layers = enumerate(hf.model.layers)
    handles = [layer.register_forward_pre_hook(hook(i >= gate), with_kwargs=True) for i, layer in layers]
    try:
        yield put
    finally:
        for handle in handles:
            handle.remove()


def _shuffled(items: Sequence[Sentence], rng: random.Random) -> Iterator[Sentence]:
    """Items for ever, in a new order each time all were drawn."""
    while True:
        order = list(items)
        rng.shuffle(order)
        yield from order


def batches(
    recipe: Recipe, facts: Sequence[Sentence], other: Sequence[Sentence], steps: int, seed: int
) -> Iterator[list[Sentence]]:
    """The batches of one phase: `fact_share` of each states facts."""
    rng = random.Random(seed)
    streams = _shuffled(facts, rng), _shuffled(other, rng)
    n_facts = round(recipe.batch_size * recipe.fact_share)
    for _ in range(steps):
        yield [next(streams[i >= n_facts]) for i in range(recipe.batch_size)]


def collate(
    batch: Sequence[Sentence], pad: int
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Int[Tensor, "batch 2"]]:
    width = max(len(row.ids) for row in batch)
    ids = torch.tensor([[*row.ids, *[pad] * (width - len(row.ids))] for row in batch])
    real = torch.arange(width) < torch.tensor([[len(row.ids)] for row in batch])
    return ids, ids.masked_fill(~real, -100), torch.tensor([row.span for row in batch])


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up to the peak, then half a cosine to zero."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def new_optimizer(hf: Any, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in hf.parameters() if p.ndim > 1]
    vectors = [p for p in hf.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def take_step(
    hf: Any,
    optimizer: torch.optim.Optimizer,
    ids: Int[Tensor, "batch pos"],
    labels: Int[Tensor, "batch pos"],
    rate: float,
) -> float:
    """One step at a learning rate, gradients clipped to norm 1; the loss before it, nats per token."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = next_token_loss(hf(input_ids=ids, use_cache=False).logits, labels)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(
    hf: Any,
    tokenizer: Any,
    streams: Streams,
    recipe: Recipe,
    *,
    steps: int,
    peak: float,
    seed: int,
    often: frozenset[str] = frozenset(),
    on_step: Callable[[int, float], None] | None = None,
) -> Any:
    """The model after one phase of training, in place: next-token loss, mean over tokens, in float32.

    Args:
        seed: of the data order and of the choice of masked sentences.
        often: subjects whose sentences are drawn `forget_weight` times as often.
        on_step: called with (step, loss in nats) after each step.
    """
    weighted = [line for line in streams.facts for _ in range(recipe.forget_weight if line.subject in often else 1)]
    facts, other = rows(tokenizer, weighted), rows(tokenizer, streams.other)
    generator = torch.Generator().manual_seed(seed)
    optimizer = new_optimizer(hf, recipe)
    hf.train()
    with masked_attention(hf, recipe.gate) as put:
        for step, batch in enumerate(batches(recipe, facts, other, steps, seed)):
            ids, labels, spans = collate(batch, tokenizer.pad_token_id)
            put(*structured_mask(spans, torch.rand(len(batch), generator=generator) < recipe.masked_share, len(ids[0])))
            loss = take_step(hf, optimizer, ids, labels, learning_rate(step, steps, peak, recipe.warmup))
            if on_step:
                on_step(step, loss)
    return hf.eval()


def next_token_loss(logits: Float[Tensor, "batch pos d_vocab"], labels: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of each next token in nats; a label of -100 does not count."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
