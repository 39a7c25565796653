"""What stands in for the embeddings of a prompt's tokens, and the classes that those tokens fall into."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.locate.patching.token_classes import CLASSES as AROUND
from mech_unlearn.locate.patching.token_classes import token_classes
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import Query, embeddings

CLASSES = ("before subject", *AROUND)
"""Classes of tokens: those of `token_classes` and the ones in front of the subject, a BOS that is kept left out."""
BASELINES = ("zero", "mean", "pad", "resample")


def free_positions(model: Model, query: Query, keep_bos: bool) -> list[int]:
    """Positions of the prompt that may change: all, or all but a special token in front."""
    kept = keep_bos and query.prompt[0] in model.tokenizer.all_special_ids
    return list(range(int(kept), len(query.prompt)))


def prompt_classes(query: Query, free: Sequence[int]) -> dict[str, list[int]]:
    """The positions of each class in the prompt of a query, of those that may change."""
    found = {"before subject": list(range(query.span[0])), **token_classes(query)}
    return {name: [i for i in places if i in free] for name, places in found.items()}


def _vector(model: Model, baseline: str) -> Float[Tensor, " d_model"]:
    if baseline == "pad":
        pad = model.tokenizer.pad_token_id
        if pad is None:
            raise ValueError(f"the tokenizer of {model.name!r} has no pad token; choose another baseline")
        return embeddings(model, [[pad]])[0, 0]
    if baseline == "zero":
        return torch.zeros(model.d_model, device=model.device, dtype=model.dtype)
    size = model.hf.get_input_embeddings().weight.shape[0]
    parts = [embeddings(model, [ids.tolist()])[0].double().sum(0) for ids in torch.arange(size).split(8192)]
    return (torch.stack(parts).sum(0) / size).to(model.dtype)


def _resampled(
    query: Query, others: Sequence[Query], samples: int, generator: torch.Generator
) -> list[tuple[int, ...]]:
    """Prompts of the same length whose tokens come from the same class of prompts about other subjects.

    From prompts of the same phrasing, if there are any. A token whose class another prompt lacks is taken
    from the last token of that prompt's subject, or of the prompt.
    """
    strangers = [other for other in others if other.fact.subject != query.fact.subject]
    if not strangers:
        raise ValueError(f"fact {query.fact.id!r}: baseline='resample' needs facts of another subject")
    strangers = [other for other in strangers if other.template == query.template] or strangers
    own = {i: name for name, places in prompt_classes(query, range(len(query.prompt))).items() for i in places}
    rows = []
    for _ in range(samples):
        other = strangers[int(torch.randint(len(strangers), (1,), generator=generator))]
        pools = prompt_classes(other, range(len(other.prompt)))
        row = []
        for i in range(len(query.prompt)):
            name = own[i]
            fallback = "last subject" if "subject" in name and name != "before subject" else "last prompt"
            pool = pools[name] or pools[fallback] or pools["last subject"]
            row.append(other.prompt[pool[int(torch.randint(len(pool), (1,), generator=generator))]])
        rows.append(tuple(row))
    return rows


def baselines(
    model: Model, queries: Sequence[Query], others: Sequence[Query], baseline: str, samples: int, seed: int
) -> list[Float[Tensor, "sample prompt_token d_model"]]:
    """What stands in for each prompt's embeddings: one sample, or several drawn from prompts about other subjects.

    Raises:
        ValueError: "pad" without a pad token, or "resample" without another subject.
    """
    if baseline == "resample":
        generator = torch.Generator().manual_seed(seed)
        return [embeddings(model, _resampled(query, others, samples, generator)) for query in queries]
    vector = _vector(model, baseline)
    return [vector.expand(1, len(query.prompt), -1) for query in queries]
