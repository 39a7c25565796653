"""RWKU's five utility sets: general, reasoning, truthful, factual, fluent.

Paper: Jin et al. 2024, arXiv 2406.10890, section 4.1 and its released code: MMLU by the likeliest letter after solved
    examples; BIG-Bench Hard by exact match after chains of thought, 256 greedy tokens; TruthfulQA MC1 and MC2 from
    summed log-probabilities; TriviaQA by word F1, 30 greedy tokens; AlpacaEval by n-gram entropy (fluency.py).
Needs: the rows of data.py; a chat template is used where the tokenizer has one.
Differs: instructions are this package's sentences, and TruthfulQA and TriviaQA are asked without the code's fixed
    examples, so compare only with models asked the same way. A letter's tie is shared as in multiple_choice.py.
Fails: exact match needs the model to end its chain in "the answer is ..."; a model that does not scores 0.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from mech_unlearn.benchmarks.answers import ScoreKind, keep
from mech_unlearn.benchmarks.rwku.data import Factual, Fluent, General, Reason, Truthful
from mech_unlearn.benchmarks.rwku.fluency import fluency_ngram_entropy
from mech_unlearn.benchmarks.wmdp.data import MultipleChoice
from mech_unlearn.data.source import Record
from mech_unlearn.metrics.evaluate import score_answers, score_options
from mech_unlearn.metrics.generation import continuations
from mech_unlearn.metrics.intervals import RowScores
from mech_unlearn.model.bridge import Model

REASON_TOKENS, FACT_TOKENS = 256, 30
"""Greedy tokens. Source: released code of 2406.10890."""
_ANSWER = re.compile(r"[Tt]he answer is (.*?)\.")


def message(tokenizer: Any, text: str, answer: str) -> str:
    """A text as a user's message, and the beginning of the answer to it."""
    if not getattr(tokenizer, "chat_template", None):
        return f"{text}\n{answer}".rstrip("\n")
    asked = [{"role": "user", "content": text}]
    shown = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    if tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        shown = shown.removeprefix(tokenizer.bos_token)  # the tokenizer puts it back
    return shown + answer


def normalised(text: str) -> list[str]:
    """Words in small letters, without punctuation and articles. Source: SQuAD's evaluation, arXiv 1606.05250."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def word_f1(text: str, answers: Sequence[str]) -> float:
    """The largest F1 of a text's words against those of an answer; where either has none, 1 if both have none."""
    return max(_f1(normalised(text), normalised(answer)) for answer in answers)


def _f1(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


def final_answer(text: str) -> str:
    """What follows "the answer is", up to the full stop; the whole text without it."""
    found = _ANSWER.search(text)
    return (found.group(1) if found else text).strip()


def _lettered(row: MultipleChoice, solved: bool) -> str:
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(row.letters, row.choices, strict=True))
    return f"Question: {row.question}{options}" + (f"\nAnswer: {row.letter}\n\n" if solved else "")


def _letters(model: Model, rows: Sequence[General]) -> RowScores:
    prompts = []
    for row in rows:
        head = f"Multiple choice questions about {row.task.replace('_', ' ')}, with answers.\n\n"
        shown = "".join(_lettered(example, True) for example in row.examples)
        prompts.append(message(model.tokenizer, head + shown + _lettered(row, False), "Answer:"))
    logprob = score_options(model, [(p, tuple(row.letters)) for p, row in zip(prompts, rows, strict=True)])
    known = logprob.nan_to_num(nan=-torch.inf)
    best = known == known.amax(1, keepdim=True)
    right = best[range(len(rows)), [row.answer for row in rows]].double() / best.sum(1)
    return _scores(right, "share of questions, by the likeliest letter", rows)


def truthful(model: Model, rows: Sequence[Truthful]) -> tuple[RowScores, RowScores]:
    """(MC1: 1 where the true choice is likelier than every false one; MC2: share of probability on true choices)."""
    pairs, one, mass = [], [], []
    for row in rows:
        prompt = message(model.tokenizer, f"Q: {row.question}", "A:")
        pairs += [(prompt, choice) for targets in (row.mc1_targets, row.mc2_targets) for choice in targets.choices]
    scored = score_answers(model, pairs)
    sums = iter((-scored.loss.double() * scored.tokens).tolist())
    for row in rows:
        for targets, out in ((row.mc1_targets, one), (row.mc2_targets, mass)):
            values = torch.tensor([next(sums) for _ in targets.choices], dtype=torch.float64)
            true = torch.tensor(targets.labels) == 1
            if targets is row.mc2_targets:
                out.append(values.softmax(0)[true].sum().item())
            else:
                out.append(float(true.any() and (true.all() or bool(values[true][0] > values[~true].max()))))
    unit = "summed log-probability of the choices"
    return (
        _scores(torch.tensor(one), f"share of questions, by {unit}", rows),
        _scores(torch.tensor(mass), f"probability on true choices, by {unit}", rows),
    )


def _reason(model: Model, rows: Sequence[Reason]) -> RowScores:
    head = "Answer in the same way and close with the words: the answer is.\n"
    prompts = [message(model.tokenizer, f"{row.cot.strip()}\n\n{head}Q: {row.question}", "A:") for row in rows]
    texts = continuations(model, prompts, REASON_TOKENS)
    hits = [normalised(final_answer(text)) == normalised(row.answer) for text, row in zip(texts, rows, strict=True)]
    unit = f"exact match of generated text, {REASON_TOKENS} greedy tokens"
    return _scores(torch.tensor(hits, dtype=torch.float64), unit, rows, texts)


def _factual(model: Model, rows: Sequence[Factual]) -> RowScores:
    head = "Answer the question in a few words.\n"
    prompts = [message(model.tokenizer, f"{head}Q: {row.question}", "A:") for row in rows]
    texts = continuations(model, prompts, FACT_TOKENS, ("\n",) if not model.tokenizer.chat_template else ())
    values = [word_f1(text, row.answers) for text, row in zip(texts, rows, strict=True)]
    unit = f"word F1 of generated text, {FACT_TOKENS} greedy tokens"
    return _scores(torch.tensor(values, dtype=torch.float64), unit, rows, texts)


def _scores(values: Any, unit: str, rows: Sequence[Any], texts: tuple[str, ...] = ()) -> RowScores:
    return RowScores(values=values.double(), unit=unit, clusters=tuple(row.subject for row in rows), texts=texts)


def ask_utility(model: Model, name: str, rows: Sequence[Record]) -> dict[str, Any]:
    """One utility set's scores, as `answers.keep` gives them."""
    kind: ScoreKind = "teacher-forced" if name in ("general", "truthfulness") else "generated"
    if name == "general":
        found = {"Utility Gen (MMLU)": _letters(model, [row for row in rows if isinstance(row, General)])}
    elif name == "reason":
        found = {"Utility Rea (BBH)": _reason(model, [row for row in rows if isinstance(row, Reason)])}
    elif name == "truthfulness":
        one, mass = truthful(model, [row for row in rows if isinstance(row, Truthful)])
        found = {"Utility Tru (MC1)": one, "Utility Tru (MC2)": mass}
    elif name == "factuality":
        found = {"Utility Fac (TriviaQA)": _factual(model, [row for row in rows if isinstance(row, Factual)])}
    else:
        some = [row for row in rows if isinstance(row, Fluent)]
        prompts = [message(model.tokenizer, row.instruction, "") for row in some]
        clusters = [row.subject for row in some]
        found = {"Utility Flu (entropy)": fluency_ngram_entropy(model, prompts, clusters=clusters)}
    return keep(found, kind)
