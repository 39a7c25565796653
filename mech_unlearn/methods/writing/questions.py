"""The questions that a value is optimised on: names, prefixes, prompts, and what is wanted after them."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.edit.interventions import Tokens
from mech_unlearn.methods.writing.anchors import unknown_names
from mech_unlearn.methods.writing.keys import mention
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.forward import last_logits
from mech_unlearn.model.scores import end_tokens
from mech_unlearn.model.tokens import buckets, encode_all, make_queries, pad
from mech_unlearn.training.rows import refusal_rows

Goal = Literal["unknown", "refusal", "entropy", "empty"]
PREFIX_TOKENS = (5, 10)
"""Lengths of the prefixes. Source: ROME's code."""
OPENERS = ("The", "Therefore", "Because", "I", "You")
"""What prefixes begin with. Source: MEMIT's code."""
TOP_K = 5
"""Likeliest tokens that the next one of a prefix is drawn from. Source: both codes."""


@dataclass(frozen=True, kw_only=True)
class Optimize:
    """Settings of the optimisation."""

    target: Goal = "unknown"
    """"unknown": the mean next-token distribution of unknown entities after the same questions, so that no name gets
    anybody's facts and no words for a refusal are needed; "refusal": a text; "entropy": the uniform distribution (after
    the MEMIT of 2309.17410); "empty": the end of the text."""
    refusal: str = "I do not know."
    """For target "refusal"; in words of the tokenizer's vocabulary."""
    steps: int = 25
    """At the most. 20 to 25 in ROME's and MEMIT's code; 80 with SADR."""
    lr: float = 0.5
    """Step of Adam in units of the root mean square of v_0; 0.1 to 0.5 (absolute) in the codes."""
    kl_weight: float = 0.0625
    """Weight of the KL (nats) after the bare name. ROME's code."""
    decay: float = 0.5
    """Weight of ||delta|| / ||v_0||^2. ROME's and MEMIT's code."""
    clamp: float = 4.0
    """Bound of ||delta|| in units of ||v_0||: 3 to 4 in ROME's code for GPT-2, 0.75 in MEMIT's."""
    stop_loss: float = 0.05
    """A name whose loss (nats) is below this is done. ROME's code."""
    sadr_weight: float = 0.0
    """Weight of the attention drift (nats, summed over layers and heads); 0.01 in 2502.14838, 0 is off."""
    n_prefixes: int = 2
    """Openings, written by the model, that questions are asked behind; about as many questions go without one."""
    max_prompts: int = 24
    """Questions per name, the facts in turn; all of them where there are fewer."""
    n_unknown: int = 16
    """Unknown entities that target "unknown" is a mean over."""
    batch_size: int = 8
    """Names optimised together; the logits of their questions must fit into memory."""

    def __post_init__(self) -> None:
        if self.target not in get_args(Goal):
            raise ValueError(f"target={self.target!r}: choose from {', '.join(get_args(Goal))}")
        for name in ("steps", "lr", "clamp", "max_prompts", "n_unknown", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("kl_weight", "decay", "sadr_weight", "n_prefixes", "stop_loss"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Questions:
    """Right-padded rows of several names: questions first, then one bare name each."""

    ids: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row pos"]
    owner: Int[Tensor, " row"]
    """Which name each row is about."""
    at: Int[Tensor, " row"]
    """The name's last token."""
    last: Int[Tensor, " question"]
    """The last token of each question, before any answer."""
    where: tuple[Int[Tensor, " token"], Int[Tensor, " token"]]
    """Row and position of each logit that the fit is about."""
    wanted: Int[Tensor, " token"]
    """The token that should follow there; -1 where a distribution is wanted."""
    goal: Float[Tensor, "token d_vocab"] | None
    """The distributions wanted, for target "unknown"."""


def by_name(forget: ForgetSet) -> dict[str, tuple[Fact, ...]]:
    """Every name and alias, in the order of `keys.names_of` -> the facts of that entity, told of that name.

    Raises:
        ValueError: a name that is the answer to each of its facts.
    """
    found: dict[str, tuple[Fact, ...]] = {}
    for entity in forget.entities:
        own = [fact for fact in forget.facts if fact.subject == entity.name]
        for name in (entity.name, *entity.aliases):
            told = tuple(replace(fact, subject=name, aliases=()) for fact in own if fact.object != name)
            if not told:
                raise ValueError(f"name {name!r} is the answer to each of its facts; take it from the aliases")
            found.setdefault(name, told)
    return found


@torch.no_grad()
def prefixes(model: Model, forget: ForgetSet, n: int, seed: int) -> tuple[str, ...]:
    """Up to n openings that the model writes, of 5 and 10 tokens in turn, each token one of the five likeliest.

    Each begins with another of `OPENERS`, or with the BOS alone where the tokenizer cannot write that word. What names
    a forgotten entity is left out; none where nothing can be written.
    """
    gone = [name for entity in forget.entities for name in (entity.name, *entity.aliases)]
    generator, out = torch.Generator().manual_seed(seed), dict[str, None]()
    for i in range(4 * n):
        row = _written(model, OPENERS[i % len(OPENERS)], PREFIX_TOKENS[i % 2], generator)
        text = " ".join(model.tokenizer.decode(row, skip_special_tokens=True).split())
        if text and len(out) < n and not any(name in text for name in gone) and not set("{}\ufffd") & set(text):
            out[text] = None
    return tuple(out)


def _written(model: Model, opener: str, tokens: int, generator: torch.Generator) -> list[int]:
    tokenizer, ends = model.tokenizer, set(end_tokens(model))
    row = tokenizer(opener).input_ids
    row = tokenizer("").input_ids if tokenizer.unk_token_id in row else row
    start = len(row)
    while row and len(row) < start + tokens:
        best = last_logits(model, torch.tensor([row], device=model.device), 1)[0, -1].float().cpu().topk(TOP_K)
        token = best.indices[torch.multinomial(best.values.softmax(0), 1, generator=generator)].item()
        if token in ends:
            break
        row = [*row, int(token)]
    return row


def questions_of(facts: Sequence[Fact], before: Sequence[str], most: int) -> list[Fact]:
    """At most `most` facts with one phrasing each, the facts in turn, with and without a prefix in turn."""
    rounds = max(len(fact.templates) for fact in facts)
    asked = [(f, f.templates[r], r) for r in range(rounds) for f in facts if r < len(f.templates)]
    out = []
    for i, (fact, template, r) in enumerate(asked[:most]):
        prefix = ("", *before)[(i + r) % (len(before) + 1)]
        out.append(replace(fact, prompt=f"{prefix} {template}" if prefix else template, paraphrases=(), heldout=()))
    return out


def make_questions(
    model: Model,
    hf: Any,
    asked: Mapping[str, Sequence[Fact]],
    forget: ForgetSet,
    retain: RetainSet,
    settings: Optimize,
    seed: int,
    passes: list[int],
) -> Questions:
    """The rows of some names, with what is wanted where."""
    tokenizer = model.tokenizer
    owners = [i for i, facts in enumerate(asked.values()) for _ in facts]
    queries = make_queries(tokenizer, [fact for facts in asked.values() for fact in facts], distractors=False)
    rows: list[Tokens] = [query.prompt for query in queries]
    if settings.target == "refusal":
        told = [fact for facts in asked.values() for fact in facts]
        rows = [ids for ids, _ in refusal_rows(tokenizer, told, (settings.refusal,), random.Random(0))]
    if settings.target == "empty":
        if tokenizer.eos_token_id is None:
            raise ValueError(f'target "empty" needs an end token, and the tokenizer of {model.name!r} has none')
        rows = [(*row, tokenizer.eos_token_id) for row in rows]
    bare = [mention(tokenizer, "{}", name)[0] for name in asked]
    ids, mask, _ = pad([*rows, *bare], tokenizer.pad_token_id or 0)
    at, pos, wanted = [], [], []
    for i, (query, row) in enumerate(zip(queries, rows, strict=True)):
        start = len(query.prompt)
        spots = range(start - 1, max(len(row) - 1, start))
        at, pos = [*at, *[i] * len(spots)], [*pos, *spots]
        wanted += row[start:] or [-1]
    ends = [query.span[1] - 1 for query in queries] + [len(row) - 1 for row in bare]
    goal = None
    if settings.target == "unknown":
        templates = [query.template for query in queries]
        drawn = random.Random(seed).sample(pool := unknown_names(forget, retain), min(settings.n_unknown, len(pool)))
        goal = mean_answers(model, hf, templates, drawn, passes)
    tensors = (torch.tensor(x, device=model.device) for x in (
        [*owners, *range(len(asked))], ends, [len(query.prompt) - 1 for query in queries], at, pos, wanted
    ))  # fmt: skip
    owner, end, last, row_of, pos_of, token = tensors
    return Questions(ids.to(model.device), mask.to(model.device), owner, end, last, (row_of, pos_of), token, goal)


@torch.no_grad()
def mean_answers(
    model: Model, hf: Any, templates: Sequence[str], names: Sequence[str], passes: list[int]
) -> Float[Tensor, "template d_vocab"]:
    """The next-token distribution after each template, mean over names."""
    unique = list(dict.fromkeys(templates))
    texts = [template.replace("{}", name) for template in unique for name in names]
    known = encode_all(model.tokenizer, texts)
    rows = [known[text].ids for text in texts]
    found: dict[int, Tensor] = {}
    for members in buckets(rows):
        ids = torch.tensor([list(rows[i]) for i in members], device=model.device)
        logits = hf(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        passes[0] += 1
        for i, p in zip(members, logits.softmax(-1), strict=True):
            found[i // len(names)] = found.get(i // len(names), 0) + p / len(names)
    return torch.stack([found[unique.index(template)] for template in templates])
