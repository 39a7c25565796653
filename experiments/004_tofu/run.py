"""TOFU from scratch: a small model learns its questions, forgets 1, 5 and 10 %, and everything is measured on it.

    python -m experiments.004_tofu.run WORK [--data DIR] [--quick]      all stages; goes on where it stopped

WORK keeps the models and cells; results/ gets summary.json, tables.md and the figures. `--quick`: six authors, three
methods, three to four minutes, results in WORK.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from experiments.from_scratch import command
from experiments.runner import SHARED_DATA
from experiments.scratch import Plan, deal, make_vocabulary
from experiments.study import Size, Study, epochs, every
from mech_unlearn.benchmarks.tofu.scores import model_utility, probability_among_options
from mech_unlearn.metrics.evaluate import score_answers
from mech_unlearn.metrics.generation import continuations
from mech_unlearn.metrics.intervals import mean_ci
from mech_unlearn.metrics.rouge import rouge_recall
from mech_unlearn.metrics.truth_ratio import true_preferred, truth_ratio_geometric
from mech_unlearn.model.bridge import Model
from mech_unlearn.testbed.recipe import Recipe

from . import corpus, report
from .corpus import Question, Tofu

HERE = Path(__file__).parent
DATA = SHARED_DATA / "tofu"
RECIPE = Recipe(
    n_layers=4,
    d_model=128,
    d_mlp=384,
    gate=2,
    masked_share=0.0,
    base_steps=400,
    continue_steps=320,
    continue_lr=2e-3,
    forget_weight=3,
)
"""Not masked: an answer says the name again, which a mask after its first mention would hide from itself."""
SHARDS, SHARD_STEPS, POSITIONS = 4, 80, 192
AUDITED = 80
"""Facts audited per size at the most, every k-th of them."""
SAID, LONG, SHORT = 24, 36, 8
"""Questions per split whose answers are generated for ROUGE, and their lengths in tokens (fictitious, real)."""


@lru_cache(maxsize=2)
def read(data: Path, quick: bool) -> Tofu:
    whole = corpus.read(data)
    return corpus.quick(whole) if quick else whole


def make_study(data: Path, quick: bool) -> Study:
    """The experiment on the published files."""
    tofu = read(data, quick)
    told = corpus.texts(tofu)
    sizes = {"10": 4, "01": 2} if quick else {"10": 20, "05": 10, "01": 2}
    gone = {name: frozenset(tofu.authors[-count:]) for name, count in sizes.items()}
    owners = {text.owner for text in told if text.owner}
    recipe = replace(RECIPE, base_steps=80, continue_steps=120) if quick else RECIPE
    plan = Plan(
        texts=told, requests=gone, tokenizer=make_vocabulary(corpus.words(tofu)), recipe=recipe,
        shards=deal(owners, 2 if quick else SHARDS, 0), retrained={} if quick else {"10": 2},
        shard_steps=40 if quick else SHARD_STEPS, positions=POSITIONS,
    )  # fmt: skip
    return Study(
        name="tofu",
        plan=plan,
        sizes={name: size_of(tofu, gone[name], 12 if quick else AUDITED) for name in sizes},
        methods=few if quick else methods,
        extra=lambda model, size: tofu_scores(tofu, gone[size], model),
        locators=locate,
        facts=tofu.facts,
        counts={
            "forget10 questions": len(tofu.forget), "retain questions": len(tofu.retain), "texts": len(told),
            "real authors": len(tofu.real), "world facts": len(tofu.world), "cloze facts": len(tofu.facts),
            "question facts": len(tofu.asked), "rows that became no fact": len(tofu.left_out),
        },
    )  # fmt: skip


def size_of(tofu: Tofu, gone: frozenset[str], most: int) -> Size:
    forget, retain = corpus.sets(tofu, gone)
    cloze = [f for f in tofu.facts if f.subject in gone]
    asked = tuple(f for f in tofu.asked if f.subject in gone)
    return Size(
        forget=forget, retain=retain, audited=every(cloze, most), kept=every(retain.neighbors, 150),
        texts=every(retain.texts, 60), asked={"question": every(asked, 150)},
    )  # fmt: skip


def methods(at: Size) -> Mapping[str, Any]:
    """The methods with settings found by hand on forget05 (README); the same at all sizes."""
    from mech_unlearn.methods import GradDiff, IdkDpo, LastLayerAscent, Npo, Rmu, Rocr
    from mech_unlearn.training.schedule import Schedule

    kept = Schedule(lr=3e-4, epochs=epochs(at, least=4), batch_size=24)
    once = Schedule(lr=3e-3, epochs=epochs(at), batch_size=24)
    return {
        "npo": Npo(schedule=kept, beta=0.5, retain_weight=3.0),
        "idk_dpo": IdkDpo(schedule=kept, retain_weight=3.0, refusals=corpus.REFUSALS),
        "grad_diff": GradDiff(schedule=replace(kept, lr=1e-4), retain_weight=3.0),
        "rmu": Rmu(schedule=once, layer=1, c=20.0, relative=False, alpha=5.0),
        "last_layer_ascent": LastLayerAscent(
            schedule=replace(once, lr=2e-3, weight_decay=0.0, stop_recall=0.0), max_nll=8.0, retain_weight=8.0
        ),
        "rocr": Rocr(layers=(0, 1), z_layer=2, energy=0.4),
    }  # fmt: skip


def few(at: Size) -> Mapping[str, Any]:
    """Three of the methods, for the quick run."""
    return {name: m for name, m in methods(at).items() if name in ("npo", "last_layer_ascent", "rocr")}


def losses(model: Model, questions: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss per token of the true answers, and of the wrong ones (padded with the row's mean where fewer)."""
    rows = [(corpus.LAYOUT.format(q.question), q.answer) for q in questions]
    wrong = [(corpus.LAYOUT.format(q.question), answer) for q in questions for answer in q.wrong]
    found = score_answers(model, [*rows, *wrong]).loss.double()
    width, flat = max(len(q.wrong) for q in questions), iter(found[len(rows) :].tolist())
    table = []
    for q in questions:
        own = [next(flat) for _ in q.wrong]
        table.append(own + [sum(own) / len(own)] * (width - len(own)))
    return found[: len(rows)], torch.tensor(table, dtype=torch.float64)


