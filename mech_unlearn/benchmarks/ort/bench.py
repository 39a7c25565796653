"""ORT on live models: the same facts asked in five forms, to see whether forgetting depends on the form.

Paper: Ye et al. 2025, arXiv 2506.07795: per form the geometric mean probability of the answer and the share of its
    tokens predicted, both teacher-forced.
Needs: the download's folder `Target`.
Differs: the sentences before the probes are this package's, as in benches/rwku.py; spelling is asked of the clozes.
    `largest form gap` is this package's reading of the idea: over facts asked in cloze, multiple choice and spelling,
    the mean of the largest kappa minus kappa of the cloze, kappa = (U - R) / (full - R) of mean log-probabilities.
Fails: probabilities of two forms are of different answers (a letter, single characters); compare models within a form.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.benchmarks.answers import Answers, BenchmarkFacts, Number, Numbers, counted, keep, means, numbers_in
from mech_unlearn.benchmarks.ort.data import Ort, load_ort
from mech_unlearn.benchmarks.rwku.data import ProbeRecord
from mech_unlearn.benchmarks.rwku.scores import INSTRUCTIONS, RwkuProbe, probe_prompt
from mech_unlearn.core import Measurement, RetainSet
from mech_unlearn.data.questions import LAYOUT
from mech_unlearn.metrics.evaluate import score_answers
from mech_unlearn.metrics.intervals import RowScores, mean_ci
from mech_unlearn.model.bridge import Model

LEVEL_OF_FORM: Mapping[str, str] = {"cloze": "fill_in", "question": "question", "adversarial": "adversarial"}
"""Form -> RWKU's level."""
CHOOSE = "Answer with the letter of the right option."
SPELL = "Say what belongs in the blank, one character a line."
MIN_GAP = 0.5
"""Nats per token between full and retrained below which kappa is undefined, as in metrics/forms.py."""
SHARED = ("cloze", "multiple choice", "spelling")
"""Forms that items share."""


@dataclass(frozen=True, kw_only=True)
class Data:
    ort: Ort
    limit: int | None


def load(
    source: str | os.PathLike, limit: int | None, *, subjects: str | Sequence[str] | None = None, layout: str = LAYOUT
) -> Data:
    """ORT's probes by form; `limit` rows of each.

    Args:
        subjects: the targets that were unlearned; all when not given.
        layout: the prompt around the query of a fact.

    Raises:
        ValueError: no such folder, an unknown subject, or a file or row that cannot be read.
    """
    found = load_ort(source, [subjects] if isinstance(subjects, str) else subjects, layout=layout)
    return Data(ort=found, limit=limit)


def prompt_of(tokenizer: Any, form: str, row: ProbeRecord) -> str:
    """The prompt of a probe in its form."""
    if form in LEVEL_OF_FORM:
        level = LEVEL_OF_FORM[form]
        return probe_prompt(
            tokenizer, RwkuProbe(query=row.query, answer=row.answer, level=level, kind=row.type.strip() or None)
        )
    sentence = {"fill_in": SPELL if form == "spelling" else CHOOSE}
    return probe_prompt(
        tokenizer, RwkuProbe(query=row.query, answer=row.answer, level="fill_in"), INSTRUCTIONS | sentence
    )


def ask(model: Model, data: Data, full: Model) -> dict[str, Any]:
    """Probability and token accuracy of each probe's answer, by form; also per item, for the form gap."""
    found, limit, kept, items = data.ort, data.limit, {}, {}
    for title, forms in (("Forget", found.forget), ("Neighbor", found.neighbor)):
        for form, rows in forms.items():
            kept |= _form(model, f"{title}, {form}", form, [(row, row.answer) for row in rows[:limit]])
    spelled = [(item.cloze, item.spelling) for item in found.items[:limit]]
    kept |= _form(model, "Forget, spelling", "spelling", spelled)
    shared = [item for item in found.items[:limit] if item.choice is not None]
    if shared:
        chosen = dict(zip((id(item) for item in shared), _queries(shared), strict=True))
        asked = {
            "cloze": [(item.cloze, item.cloze.answer) for item in shared],
            "multiple choice": [(chosen[id(item)], chosen[id(item)].answer) for item in shared],
            "spelling": [(item.cloze, item.spelling) for item in shared],
        }
        items = {form: (-_score(model, form, rows).loss).tolist() for form, rows in asked.items()}
    return {"scores": kept, "items": items, "subjects": [item.cloze.subject for item in shared]}


def _queries(items: Sequence[Any]) -> list[ProbeRecord]:
    """The multiple-choice row of each item, its options written as in the data."""
    made = []
    for item in items:
        options = "".join(
            f"\n{letter}. {text}" for letter, text in zip(item.choice.letters, item.choice.choices, strict=True)
        )
        query = f"{item.choice.question}{options}"
        made.append(item.cloze.model_copy(update={"query": query, "answer": item.choice.letter}))
    return made


def _score(model: Model, form: str, rows: Sequence[tuple[ProbeRecord, str]]) -> Any:
    return score_answers(model, [(prompt_of(model.tokenizer, form, row), answer) for row, answer in rows])


def _form(model: Model, name: str, form: str, rows: Sequence[tuple[ProbeRecord, str]]) -> dict[str, Any]:
    if not rows:
        return {}
    found, clusters = _score(model, form, rows), tuple(row.subject for row, _ in rows)
    values = {
        "probability": (found.probability, "geometric mean probability per answer token, mean over probes"),
        "token accuracy": (found.exact_memorization, "share of answer tokens predicted, mean over probes"),
    }
    scores = {
        f"{name}: {what}": RowScores(values=value, unit=unit, clusters=clusters)
        for what, (value, unit) in values.items()
    }
    return keep(scores, "teacher-forced")


def numbers(own: Answers, full: Answers, retrained: Answers | None, seed: int) -> Numbers:
    """ORT's table by form, and the form gap against the retrained model."""
    return means(own, seed) | {"Largest form gap": Number("teacher-forced", _gap(own, full, retrained, seed))}


def kappa(
    own: Float[Tensor, " item"], full: Float[Tensor, " item"], never: Float[Tensor, " item"]
) -> Float[Tensor, " item"]:
    """(U - R) / (full - R) of mean log-probabilities; NaN where full and retrained are closer than `MIN_GAP`."""
    gap = full - never
    return torch.where(gap >= MIN_GAP, (own - never) / gap, torch.nan)


def _gap(own: Answers, full: Answers, retrained: Answers | None, seed: int) -> Measurement | str:
    if retrained is None:
        return "it needs another retrained model to compare with"
    if not own["items"]:
        return "no cloze has its multiple-choice row"
    cells = (own, full, retrained)
    table = torch.stack([kappa(*(numbers_in(cell["items"][form]) for cell in cells)) for form in SHARED])
    gap = table.nan_to_num(nan=-torch.inf).max(0).values - table[0]
    if gap.isnan().all():
        return f"full and retrained are closer than {MIN_GAP} nats per token on every cloze"
    return mean_ci(gap, "kappa of the form where most is left minus kappa of the cloze", own["subjects"], seed)


def facts(data: Data) -> BenchmarkFacts:
    """Clozes and questions that name their subject once."""
    found, limit = data.ort, data.limit
    left = [f"{item.file.rpartition('/')[2]}: {item.reason}" for item in found.left_out]
    return BenchmarkFacts(
        facts=found.forget_facts[:limit],
        retain=RetainSet(neighbors=found.retain.neighbors[:limit]),
        notes=(f"{len(left)} rows are in no fact or item: {counted(left)}",) if left else (),
    )
