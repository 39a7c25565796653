"""Logit lens: how likely the answer already is when the residual stream after a layer is read out at once.

Paper:    nostalgebraist 2020, interpreting GPT: the logit lens; as an unlearning test in arXiv 2605.24614.
Needs:    one forward pass, and one row of one token per answer token and layer through the model's own readout.
Differs:  the readout is the model's own code behind the last block (final norm, unembedding, soft-capping), so it
          holds for every architecture and equals the model's output at the last layer.
Fails:    early layers keep information in a basis that the unembedding does not read: a low value is no proof of
          absence.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact, Site
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import capture
from mech_unlearn.model.readout import answer_logprobs
from mech_unlearn.model.tokens import make_queries


def lens_values(
    model: Model,
    facts: Sequence[Fact],
    reader: Model,
    translate: Callable[[int, Tensor], Tensor],
    max_tokens: int,
) -> tuple[Float[Tensor, "fact layer"], int]:
    """(Log-probability of each fact's answer at each layer, nats; number of prompts).

    Mean over the tokens of the answer (teacher-forced) and over the phrasings that a method may see.

    Args:
        translate: (layer, states) -> the states that the reader reads out.
    """
    queries = make_queries(model.tokenizer, facts, distractors=False)
    answers = [query.answers[0] for query in queries]
    places = [[len(q.prompt) - 1 + t for t in range(len(a))] for q, a in zip(queries, answers, strict=True)]
    sites = [Site(layer, "resid_post") for layer in range(model.n_layers)]
    store = capture(model, [query.full[:-1] for query in queries], sites, places, max_tokens=max_tokens)
    tokens = torch.tensor([token for answer in answers for token in answer])
    order = {fact.id: i for i, fact in enumerate(facts)}
    fact = torch.tensor([order[q.fact.id] for q in queries])[store.index[:, 0]]
    weight = torch.tensor([1.0 / len(a) for a in answers])[store.index[:, 0]]
    total = torch.zeros(len(facts)).index_add(0, fact, weight)
    columns = []
    for site in sites:
        logprob = answer_logprobs(reader, translate(site.layer, store[site]), tokens) * weight
        columns.append(torch.zeros(len(facts)).index_add(0, fact, logprob) / total)
    return torch.stack(columns, 1), len(queries)


def logit_lens_per_fact(
    model: Model, facts: Sequence[Fact], *, decoder: Model | None = None, max_tokens: int = 8192
) -> Attribution:
    """Log-probability of each fact's answer at each layer: axes (fact, layer), nats.

    Mean over the tokens of the answer (teacher-forced) and over the phrasings that a method may see.

    Args:
        decoder: model whose readout is used; by default the model's own.

    Raises:
        ValueError: no facts, or a decoder of another width.
    """
    if not facts:
        raise ValueError("no facts to locate: give at least one")
    reader = model if decoder is None else decoder
    if reader.d_model != model.d_model:
        raise ValueError(
            f"decoder {reader.name!r} reads {reader.d_model} dimensions, {model.name!r} has {model.d_model}"
        )
    values, n_prompts = lens_values(model, facts, reader, lambda _, states: states, max_tokens)
    return Attribution(
        name="logit lens",
        values=values,
        axes=("fact", "layer"),
        labels={"fact": tuple(f.id for f in facts), "layer": tuple(range(model.n_layers))},
        unit="log-probability of the answer (nats)",
        n=len(facts),
        note=f"mean per answer token over {n_prompts} prompts, readout of {reader.name}",
    )


def logit_lens(
    model: Model, facts: Sequence[Fact], *, decoder: Model | None = None, max_tokens: int = 8192
) -> Attribution:
    """Mean log-probability of the answers at each layer: axis (layer,), nats, averaged over facts."""
    return logit_lens_per_fact(model, facts, decoder=decoder, max_tokens=max_tokens).mean(facts)
