"""MUSE on live models: verbatim and knowledge memorisation, privacy leakage, and knowledge that is to stay.

Paper: Shi et al. 2024, arXiv 2407.06460, section 3; scores.py says how each number is made.
Needs: the parts `knowmem`, `verbmem` and `privleak`; PrivLeak needs a retrained model, or `--set corpus=news` (`books`)
    where the models are the published ones.
Differs: shares, not percent, but for PrivLeak. Scalability and sustainability are this table for several unlearned
    models.
Fails: as scores.py says.
"""

import os
from dataclasses import dataclass
from typing import Any

from mech_unlearn.benchmarks.answers import Answers, BenchmarkFacts, Number, Numbers, counted, keep, means, numbers_in
from mech_unlearn.benchmarks.muse.data import Muse, load_muse
from mech_unlearn.benchmarks.muse.privacy import membership_auc, privleak_min_k
from mech_unlearn.benchmarks.muse.scores import (
    RETRAINED_AUC,
    knowmem_rouge_l_f1,
    privleak_against_published,
    verbmem_rouge_l_f1,
)
from mech_unlearn.core import Measurement, RetainSet
from mech_unlearn.data.questions import LAYOUT
from mech_unlearn.metrics.membership import text_scores
from mech_unlearn.model.bridge import Model

MIN_K = "Min-40 %"


@dataclass(frozen=True, kw_only=True)
class Data:
    muse: Muse
    limit: int | None
    corpus: str | None


def load(source: str | os.PathLike, limit: int | None, *, corpus: str | None = None, layout: str = LAYOUT) -> Data:
    """MUSE's questions, passages and membership texts; `limit` of each are asked.

    Args:
        corpus: `news` or `books`, to take PrivLeak against the published retrained model.
        layout: the prompt around the question of a fact.

    Raises:
        ValueError: another corpus, or a file or row that cannot be read.
    """
    if corpus is not None and corpus not in RETRAINED_AUC:
        raise ValueError(f"no published retrained model for corpus {corpus!r}; choose from {', '.join(RETRAINED_AUC)}")
    return Data(muse=load_muse(source, ("knowmem", "verbmem", "privleak"), layout=layout), limit=limit, corpus=corpus)


def ask(model: Model, data: Data, full: Model) -> dict[str, Any]:
    """ROUGE-L F1 by question and passage, and Min-40 % by text (nats, higher = less like a member)."""
    muse, limit = data.muse, data.limit
    passages = muse.verbmem[:limit]
    found = {"VerbMem forget": verbmem_rouge_l_f1(model, [p.prompt for p in passages], [p.gt for p in passages])}
    for part in ("forget", "retain"):
        rows = muse.knowmem[f"{part}_qa"][:limit]
        solved = [(row.question, row.answer) for row in muse.knowmem[f"{part}_qa_icl"]]
        asked, answers = [row.question for row in rows], [row.answer for row in rows]
        found[f"KnowMem {part}"] = knowmem_rouge_l_f1(model, asked, answers, solved)
    texts = {part: muse.privleak[part][:limit] for part in ("forget", "holdout")}
    scores = {part: text_scores(model, some)["min_k"].tolist() for part, some in texts.items()}
    return {"scores": keep(found, "generated"), "min_k": scores, "corpus": data.corpus}


def numbers(own: Answers, full: Answers, retrained: Answers | None, seed: int) -> Numbers:
    """MUSE's table: VerbMem, KnowMem of the forget set, PrivLeak with the AUC behind it, KnowMem of the retain set."""
    shares = means(own, seed)
    out = {name: shares[name] for name in ("VerbMem forget", "KnowMem forget")}
    return out | privacy(own, retrained, seed) | {"KnowMem retain": shares["KnowMem retain"]}


def privacy(own: Answers, retrained: Answers | None, seed: int) -> Numbers:
    """AUC of Min-40 %, forget texts against held-out ones, and PrivLeak from it."""
    mine = [numbers_in(own["min_k"][part]) for part in ("forget", "holdout")]
    auc = membership_auc(mine[0], mine[1], MIN_K, seed)
    return {
        f"AUC {MIN_K}": Number("teacher-forced", auc),
        "PrivLeak": Number("teacher-forced", _privleak(own, retrained, auc, seed)),
    }


def _privleak(own: Answers, retrained: Answers | None, auc: Measurement, seed: int) -> Measurement | str:
    if own.get("corpus"):
        value, *ends = (privleak_against_published(x, own["corpus"]) for x in (auc.value, *auc.ci))
        unit = f"percent of the published retrained model's 1 - AUC, MUSE-{own['corpus']}"
        return Measurement(value=value, ci=(min(ends), max(ends)), n=auc.n, unit=unit)
    if retrained is None:
        return "it needs another retrained model to compare with"
    texts = (numbers_in(cell["min_k"][part]) for cell in (own, retrained) for part in ("forget", "holdout"))
    try:
        return privleak_min_k(*texts, seed=seed)
    except ValueError as error:
        return str(error)


def facts(data: Data) -> BenchmarkFacts:
    """Questions that name their subject once."""
    muse = data.muse
    total = len(muse.knowmem["forget_qa"])
    left = [item.reason for item in muse.left_out if item.file.endswith("forget_qa")]
    return BenchmarkFacts(
        facts=muse.forget_facts[: data.limit],
        retain=RetainSet(general=muse.retain.general[: data.limit]),
        notes=(f"{len(left)} of {total} forget questions are no facts: {counted(left)}",) if left else (),
    )
