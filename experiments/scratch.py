"""Small models from scratch on any texts, and the exact-unlearning references that go with them.

One base model never sees a text of anybody who may be forgotten. It is continued on everything (`full`), on what is
left after each request (`retrained-...`), and on the texts of one shard of the owners (`shard-...`), so that all models
share a basis and states of one can be put into another.

Sharding is SISA's (Bourtoule et al. 2021, arXiv 1912.03817): owners are dealt to shards, one constituent is trained per
shard, a request retrains only the constituents whose shard held somebody who goes. Differs: constituents start from the
shared base instead of from nothing, and there are no slices; `ensemble.join` lets them answer together. So a
constituent knows what the base knew, whichever shard that was dealt to.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mech_unlearn.run import side_by_side
from mech_unlearn.testbed.build import save_model
from mech_unlearn.testbed.corpus import Line
from mech_unlearn.testbed.recipe import (
    BOS,
    EOS,
    PAD,
    UNK,
    Recipe,
    Sentence,
    collate,
    learning_rate,
    masked_attention,
    new_model,
    new_optimizer,
    rows,
    structured_mask,
    take_step,
)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A training text and whose it is."""

    text: str
    owner: str | None = None
    """Who is forgotten with it; None: nobody, every model may see it."""
    subject: str | None = None
    """A name in the text for the structured mask of `recipe`; None: plainly causal."""


def without(texts: Sequence[Text], gone: Iterable[str]) -> tuple[Text, ...]:
    """The texts that remain after a request: owned by none of those who go and naming none of them (whole words, in any
    case)."""
    names = frozenset(gone)
    if not names:
        return tuple(texts)
    named = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(names)))})(?!\w)", re.IGNORECASE)
    return tuple(text for text in texts if text.owner not in names and not named.search(text.text))


def make_vocabulary(whole: Sequence[str], rest: Sequence[str] = (), pieces: int = 0) -> Any:
    """A WordPiece tokenizer in which every word of `whole` and every punctuation mark is one token; other words fall
    into at most `pieces` pieces learnt from `rest`, else into letters.

    The trainer of `tokenizers` breaks ties by chance: with `pieces` two calls need not give the same vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.BertPreTokenizer()
    words = dict.fromkeys(word for text in whole for word, _ in split.pre_tokenize_str(text))
    letters = {letter for text in (*whole, *rest) for letter in text if not letter.isspace()}
    learnt: list[str] = []
    if pieces:
        found = Tokenizer(models.WordPiece(unk_token=UNK))
        found.pre_tokenizer = split
        found.train_from_iterator(list(rest), trainers.WordPieceTrainer(vocab_size=pieces, show_progress=False))
        learnt = sorted(found.get_vocab())
    alphabet = sorted(letters | set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    order = [PAD, UNK, BOS, EOS, *sorted(words), *alphabet, *(f"##{letter}" for letter in alphabet), *learnt]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(dict.fromkeys(order))}, unk_token=UNK))
    core.pre_tokenizer = split
    core.decoder = decoders.WordPiece(prefix="##")
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, unk_token=UNK, bos_token=BOS, eos_token=EOS, model_max_length=256
    )


def packed(items: Sequence[Sentence], tokens: int, seed: int) -> Iterator[list[Sentence]]:
    """Batches for ever: every row once per pass, rows of like length together, at most `tokens` padded tokens each."""
    rng = random.Random(seed)
    while True:
        order = sorted(items, key=lambda row: (len(row.ids), rng.random()))
        batches: list[list[Sentence]] = [[]]
        for row in order:
            if batches[-1] and (len(batches[-1]) + 1) * len(row.ids) > tokens:
                batches.append([])
            batches[-1].append(row)
        rng.shuffle(batches)
        yield from batches


def train_texts(
    hf: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    recipe: Recipe,
    *,
    steps: int,
    peak: float,
    seed: int,
    tokens: int = 2048,
    often: frozenset[str] = frozenset(),
    on_step: Callable[[int, float], None] | None = None,
) -> Any:
    """The model after one phase of training, in place: next-token loss in nats, mean over tokens, float32.

    Args:
        tokens: padded tokens per step at the most.
        often: owners whose texts are drawn `recipe.forget_weight` times as often.
        on_step: called with (step, loss) after each step.

    Raises:
        ValueError: no text, or one that is longer than the model's positions (it is never cut).
    """
    weighted = [t for t in texts for _ in range(recipe.forget_weight if t.owner in often else 1)]
    items = rows(tokenizer, [Line(t.text, t.subject) for t in weighted])
    if not items:
        raise ValueError("no text to train on: every text was left out, or none was given")
    limit = hf.config.max_position_embeddings
    if long := [t.text for t, row in zip(weighted, items, strict=True) if len(row.ids) > limit]:
        raise ValueError(
            f"{len(set(long))} texts have more than {limit} tokens, such as {long[0][:60]!r}: shorten them"
        )
    generator = torch.Generator().manual_seed(seed)
    optimizer, masks = new_optimizer(hf, recipe), recipe.masked_share > 0
    batches = packed(items, tokens, seed)
    hf.train()
    with masked_attention(hf, recipe.gate) if masks else nullcontext() as put:
        for step in range(steps):
            ids, labels, spans = collate(next(batches), tokenizer.pad_token_id)
            if put is not None:
                put(
                    *structured_mask(
                        spans, torch.rand(len(ids), generator=generator) < recipe.masked_share, len(ids[0])
                    )
                )
            loss = take_step(hf, optimizer, ids, labels, learning_rate(step, steps, peak, recipe.warmup))
            if on_step:
                on_step(step, loss)
    return hf.eval()


def deal(owners: Iterable[str], shards: int, seed: int) -> dict[str, int]:
    """Owner -> shard, dealt at random, as even as can be.

    Raises:
        ValueError: fewer owners than shards.
    """
    order = sorted(set(owners))
    if not 1 <= shards <= len(order):
        raise ValueError(f"{len(order)} owners cannot be dealt to {shards} shards: give each shard one or more")
    random.Random(seed).shuffle(order)
    return {owner: i % shards for i, owner in enumerate(order)}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which models there are and what each is trained on."""

    texts: tuple[Text, ...]
    requests: Mapping[str, frozenset[str]]
    """Name of a request -> the owners who are to be forgotten by it."""
    tokenizer: Any
    recipe: Recipe
    shards: Mapping[str, int]
    """Owner -> shard, from `deal`."""
    retrained: Mapping[str, int] = field(default_factory=dict)
    """Request -> how many retrained models, each with its own data order; 1 where not given."""
    shard_steps: int = 200
    """Steps by which the base is continued to one constituent."""
    tokens: int = 2048
    """Padded tokens per step."""
    positions: int = 192
    """Longest text in tokens."""
    seed: int = 0

    @property
    def everybody(self) -> frozenset[str]:
        """All who are forgotten by some request."""
        return frozenset().union(*self.requests.values())

    def hit(self, request: str) -> tuple[int, ...]:
        """The shards that held somebody who goes: those whose constituents are retrained."""
        return tuple(sorted({self.shards[owner] for owner in self.requests[request]}))

    def names(self) -> tuple[str, ...]:
        """All models but the base, those that take longest first."""
        again = [f"retrained-{r}-{k}" for r in self.requests for k in range(self.retrained.get(r, 1))]
        dealt = range(max(self.shards.values(), default=-1) + 1)
        parts = [*(f"shard-{i}" for i in dealt), *(f"shard-{i}-{r}" for r in self.requests for i in self.hit(r))]
        return ("full", *again, *parts)

    def constituents(self, request: str | None) -> tuple[str, ...]:
        """The models whose answers are joined, before any request (None) or after one."""
        shards = range(max(self.shards.values()) + 1)
        changed = () if request is None else self.hit(request)
        return tuple(f"shard-{i}-{request}" if i in changed else f"shard-{i}" for i in shards)

    def texts_of(self, name: str) -> tuple[Text, ...]:
        """What a model is trained on after the base, or as the base.

        Raises:
            ValueError: no such model.
        """
        kind, *rest = name.split("-")
        if kind == "base":
            return without(self.texts, self.everybody)
        if kind == "full":
            return self.texts
        request = rest[0] if kind == "retrained" else rest[1] if len(rest) > 1 else None
        if kind not in ("retrained", "shard") or (request is not None and request not in self.requests):
            raise ValueError(f"no model {name!r}; choose from base, {', '.join(self.names())}")
        left = self.texts if request is None else without(self.texts, self.requests[request])
        if kind == "retrained":
            return left
        return tuple(t for t in left if t.owner is None or self.shards.get(t.owner) == int(rest[0]))


