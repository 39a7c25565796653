"""TOFU on live models: the same log that TOFU's own evaluation writes, and its numbers from that.

Paper: Maini et al. 2024, arXiv 2401.06121, section 2.2. The cell of a model is an evaluation log in TOFU's format, so
    `bench tofu --logs RUN/cells/bench_full.json --retain-logs RUN/cells/bench_retrained.json` gives the same numbers.
Needs: the four `_perturbed` files; forget quality needs a retrained model, whose log plays the retain log.
Differs: one space stands between question and answer. Greedy text has up to 200 tokens of its own (TOFU: question and
    answer have 200 together). The paraphrased answer of real authors and world facts, which have none, is the answer,
    as in the released code.
Fails: the model utility is TOFU's mean of generated and teacher-forced numbers; no other number mixes the two.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mech_unlearn.benchmarks.answers import Answers, BenchmarkFacts, Number, Numbers, counted, numbers_in
from mech_unlearn.benchmarks.tofu.aggregate import measure
from mech_unlearn.benchmarks.tofu.data import TofuRow, load_tofu, read_rows
from mech_unlearn.benchmarks.tofu.logs import LOG_KEYS, EvalLog, LogSplit
from mech_unlearn.core import RetainSet
from mech_unlearn.data.questions import LAYOUT, check_layout
from mech_unlearn.metrics.evaluate import score_answers
from mech_unlearn.metrics.generation import continuations
from mech_unlearn.metrics.rouge import rouge_recall
from mech_unlearn.model.bridge import Model

MAX_NEW_TOKENS = 200
"""Source: generation settings of the released code of 2401.06121."""
QUALITY = ("Forget Quality", "KS Test PVal Forget", "KS Test Forget")


@dataclass(frozen=True, kw_only=True)
class Data:
    splits: Mapping[str, tuple[tuple[int, TofuRow], ...]]
    """Numbered rows, by the names of `logs.LOG_KEYS`."""
    layout: str
    questions: BenchmarkFacts


def load(
    source: str | os.PathLike,
    limit: int | None,
    *,
    forget: str = "forget10_perturbed",
    retain: str = "retain_perturbed",
    real_authors: str = "real_authors_perturbed",
    world_facts: str = "world_facts_perturbed",
    layout: str = LAYOUT,
) -> Data:
    """The rows of the four files and their facts; `limit` rows of each.

    Args:
        layout: the prompt around a question, `{question}` once. TOFU asks Llama 2 in `[INST] {question} [/INST]`.

    Raises:
        ValueError: a file or row that cannot be read, or a row without the wrong answers that TOFU's numbers need.
    """
    check_layout(layout)
    names = {"Retain": retain, "Real Authors": real_authors, "Real World": world_facts, "Forget": forget}
    splits = {split: _numbered(source, name)[:limit] for split, name in names.items()}
    for split, rows in splits.items():
        for number, row in rows:
            _check(f"{source}: {names[split]}, row {number}", row, rows[0][1], split in ("Retain", "Forget"))
    try:
        found = load_tofu(
            source, forget=forget, retain=retain, real_authors=real_authors, world_facts=world_facts, layout=layout
        )
    except ValueError as error:
        return Data(splits=splits, layout=layout, questions=BenchmarkFacts(notes=(f"no facts: {error}",)))
    kept = found.retain
    left = [item.reason for item in found.left_out if not item.reason.startswith("held-out")]
    total = sum(len(_numbered(source, name)) for name in names.values())
    return Data(
        splits=splits,
        layout=layout,
        questions=BenchmarkFacts(
            facts=found.forget.facts[:limit],
            retain=RetainSet(neighbors=kept.neighbors[:limit], general=kept.general[:limit]),
            notes=(f"{len(left)} of {total} questions are no facts: {counted(left)}",) if left else (),
        ),
    )


def _numbered(source: str | os.PathLike, name: str) -> tuple[tuple[int, TofuRow], ...]:
    return tuple((i if row.idx is None else row.idx, row) for i, row in enumerate(read_rows(source, name)))


def _check(where: str, row: TofuRow, first: TofuRow, paraphrased: bool) -> None:
    if not row.perturbed_answer or len(row.perturbed_answer) != len(first.perturbed_answer):
        raise ValueError(
            f"{where}: field 'perturbed_answer' must list wrong answers, as many in each row of the file; found "
            f"{len(row.perturbed_answer)} (TOFU's `_perturbed` files have them)"
        )
    if paraphrased and not (row.paraphrased_answer or "").strip():
        raise ValueError(f"{where}: field 'paraphrased_answer' must be given (TOFU's `_perturbed` files have it)")


def ask(model: Model, data: Data, full: Model) -> dict[str, Any]:
    """The evaluation log of a model, in TOFU's format; losses in nats per token."""
    return {LOG_KEYS[name]: _split(model, rows, data.layout) for name, rows in data.splits.items()}


def _split(model: Model, rows: tuple[tuple[int, TofuRow], ...], layout: str) -> dict[str, Any]:
    prompts = [layout.replace("{question}", row.question) for _, row in rows]
    answers = [
        [row.answer, row.paraphrased_answer if row.paraphrased_answer else row.answer, *row.perturbed_answer]
        for _, row in rows
    ]
    pairs = [(prompt, answer) for prompt, group in zip(prompts, answers, strict=True) for answer in group]
    loss = score_answers(model, pairs).loss.double().reshape(len(rows), -1)
    texts = continuations(model, prompts, MAX_NEW_TOKENS)
    recall = rouge_recall(texts, [row.answer for _, row in rows]).rougeL
    ids = [str(number) for number, _ in rows]
    told = [[prompt, text, row.answer] for prompt, text, (_, row) in zip(prompts, texts, rows, strict=True)]
    columns = {
        "avg_gt_loss": loss[:, 0].tolist(),
        "avg_paraphrased_loss": loss[:, 1].tolist(),
        "average_perturb_loss": loss[:, 2:].tolist(),
        "rougeL_recall": recall.tolist(),
        "generated_text": told,
    }
    return {key: dict(zip(ids, values, strict=True)) for key, values in columns.items()}


def log_of(answers: Answers, name: str = "") -> EvalLog:
    """A cell as the log that `aggregate.measure` reads."""
    return EvalLog(path=name, splits={split: _read(answers[key]) for split, key in LOG_KEYS.items()})


def _read(split: Mapping[str, Any]) -> LogSplit:
    rows = tuple(split["avg_gt_loss"])

    def column(key: str) -> list[Any]:
        return [split[key][row] for row in rows]

    return LogSplit(
        rows=rows,
        gt_loss=numbers_in(column("avg_gt_loss")),
        paraphrased_loss=numbers_in(column("avg_paraphrased_loss")),
        perturbed_loss=torch.stack([numbers_in(losses) for losses in column("average_perturb_loss")]),
        rouge_l_recall=numbers_in(column("rougeL_recall")),
        texts=tuple((prompt, text, answer) for prompt, text, answer in column("generated_text")),
    )


def numbers(own: Answers, full: Answers, retrained: Answers | None, seed: int) -> Numbers:
    """TOFU's table; see `aggregate.measure`."""
    found = measure(log_of(own), None if retrained is None else log_of(retrained), seed=seed)
    out: Numbers = {}
    for key, value in found.items():
        kind = "generated" if key.startswith("ROUGE") else "both" if key == "Model Utility" else "teacher-forced"
        out[key] = Number(kind, value)
    if retrained is None:
        out |= {key: Number("teacher-forced", "it needs another retrained model to compare with") for key in QUALITY}
    return out


def facts(data: Data) -> BenchmarkFacts:
    return data.questions
