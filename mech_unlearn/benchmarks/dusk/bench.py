"""DUSK on live models: what only the forgotten document said, what others say too, and what is to stay.

Paper: Jeung et al. 2025, arXiv 2505.15209; scores.py says which of its seven numbers are made and how.
Needs: the questions, in-context examples and passages; for privacy the forget document, the holdout and a retrained
    model.
Differs: privacy is PrivLeak of Min-40 % over paragraphs of the forget document and of the holdout; the paper's texts
    were not to be found. Downstream ability is `metrics.harness.lm_eval_harness` on tasks of the caller's choice.
Fails: as scores.py says.
"""

import os
from dataclasses import dataclass
from typing import Any

from mech_unlearn.benchmarks.answers import Answers, BenchmarkFacts, Number, Numbers, counted, keep, means
from mech_unlearn.benchmarks.dusk.data import STRATA, Dusk, load_dusk
from mech_unlearn.benchmarks.dusk.scores import Stratum, dusk
from mech_unlearn.benchmarks.muse import bench as muse
from mech_unlearn.core import RetainSet
from mech_unlearn.data.questions import LAYOUT
from mech_unlearn.metrics.membership import text_scores
from mech_unlearn.model.bridge import Model


@dataclass(frozen=True, kw_only=True)
class Data:
    dusk: Dusk
    limit: int | None


def load(source: str | os.PathLike, limit: int | None, *, documents: bool = True, layout: str = LAYOUT) -> Data:
    """DUSK's strata; `limit` questions, passages and paragraphs of each.

    Args:
        documents: read the documents and the holdout, for privacy.
        layout: the prompt around the question of a fact.

    Raises:
        ValueError: a file or row that cannot be read.
    """
    return Data(dusk=load_dusk(source, documents=documents, layout=layout), limit=limit)


def ask(model: Model, data: Data, full: Model) -> dict[str, Any]:
    """ROUGE-L F1 by question and passage, and Min-40 % by paragraph."""
    found, limit = data.dusk, data.limit
    strata = (Stratum(pairs=tuple((r.question, r.answer) for r in found.questions[s][:limit])) for s in STRATA)
    passages = Stratum(pairs=tuple((row.prompt, row.gt) for row in found.verbatim[:limit]))
    solved = [(row.question, row.answer) for row in found.examples]
    unique, shared, kept = strata
    scores = dusk(model, unique, shared, kept, passages, solved)
    texts = {"forget": paragraphs(found.forget_texts)[:limit], "holdout": paragraphs(found.holdout)[:limit]}
    known = {part: text_scores(model, some)["min_k"].tolist() if some else [] for part, some in texts.items()}
    return {"scores": keep(scores, "generated"), "min_k": known}


def paragraphs(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The texts cut at line breaks, without empty lines."""
    return tuple(line.strip() for text in texts for line in text.splitlines() if line.strip())


def numbers(own: Answers, full: Answers, retrained: Answers | None, seed: int) -> Numbers:
    """Memorisation of the forget document, knowledge by stratum, privacy."""
    out = means(own, seed)
    if not all(own["min_k"].values()):
        return out | {"PrivLeak": Number("teacher-forced", "the documents and the holdout were not read")}
    return out | muse.privacy(own, retrained, seed)


def facts(data: Data) -> BenchmarkFacts:
    """Questions of the forget document that name a professor once."""
    found, limit = data.dusk, data.limit
    left = [item.reason for item in found.left_out if item.file == STRATA["forget"]]
    return BenchmarkFacts(
        facts=found.forget_facts[:limit],
        retain=RetainSet(same_subject=found.retain.same_subject[:limit], neighbors=found.retain.neighbors[:limit]),
        notes=(f"{len(left)} of {len(found.questions['forget'])} forget questions are no facts: {counted(left)}",)
        if left
        else (),
    )