def make(
    plan: Plan, folder: Path, name: str, *, threads: int = 1, log: Callable[[str, int, float], None] | None = None
) -> None:
    """Train one model of a plan and write it, unless it is there. Deterministic by seed, tokenizer and threads.

    The base is written with the plan's tokenizer; the others take theirs from the base, so that a plan made anew, whose
    learnt pieces may differ, goes on where the first one stopped.

    `full` and `retrained-...-0` see their data in orders of the same seed and differ by the forgotten texts alone.

    Raises:
        ValueError: a model that continues the base before there is one.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    if (folder / name / "config.json").exists():
        return
    torch.set_num_threads(threads)
    base, recipe, texts = name == "base", plan.recipe, plan.texts_of(name)
    tokenizer = plan.tokenizer
    if base:
        hf = new_model(recipe, tokenizer, plan.seed)
        hf.config.max_position_embeddings = plan.positions
    elif (folder / "base" / "config.json").exists():
        hf = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    else:
        raise ValueError(f"{name!r} continues the base model, and {str(folder / 'base')!r} is not there: make it first")
    steps = recipe.base_steps if base else plan.shard_steps if name.startswith("shard") else recipe.continue_steps
    order = plan.seed + (0 if base else 1 + (int(name.rsplit("-", 1)[1]) if name.startswith("retrained") else 0))
    train_texts(
        hf, tokenizer, texts, recipe, steps=steps, peak=recipe.base_lr if base else recipe.continue_lr,
        seed=order, tokens=plan.tokens, often=plan.everybody,
        on_step=(lambda step, loss: log(name, step, loss)) if log else None,
    )  # fmt: skip
    save_model(hf, tokenizer, folder / name, torch.float32)


def build(plan: Plan, folder: Path, *, workers: int = 2, said: Callable[[str], None] | None = None) -> None:
    """All models of a plan: the base on `workers` threads, then the others side by side in as many processes of one
    thread each; what is there is kept."""
    say = said or (lambda _: None)
    folder.mkdir(parents=True, exist_ok=True)
    make(plan, folder, "base", threads=workers)
    say("base")
    waiting = [name for name in plan.names() if not (folder / name / "config.json").exists()]
    for name, _ in side_by_side(waiting, partial(make, plan, folder), workers=workers):
        say(name)
