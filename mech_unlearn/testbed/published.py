"""The published single scores of unlearning, one number per fact and model: what a verdict is compared with.

Paper:    extraction strength (ES), exact memorization (EM), probability, paraphrased probability, truth ratio, ROUGE
          and the membership scores as arXiv 2506.12618 computes them; CKA and masked Fisher as arXiv 2605.24614 does.
Needs:    besides a few forward passes one backward pass per fact, of each model.
Differs:  every score is oriented so that more means "still there". CKA and Fisher are numbers of a model and repeated
          for its facts. CKA is debiased, over all tokens of the prompts. The Fisher mask is the top 1 % of weights.
Fails:    all but CKA and Fisher read outputs only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Fact, Site
from mech_unlearn.metrics.membership import statement, text_scores
from mech_unlearn.metrics.memorization import answer_probability, exact_memorization, extraction_strength
from mech_unlearn.metrics.rouge import rouge_recall
from mech_unlearn.metrics.truth_ratio import truth_ratio_normalized
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import capture
from mech_unlearn.model.scores import greedy, score
from mech_unlearn.model.tokens import Query, buckets, make_queries
from mech_unlearn.restoration.states.similarity import erasure, likeness
from mech_unlearn.testbed.making import block_names

FISHER_SHARE = 0.01
"""Share of weights in the Fisher mask, of those that full needs for the facts more than retrained models do."""
OUTPUT_SCORES = ("es", "em", "prob", "para_prob", "truth_ratio", "rouge", "loss", "zlib", "min_k", "min_k_pp",
                 "reference")  # fmt: skip
STATE_SCORES = ("cka", "fisher")


@dataclass(frozen=True, eq=False)
class Known:
    """What full and retrained models say, computed once per group of facts."""

    facts: tuple[Fact, ...]
    loss: Float[Tensor, " fact"]
    """Mean loss of retrained models on the facts' statements."""
    full_states: Float[Tensor, "layer row d_model"]
    never_states: tuple[Float[Tensor, "layer row d_model"], ...]
    mask: dict[str, Tensor]
    fisher_full: float
    fisher_never: float


def known(full: Model, retrained: Sequence[Model], facts: Sequence[Fact]) -> Known:
    """The levels of full and retrained models."""
    first = fisher(full, facts)
    others = [fisher(model, facts) for model in retrained]
    never = {name: torch.stack([other[name] for other in others]).mean(0) for name in first}
    more = {name: (first[name] - never[name]).clamp(min=0) for name in first}
    flat = torch.cat([x.flatten() for x in more.values()])
    bound = flat.topk(max(1, int(FISHER_SHARE * len(flat)))).values[-1]
    mask = {name: x >= bound for name, x in more.items()}
    return Known(
        tuple(facts),
        torch.stack([text_scores(model, [statement(f) for f in facts])["loss"] for model in retrained]).mean(0),
        states(full, facts), tuple(states(model, facts) for model in retrained),
        mask, _masked(first, mask), _masked(never, mask),
    )  # fmt: skip


def states(model: Model, facts: Sequence[Fact]) -> Float[Tensor, "layer row d_model"]:
    """resid_post of every layer at every token of the facts' main prompts."""
    places = [Site(layer, "resid_post") for layer in range(model.n_layers)]
    prompts = [query.prompt for query in make_queries(model.tokenizer, facts, "prompt", distractors=False)]
    prefixes = sorted({prompt[: end + 1] for prompt in prompts for end in range(len(prompt))})
    store = capture(model, prefixes, places, "last", dtype=torch.float32)
    return torch.stack([store[place] for place in places])


def fisher(model: Model, facts: Sequence[Fact]) -> dict[str, Tensor]:
    """Mean squared gradient of each fact's answer loss by every weight matrix of the decoder layers."""
    inside = [name for layer in range(model.n_layers) for name in block_names(model, layer)]
    names = [name for name in inside if model.held[name].ndim == 2]
    hf = model.plain_copy()  # a booted model reads copies of joint QKV matrices, which get no gradient
    held = dict(hf.named_parameters())
    weights = [held[name] for name in names]
    total = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    queries = make_queries(model.tokenizer, facts, "prompt", distractors=False)
    with torch.enable_grad():
        for query in queries:
            ids = torch.tensor([query.full], device=model.device)
            start = len(query.prompt)
            logits = hf(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, start:])
            for old, new in zip(total, torch.autograd.grad(loss, weights), strict=True):
                old += new.float().square() / len(queries)
    return dict(zip(names, total, strict=True))


def _masked(found: dict[str, Tensor], mask: dict[str, Tensor]) -> float:
    return torch.cat([found[name][mask[name]] for name in found]).mean().item()


@torch.no_grad()
def memorized(model: Model, queries: Sequence[Query]) -> dict[str, Float[Tensor, " query"]]:
    """ES, EM and probability of the true answer of each query."""
    out = {name: torch.zeros(len(queries)) for name in ("es", "em", "prob")}
    for members in buckets([query.full for query in queries]):
        ids = torch.tensor([queries[i].full for i in members], device=model.device)
        starts = torch.tensor([len(queries[i].prompt) for i in members], device=model.device)
        labels = torch.where(torch.arange(ids.shape[1], device=ids.device) >= starts[:, None], ids, -100)
        logits = model.logits(ids)
        for name, score_of in (("es", extraction_strength), ("em", exact_memorization), ("prob", answer_probability)):
            out[name][members] = score_of(logits, labels).cpu()
    return out


def published(model: Model, levels: Known) -> dict[str, Float[Tensor, " fact"]]:
    """Every score of a model, per fact; more means "still there"."""
    facts = levels.facts
    main = make_queries(model.tokenizer, facts, "prompt")
    found = memorized(model, main)
    candidates = score(model, main).logprob
    loss = -candidates
    every = make_queries(model.tokenizer, facts, "templates", distractors=False)
    order = {fact.id: i for i, fact in enumerate(facts)}
    at = torch.tensor([order[query.fact.id] for query in every])
    answers = score(model, every).logprob[:, 0]
    found["para_prob"] = (torch.zeros(len(facts)).index_add(0, at, answers) / torch.bincount(at)).exp()
    found["truth_ratio"] = truth_ratio_normalized(loss[:, 0], loss[:, 1:].nanmean(1, keepdim=True))
    longest = max(len(query.answers[0]) for query in main)
    said = greedy(model, [query.prompt for query in main], longest)
    texts = [model.tokenizer.decode(list(tokens)) for tokens in said]
    found["rouge"] = rouge_recall(texts, [fact.object for fact in facts]).rougeL.float()
    member = text_scores(model, [statement(fact) for fact in facts])
    found |= {name: -values for name, values in member.items()}
    found["reference"] = levels.loss - member["loss"]
    return found | {name: torch.full((len(facts),), value) for name, value in _of_model(model, levels).items()}


def _of_model(model: Model, levels: Known) -> dict[str, float]:
    own = states(model, levels.facts)

    def curve(x: Tensor, y: Tensor) -> Tensor:
        return torch.tensor([likeness(a, b) for a, b in zip(x, y, strict=True)])

    to_never = torch.stack([curve(own, other) for other in levels.never_states]).mean(0)
    base = torch.stack([curve(levels.full_states, other) for other in levels.never_states]).mean(0)
    gap = levels.fisher_full - levels.fisher_never
    share = (_masked(fisher(model, levels.facts), levels.mask) - levels.fisher_never) / gap
    return {"cka": 1 - erasure(to_never, base), "fisher": min(max(share, 0.0), 1.0)}
