"""RWKU on live models: probes about the targets and their neighbors, membership, and utility.

Paper: Jin et al. 2024, arXiv 2406.10890: ROUGE-L recall by level, losses of the membership sets, five utility sets.
Needs: the probes; membership and utility sets are read where the folder or hub dataset has them (`--set mia=False`,
    `--set utility=()` do without).
Differs: sentences before the probes are this package's (scores.py). `All` is the mean over all probes of a set.
    Losses are positive nats (the code prints minus the loss). Utility: see rwku_utility.py.
Fails: as scores.py says.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mech_unlearn.benchmarks.answers import Answers, BenchmarkFacts, Numbers, counted, keep, means, pooled
from mech_unlearn.benchmarks.rwku.data import FILES, UTILITY, ProbeRecord, Rwku, load_rwku
from mech_unlearn.benchmarks.rwku.scores import LEVELS, RwkuProbe, rwku_rouge_l_recall
from mech_unlearn.benchmarks.rwku.utility import ask_utility
from mech_unlearn.core import RetainSet
from mech_unlearn.data.questions import LAYOUT
from mech_unlearn.data.source import find
from mech_unlearn.metrics.intervals import RowScores
from mech_unlearn.metrics.membership import text_scores
from mech_unlearn.model.bridge import Model

NAMES = {"fill_in": "FB", "question": "QA", "adversarial": "AA"}
"""Level -> its column in the paper."""


@dataclass(frozen=True, kw_only=True)
class Data:
    rwku: Rwku
    limit: int | None


def load(
    source: str | os.PathLike,
    limit: int | None,
    *,
    subjects: str | Sequence[str] | None = None,
    mia: bool | None = None,
    utility: str | Sequence[str] | None = None,
    layout: str = LAYOUT,
) -> Data:
    """RWKU's probes and sets; `limit` rows of each level and set.

    Args:
        subjects: the targets that were unlearned; all when not given.
        mia, utility: whether to read the membership sets, and which utility sets; what is there when not given.
        layout: the prompt around the query of a fact.

    Raises:
        ValueError: an unknown subject or utility set, or a file or row that cannot be read.
    """
    wanted = [utility] if isinstance(utility, str) else utility
    found = load_rwku(
        source,
        [subjects] if isinstance(subjects, str) else subjects,
        mia=mia if mia is not None else all(_there(source, f"mia_{kind}") for kind in ("forget", "retain")),
        utility=wanted if wanted is not None else [name for name in UTILITY if _there(source, f"utility_{name}")],
        layout=layout,
    )
    return Data(rwku=found, limit=limit)


def _there(source: str | os.PathLike, config: str) -> bool:
    """Whether a source has a configuration; a hub dataset has all, one file of probes none."""
    if Path(source).is_file():
        return False
    if not Path(source).exists():
        return True
    for name in (config, FILES[config]):
        try:
            find(source, name, config=config, split="test")
        except ValueError:
            continue
        return True
    return False


def probes(rows: Mapping[str, Sequence[ProbeRecord]], limit: int | None) -> list[RwkuProbe]:
    """Rows by level as probes; `limit` of each."""
    return [
        RwkuProbe(query=row.query, answer=row.answer, level=level, kind=row.type.strip() or None, cluster=row.subject)
        for key, level in zip(("1", "2", "3"), LEVELS, strict=True)
        for row in rows.get(key, ())[:limit]
    ]


def ask(model: Model, data: Data, full: Model) -> dict[str, Any]:
    """ROUGE-L recall by probe, losses by text, and the utility sets."""
    found, limit = data.rwku, data.limit
    told: dict[str, RowScores] = {}
    for name, rows in (("Forget", found.forget), ("Neighbor", found.neighbor)):
        some = probes(rows, limit)
        scores = rwku_rouge_l_recall(model, some) if some else {}
        told |= {f"{name} {NAMES[level]}": scores[level] for level in LEVELS if level in scores}
        if scores:
            told[f"{name} All"] = pooled([scores[level] for level in LEVELS if level in scores])
        told |= {f"{name} AA, {key.partition(': ')[2]}": kept for key, kept in scores.items() if ": " in key}
    losses = {}
    for name, rows in (("MIA FM", found.mia_forget[:limit]), ("MIA RM", found.mia_retain[:limit])):
        if rows:
            values = text_scores(model, [row.text for row in rows])["loss"]
            unit = "nats per token, mean over texts"
            losses[f"{name} loss"] = RowScores(values=values, unit=unit, clusters=tuple(row.subject for row in rows))
    kept = keep(told, "generated") | keep(losses, "teacher-forced")
    for name, rows in found.utility.items():
        kept |= ask_utility(model, name, rows[:limit])
    return {"scores": kept}


def numbers(own: Answers, full: Answers, retrained: Answers | None, seed: int) -> Numbers:
    """RWKU's table: levels of forget and neighbor set, membership losses, utility."""
    return means(own, seed)


def facts(data: Data) -> BenchmarkFacts:
    """Fill-in and question probes that name their subject once."""
    found, limit = data.rwku, data.limit
    left = [item.reason for item in found.left_out if not item.file.startswith("neighbor")]
    total = sum(len(found.forget.get(level, ())) for level in ("1", "2"))
    return BenchmarkFacts(
        facts=found.forget_facts[:limit],
        retain=RetainSet(neighbors=found.retain.neighbors[:limit]),
        notes=(f"{len(left)} of {total} fill-in and question probes are no facts: {counted(left)}",) if left else (),
    )
