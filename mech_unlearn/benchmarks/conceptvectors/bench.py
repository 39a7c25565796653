"""ConceptVectors on live models: has the concept's value vector moved, and does the model still say the same of it?

Paper: Hong et al. 2024, arXiv 2406.11614, section 4: intrinsic (cosine, distance, Jaccard of the top tokens) and
    behavioural (BLEU, ROUGE-L F1 against the full model's text) evaluation.
Needs: the full model itself must be the one whose vectors the file names (Llama 2 7B or OLMo 7B).
Differs: as scores.py and locate/neurons/concept_causal.py say.
Fails: both parts compare with the full model; a model that moved the vector by noise is as far away as one that took
    the concept out.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch

from mech_unlearn.benchmarks.answers import Answers, BenchmarkFacts, Number, Numbers, keep, means
from mech_unlearn.benchmarks.conceptvectors.data import ConceptEntry, load_concepts
from mech_unlearn.benchmarks.conceptvectors.scores import KINDS, LAYOUT, answers, behaviour
from mech_unlearn.locate.neurons.concept_causal import intrinsic
from mech_unlearn.locate.neurons.value_vectors import TOP, value_vectors
from mech_unlearn.metrics.intervals import RowScores
from mech_unlearn.model.bridge import Model

INTRINSIC = {
    "cosine": "cosine with the full model's vector, mean over concepts",
    "distance": "Euclidean distance from the full model's vector, mean over concepts",
    "jaccard": "Jaccard of the top tokens with the full model's, mean over concepts",
    "text_ratio": "top tokens that occur in the concept's text, over those of the full model, mean over concepts",
}


@dataclass(frozen=True, kw_only=True)
class Data:
    entries: tuple[ConceptEntry, ...]
    top: int
    layout: str


def load(source: str | os.PathLike, limit: int | None, *, top: int = TOP, layout: str = LAYOUT) -> Data:
    """The concepts of a file; `limit` of them, and of each the first `limit` questions and passages.

    Args:
        top: tokens of the intrinsic part.
        layout: the prompt around a question, `{question}` once.

    Raises:
        ValueError: a file or entry that cannot be read, a layout without `{question}`, or less than one token.
    """
    from dataclasses import replace

    if "{question}" not in layout or top < 1:
        raise ValueError(f"layout {layout!r} must hold {{question}}, and top be 1 or more (it is {top})")
    entries = tuple(
        replace(
            entry,
            qa=entry.qa[:limit],
            completions=entry.completions[:limit],
            unrelated_qa=entry.unrelated_qa[:limit],
        )
        for entry in load_concepts(source)[:limit]
    )
    return Data(entries=entries, top=top, layout=layout)


def fits(model: Model, data: Data) -> None:
    """Raises ValueError where the model lacks one of the vectors."""
    for entry in data.entries:
        width = value_vectors(model, 0).shape[0]
        if entry.layer >= model.n_layers or entry.dim >= width:
            raise ValueError(
                f"concept {entry.concept!r} is layer {entry.layer}, dim {entry.dim}; {model.name!r} has layers "
                f"0..{model.n_layers - 1} and dims 0..{width - 1}: it was found in another model"
            )


def ask(model: Model, data: Data, full: Model) -> dict[str, Any]:
    """Greedy texts about each concept, and how far its vector lies from the full model's."""
    moved = [intrinsic(full, model, e.layer, e.dim, text=e.text, top=data.top) for e in data.entries]
    concepts = tuple(entry.concept for entry in data.entries)
    scores = {}
    for name, unit in INTRINSIC.items():
        found = [getattr(one, name) for one in moved]
        values = torch.tensor([float("nan") if x is None else x for x in found], dtype=torch.float64)
        scores[f"Intrinsic {name}"] = RowScores(values=values, unit=unit, clusters=concepts)
    said = answers(model, data.entries, layout=data.layout)
    return {
        "scores": keep(scores, "weights"),
        "texts": {k: {c: list(t) for c, t in v.items()} for k, v in said.items()},
    }


def numbers(own: Answers, full: Answers, retrained: Answers | None, seed: int) -> Numbers:
    """Intrinsic numbers, then BLEU and ROUGE-L of the texts against the full model's."""
    said = behaviour(own["texts"], full["texts"])
    told = {name: Number("generated", found.mean(seed)) for name, found in said.items()}
    order = [f"{score}_{kind}" for kind in KINDS for score in ("bleu", "rouge_l_f1")]
    return means(own, seed) | {name: told[name] for name in order if name in told}


def facts(data: Data) -> BenchmarkFacts:
    total = sum(len(entry.qa) for entry in data.entries)
    return BenchmarkFacts(notes=(f"none of the {total} questions is a fact: ConceptVectors gives no answers",))