def tofu_scores(tofu: Tofu, gone: frozenset[str], model: Model) -> dict[str, Any]:
    """TOFU's numbers of one model: truth ratios of the forgotten questions, and the nine parts of the utility."""
    forgotten = [q for q in tofu.forget if q.owner in gone and q.wrong]
    true, wrong = losses(model, forgotten)
    ratio = truth_ratio_geometric(true, wrong)
    owners = [q.owner for q in forgotten]
    parts: dict[str, Any] = {}
    for split, questions, length in (
        ("Retain", every([q for q in tofu.retain if q.wrong], 100), LONG),
        ("Real Authors", tofu.real, SHORT),
        ("Real World", tofu.world, SHORT),
    ):
        own, other = losses(model, questions)
        chosen = (-own).exp() if split == "Retain" else probability_among_options(own, other)
        clusters = [q.owner or q.key for q in questions]
        parts[f"{split} probability"] = mean_ci(chosen, "probability, mean over questions", clusters).to_json()
        preferred = true_preferred(truth_ratio_geometric(own, other))
        parts[f"{split} truth ratio"] = mean_ci(
            preferred, "max(0, 1 - truth ratio), mean over questions", clusters
        ).to_json()
        parts[f"{split} ROUGE"] = rouge(model, questions, length)
    return {
        "truth_ratio": ratio.tolist(),
        "owners": owners,
        "forget probability": mean_ci((-true).exp(), "probability, mean over questions", owners).to_json(),
        "forget ROUGE": rouge(model, forgotten, LONG),
        "parts": parts,
        "utility": model_utility([part["value"] for part in parts.values()]),
    }


def rouge(model: Model, questions: Sequence[Question], length: int) -> dict[str, Any]:
    some = every(questions, SAID)
    said = continuations(model, [corpus.LAYOUT.format(q.question) for q in some], length)
    found = rouge_recall(said, [q.answer for q in some]).rougeL
    return mean_ci(found, "ROUGE-L recall, mean over questions", [q.owner or q.key for q in some]).to_json()


def locate(model: Model, at: Size) -> dict[str, Any]:
    from mech_unlearn.locate import LOCATORS

    facts = every(at.audited, 60)
    return {
        "causal_trace": LOCATORS["causal_trace"].run(model, facts, samples=4, seed=0).to_json(),
        "logit_lens": LOCATORS["logit_lens"].run(model, facts).to_json(),
    }


def main() -> None:
    command(__doc__, make_study, DATA, "folder of the published TOFU files", HERE, report.write)


if __name__ == "__main__":
    main()
