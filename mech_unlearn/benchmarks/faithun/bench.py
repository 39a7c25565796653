"""FaithUn on live models: is forgetting superficial, too little or too much?

Paper: Yang et al. 2025, arXiv 2502.19207; scores.py says what the five sets are and whose the formulas are.
Needs: questions with false options; the test set needs the split files.
Differs: options are shuffled by the seed 0 and the question's place. Both variants of multiple choice are shown, in
    rows of their own.
Fails: as scores.py says.
"""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mech_unlearn.benchmarks.answers import Answers, BenchmarkFacts, Number, Numbers, counted, keep, means, scores_of
from mech_unlearn.benchmarks.faithun.data import Cluster, ClusterQuestion, FaithUn, load_faithun
from mech_unlearn.benchmarks.faithun.scores import SETS, summary
from mech_unlearn.core import RetainSet
from mech_unlearn.data.questions import LAYOUT
from mech_unlearn.metrics.multiple_choice import ChoiceQuestion, choice_by_letter, choice_by_option_text
from mech_unlearn.model.bridge import Model

VARIANTS = {"by letter": choice_by_letter, "by option text": choice_by_option_text}


@dataclass(frozen=True, kw_only=True)
class Data:
    faithun: FaithUn
    sets: Mapping[str, tuple[ChoiceQuestion, ...]]
    """By the names of `scores.SETS`; a set without a question is left out."""
    limit: int | None
    notes: tuple[str, ...]


def load(
    source: str | os.PathLike, limit: int | None, *, splits: str | os.PathLike | None = None, layout: str = LAYOUT
) -> Data:
    """FaithUn's five sets; `limit` clusters of the forget set and of the test set.

    Args:
        splits: folder of the split files; the one beside the data when not given.
        layout: the prompt around the question of a fact.

    Raises:
        ValueError: a file or row that cannot be read, or no base question with options.
    """
    found = load_faithun(source, splits=splits, layout=layout)
    ours = found.split("forget")[:limit]
    tested = found.split("test")[:limit] if "test" in found.splits else ()
    rows: dict[str, list[tuple[Cluster, ClusterQuestion]]] = {
        "base": [(c, c.base) for c in ours],
        "paraphrase": [(c, q) for c in ours for q in c.paraphrased],
        "multihop": [(c, q) for c in ours for q in c.multi_hop],
        "test": [(c, c.base) for c in tested],
        "same_answer": [(c, q) for c in ours for q in c.same_answer],
    }
    sets, notes = {}, []
    for name, pairs in rows.items():
        made, left = _asked(pairs)
        sets |= {name: made} if made else {}
        notes += [f"{name}: {len(left)} of {len(pairs)} questions left out: {counted(left)}"] if left else []
        notes += [f"{name}: the data have no such question"] if not pairs else []
    if "base" not in sets:
        raise ValueError(f"{source}: no base question of the forget set has false options to choose from")
    return Data(faithun=found, sets=sets, limit=limit, notes=tuple(notes))


def _asked(pairs: Sequence[tuple[Cluster, ClusterQuestion]]) -> tuple[tuple[ChoiceQuestion, ...], list[str]]:
    made, left = [], []
    for number, (cluster, row) in enumerate(pairs):
        right = row.answers[0].strip()
        known = [answer.strip() for answer in row.answers]
        wrong = [text for text in dict.fromkeys(map(str.strip, row.false_options)) if text not in known]
        if not wrong:
            left.append("no false option")
            continue
        options = [right, *wrong]
        random.Random(f"0 {number} {row.question}").shuffle(options)
        whom = f"{cluster.entity}/{cluster.key}"
        made.append(
            ChoiceQuestion(question=row.question, options=tuple(options), right=options.index(right), cluster=whom)
        )
    return tuple(made), left


def ask(model: Model, data: Data, full: Model) -> dict[str, Any]:
    """Which questions of each set are answered, in both variants."""
    found = {
        f"{SETS[name]}, {variant}": choose(model, questions).correct
        for variant, choose in VARIANTS.items()
        for name, questions in data.sets.items()
    }
    return {"scores": keep(found, "teacher-forced")}


def numbers(own: Answers, full: Answers, retrained: Answers | None, seed: int) -> Numbers:
    """Accuracy of each set, the score over them, and how superficial the forgetting is, by variant."""
    every, out = means(own, seed), {}
    for variant in VARIANTS:
        out |= {name: found for name, found in every.items() if name.endswith(f", {variant}")}
        names = {name: f"{called}, {variant}" for name, called in SETS.items()}
        missing = [name for name in names if names[name] not in own["scores"]]
        if missing:
            reason = f"the data have no questions of: {', '.join(missing)}"
            out |= {f"{key}, {variant}": Number("teacher-forced", reason) for key in ("Score", "Under-erased")}
        else:
            mine = summary({name: scores_of(own["scores"][key]) for name, key in names.items()}, seed)
            out[f"Score, {variant}"] = Number("teacher-forced", mine.score)
            out[f"Under-erased, {variant}"] = Number("teacher-forced", mine.under_erased)
        key = names["same_answer"]
        lost = "the data have no questions of: same_answer"
        if key in own["scores"]:
            lost = scores_of(full["scores"][key]).minus(scores_of(own["scores"][key]), seed)
        out[f"Over-erased, {variant}"] = Number("teacher-forced", lost)
    return out


def facts(data: Data) -> BenchmarkFacts:
    """Base questions that name their subject once."""
    found, limit = data.faithun, data.limit
    left = [item.reason for item in found.left_out if not item.reason.startswith("held-out")]
    notes = [f"{len(left)} base questions are no facts: {counted(left)}"] if left else []
    return BenchmarkFacts(
        facts=found.forget_facts[:limit],
        retain=RetainSet(neighbors=found.retain.neighbors[:limit]),
        notes=(*data.notes, *notes),
    )
