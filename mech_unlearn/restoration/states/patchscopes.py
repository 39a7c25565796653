"""Patchscopes: when U's state is put into another prompt, does the model that reads it say the answer?

Paper:    Ghandeharioun et al. 2024, Patchscopes, arXiv 2401.06102.
Changes:  nothing kept; one state of the reading model is written over in each pass.
Needs:    per source layer one patched pass of each candidate; before that, on at most ten facts, one per source
          layer, target layer and prompt, for the full and one retrained model.
Differs:  three prompts, put together from the case's own words: `relation` (the question about a placeholder),
          `description` (the same after two other facts of the relation), `identity` (words repeated, then the
          placeholder). The first two are given the state of the subject's last token, `identity` that of the prompt's
          last token. A prompt is left out unless the case has words for it for every fact. The answer is scored as a
          margin over its distractors, not generated. For each source layer, prompt and target layer are those that set
          the full model furthest apart from a retrained one on TUNE; the source layer is chosen per audited model on
          TUNE. A negative margin counts as 0: certainty of something else is no less knowledge. target="full" reads
          with F, target="self" with the audited model itself. The placeholder is an unknown name, or x. Without
          retrained models the level of ignorance is that of sham facts: grade B.
Fails:    target="self" is blind to a block behind the target layer, both to one before the source layer. A small
          model that binds facts to more than one token of the name reads little off its last one; then it is silent.

`score_raw` is the margin in nats under the patch, 0 at the least; recoverability is kappa of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Fact, Site
from mech_unlearn.model.asking import unwritable_marks
from mech_unlearn.model.bridge import Model, require_positions
from mech_unlearn.model.capture import capture
from mech_unlearn.model.scores import Batch, score_each
from mech_unlearn.model.tokens import Ask, Query, encode, has_unknown, tokenize
from mech_unlearn.restoration.engine.case import Case, split_queries, tune_facts
from mech_unlearn.restoration.engine.levels import Levels
from mech_unlearn.restoration.engine.normalise import MIN_GAP, mean_by_fact, relation_mean, sham_facts
from mech_unlearn.restoration.engine.readouts import Read, ReadLevels, readout_result
from mech_unlearn.verdict.result import Result

ReadBy = Literal["full", "self"]
Name = Literal["relation", "description", "identity"]
PICK_FACTS, DEMOS, SOURCES = 10, 2, 12
"""Facts that choose prompt and target layer; facts told first; source layers at most."""


@dataclass(frozen=True, eq=False)
class Put:
    """Writes one state per query at the last token of its placeholder."""

    states: Float[Tensor, "query d_model"]

    def __call__(self, x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Tensor:
        out = x.clone()
        row = torch.arange(len(x), device=x.device)
        out[row, batch.span[:, 1] - 1] = self.states.to(x.device)[batch.query].to(x)
        return out


@dataclass(frozen=True, eq=False)
class PatchQueries:
    """Questions of one split about some facts, and the prompts that their states are put into."""

    facts: tuple[Fact, ...]
    queries: tuple[Query, ...]
    targets: Mapping[Name, tuple[Query, ...]]
    """With the candidates of the question; the placeholder is the subject."""


@dataclass(frozen=True)
class PatchPoint:
    """Where a state of a source layer is put."""

    source: int
    prompt: Name
    target: int


@dataclass(frozen=True, eq=False)
class PatchReady:
    target: ReadBy
    places: tuple[PatchPoint, ...]
    tune: PatchQueries
    test: PatchQueries
    levels: ReadLevels
    choice_full: Float[Tensor, "point fact"]
    """Share of phrasings in which the full model, reading its own state, prefers the answer."""


def source_states(model: Model, queries: Sequence[Query], prompt: Name) -> Float[Tensor, "layer query d_model"]:
    """resid_post of every layer at the subject's last token, or at the prompt's last token for `identity`."""
    sites = [Site(layer, "resid_post") for layer in range(model.n_layers)]
    at = [len(q.prompt) - 1 if prompt == "identity" else q.span[1] - 1 for q in queries]
    store = capture(model, [q.prompt for q in queries], sites, at, dtype=torch.float32)
    return torch.stack([store[site] for site in sites])


def _written(tokenizer: object, text: str) -> str:
    """The text without the marks that the tokenizer cannot write."""
    return " ".join(text.translate(str.maketrans("", "", unwritable_marks(tokenizer))).split())


def target_ask(case: Case, query: Query, prompt: Name, number: int) -> Ask | None:
    """The prompt that a state is put into, or None where the case has no words for it."""
    name = case.unknown[number % len(case.unknown)].name if case.unknown else "x"
    gone, told = {fact.subject for fact in case.facts}, (query.fact.object, *query.fact.distractors)
    away = [f for f in case.others if f.subject not in gone and f.object != query.fact.object]
    tokenizer = case.full.tokenizer
    if prompt == "relation":
        return Ask(query.fact, query.template, name)
    if prompt == "description":
        alike = [f for f in away if f.relation == query.fact.relation]
        if len(alike) < DEMOS:
            return None
        start = number % (len(alike) - DEMOS + 1)
        said = [f"{f.stated(f.prompt)}." for f in alike[start : start + DEMOS]]
        return Ask(query.fact, _written(tokenizer, " ".join(said) + " ") + " " + query.template, name)
    words = list(dict.fromkeys(f.object for f in away if f.object not in told))[:DEMOS]
    if len(words) < DEMOS:
        return None
    arrow = " " if has_unknown(tokenizer, encode(tokenizer, "->")) else " -> "
    return Ask(query.fact, _written(tokenizer, " ".join(f"{w}{arrow}{w};" for w in words)) + " {}", name)


def make_asked(case: Case, queries: Sequence[Query], facts: Sequence[Fact], prompts: Sequence[Name]) -> PatchQueries:
    """The questions with those of the prompts that can be put together for all of them."""
    targets = {}
    for prompt in prompts:
        asks = [target_ask(case, query, prompt, i) for i, query in enumerate(queries)]
        made = [ask for ask in asks if ask is not None]
        if len(made) == len(asks):
            targets[prompt] = tokenize(case.full.tokenizer, made)
    return PatchQueries(tuple(facts), tuple(queries), targets)


def _tune_and_test(
    case: Case, facts: Sequence[Fact], chosen: Sequence[int], prompts: Sequence[Name]
) -> tuple[PatchQueries, PatchQueries]:
    """The TUNE questions about the chosen facts, and the TEST questions about all of them."""
    some = [facts[i] for i in chosen]
    return (
        make_asked(case, split_queries(case, "tune", some), some, prompts),
        make_asked(case, split_queries(case, "test", facts), facts, prompts),
    )


def read(
    asked: PatchQueries, source: Model, target: Model, places: Sequence[PatchPoint]
) -> tuple[Float[Tensor, "point fact"], Float[Tensor, "point fact"]]:
    """(Margin in nats, 0 at the least; share of phrasings in which the answer is preferred) at each place."""
    margin, choice = (torch.zeros(len(places), len(asked.queries)) for _ in range(2))
    prompts: tuple[Name, ...] = tuple(dict.fromkeys(p.prompt for p in places))
    for prompt in prompts:
        states = source_states(source, asked.queries, prompt)
        mine = [i for i, p in enumerate(places) if p.prompt == prompt]
        arms = [{Site(places[i].target, "resid_post"): Put(states[places[i].source])} for i in mine]
        for i, scores in zip(mine, score_each(target, asked.targets[prompt], arms), strict=True):
            margin[i], choice[i] = scores.margin.clamp(min=0), scores.choice
    return mean_by_fact(margin, asked.queries, asked.facts), mean_by_fact(choice, asked.queries, asked.facts)


def _spread(n: int, most: int) -> list[int]:
    """At most `most` of n layers, evenly, the last one among them."""
    return sorted({round((n - 1) * i / max(1, min(n, most) - 1)) for i in range(min(n, most))} | {n - 1})


def pick_places(case: Case, asked: PatchQueries, target_layers: Sequence[int]) -> tuple[PatchPoint, ...]:
    """For each source layer the prompt and target layer with the largest mean margin of F beyond a retrained model's
    (grade B: of F), both read by F."""
    sources = _spread(case.full.n_layers, SOURCES)
    grid = [PatchPoint(s, p, t) for s in sources for p in asked.targets for t in target_layers]
    gain = read(asked, case.full, case.full, grid)[0].mean(1)
    if case.retrained:
        gain = gain - read(asked, case.retrained[0], case.full, grid)[0].mean(1)
    best = {s: max((i for i, g in enumerate(grid) if g.source == s), key=lambda i: gain[i].item()) for s in sources}
    return tuple(grid[best[s]] for s in sources)


def prepare(
    case: Case,
    shared: Levels | None = None,
    *,
    target: ReadBy = "full",
    prompts: Sequence[Name] = ("relation", "description", "identity"),
    target_layers: Sequence[int] | None = None,
) -> PatchReady:
    """Choose where states are put, and read those of the full and the retrained models.

    Args:
        target: who reads: the full model, or each model its own states.
        target_layers: layers behind which a state may be put; by default the first, the one at a quarter, the middle.

    Raises:
        ValueError: an unknown target or prompt, a layer that the model lacks, a fact without distractors, or no prompt
            that the case has words for.
    """
    if target not in get_args(ReadBy) or any(p not in get_args(Name) for p in prompts):
        raise ValueError(
            f"target={target!r}, prompts={tuple(prompts)}: choose from {', '.join(get_args(ReadBy))}, and from "
            f"{', '.join(get_args(Name))}"
        )
    depth = case.full.n_layers
    layers = sorted({0, depth // 4, depth // 2}) if target_layers is None else list(target_layers)
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise ValueError(f"target layers {layers}: choose from 0..{depth - 1}")
    if bare := [fact.id for fact in case.facts if not fact.distractors]:
        raise ValueError(f"fact {bare[0]!r} has no distractors: the answer's margin over them is what is read")
    order, few = tune_facts(case), tune_facts(case, PICK_FACTS)
    tune, test = _tune_and_test(case, case.facts, order, prompts)
    shams = () if case.retrained else _tune_and_test(case, sham_facts(case.facts, case.seed), order, prompts)
    everything = (tune, test, *shams)
    used: tuple[Name, ...] = tuple(p for p in prompts if all(p in asked.targets for asked in everything))
    if left := [prompt for prompt in prompts if prompt not in used]:
        case.log(f"patchscopes without {', '.join(left)}: the case has no words for it for every fact")
    if not used:
        raise ValueError("no prompt to put states into: give Case(others=...), or the prompt 'relation'")
    some = [case.facts[i] for i in few]
    places = pick_places(case, make_asked(case, split_queries(case, "tune", some), some, used), layers)

    def both(source: Model, reader: Model, a: PatchQueries = tune, b: PatchQueries = test) -> tuple[Read, Tensor]:
        (on_tune, _), (on_test, choice) = read(a, source, reader, places), read(b, source, reader, places)
        return Read(on_tune, on_test), choice

    full, choice = both(case.full, case.full)
    never = [both(model, case.full if target == "full" else model)[0] for model in case.retrained]
    if not never:
        sham = both(case.full, case.full, *shams)[0]
        never = [Read(relation_mean(sham.tune, tune.facts), relation_mean(sham.test, case.facts))]
    points = tuple(f"layer {p.source} into {p.prompt}, layer {p.target}" for p in places)
    levels = ReadLevels(points, tuple(p.source for p in places), full, tuple(never), MIN_GAP)
    return PatchReady(target, places, tune, test, levels, choice)


def audit(case: Case, ready: PatchReady, model: Model, name: str) -> Result:
    """Put the audited model's states into the chosen prompts."""
    require_positions(model)
    reader = case.full if ready.target == "full" else model
    (tune, _), (test, choice) = (read(asked, model, reader, ready.places) for asked in (ready.tune, ready.test))
    passes = len(ready.places) * sum(len(q.answers) for a in (ready.tune, ready.test) for q in a.queries)
    return readout_result(
        case,
        ready.levels,
        model,
        Read(tune, test),
        test="patchscopes" if ready.target == "full" else "patchscopes_self",
        name=name,
        cost_fe=passes / len(case.facts),
        columns=lambda point: {"choice": choice[point], "choice_F": ready.choice_full[point]},
    )
