"""The main job, end to end: take facts a model knows, find where they live, remove them, prove what each removal did.

Runs on an embedded world where the truth is known: `retrained` never saw the facts, `last_layer_ascent` is a planted
suppressor (every tensor below the last layer stays bit-identical), `full` knows all. The other removals are judged.
"""

import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mech_unlearn.commands.inputs import progress
from mech_unlearn.commands.options import DemoOptions, spec_of
from mech_unlearn.commands.row import audit_row
from mech_unlearn.core import Fact
from mech_unlearn.edit.edit import Edit
from mech_unlearn.files import write_json
from mech_unlearn.metrics import recall
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.load import load
from mech_unlearn.report.figures import draw_figures
from mech_unlearn.report.page import write_report
from mech_unlearn.run import Run, data_hash, open_run, provenance, say, side_by_side
from mech_unlearn.verdict.verdict import Thresholds

TRUTH = {"full": "intact", "retrained": "deleted", "last_layer_ascent": "suppressed"}
"""Rows whose truth is known by construction."""
SLOWEST = ("npo", "last_layer_ascent", "sae_shift", "rocr", "full", "retrained")
"""The rows, longest work first, so that two processes end at about the same time."""
ROWS = ("full", "retrained", "last_layer_ascent", "rocr", "sae_shift", "npo")


@dataclass
class Study:
    """Models, facts and prepared tests of one demo; each is made when it is first needed."""

    world: Any
    run: Run
    seed: int
    log: Callable[[str], None]

    @cached_property
    def full(self) -> Model:
        return load(self.world.full)

    @cached_property
    def retrained(self) -> tuple[Model, ...]:
        return tuple(load(path) for path in self.world.retrained)

    @cached_property
    def sae(self) -> Any:
        from mech_unlearn.model.latents import load_sae

        return load_sae(self.world.sae, self.full)

    @cached_property
    def methods(self) -> dict[str, Any]:
        """Row name -> method, with the settings that suit the small models of the testbed."""
        from mech_unlearn.methods import LastLayerAscent, Npo, Rocr, SaeShift
        from mech_unlearn.training.schedule import Schedule

        ascent = Schedule(lr=4e-3, epochs=25, batch_size=48, weight_decay=0.0, stop_recall=0.005)
        preference = Schedule(lr=7e-4, epochs=4, batch_size=48, stop_recall=0.06)
        return {
            "last_layer_ascent": LastLayerAscent(schedule=ascent, max_nll=12.0, retain_weight=2.0, seed=self.seed),
            # written below layer 2, so that the layers above compute from what was written (LOG)
            "rocr": Rocr(layers=(0, 1), z_layer=3, seed=self.seed),
            "sae_shift": SaeShift(sae=self.sae, mode="weights", layers=(0, 1), seed=self.seed),
            "npo": Npo(schedule=preference, beta=1.0, retain_weight=5.0, seed=self.seed),
        }

    def edit(self, name: str) -> Edit:
        """The edit of one method: read from the run directory, else fitted and saved."""
        path = self.run.folder / "edits" / f"{name}.safetensors"
        if not path.exists():
            self.log(f"fit {name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.methods[name].fit(self.full, self.world.forget, self.world.retain).save(path)
        return Edit.load(path, self.full)

    @cached_property
    def reference(self) -> Any:
        from mech_unlearn.restoration import Case, reference

        case = Case(
            full=self.full,
            facts=self.world.forget.facts,
            retrained=self.retrained,
            others=self.world.retain.neighbors,
            texts=self.world.retain.texts,
            unknown=self.world.retain.unknown,
            sae=self.sae,
            seed=self.seed,
            log=self.log,
        )
        return reference(case)

    @cached_property
    def calibration(self) -> Any:
        """What makes p-values of the scores; None where the package has none for the world's full model."""
        from mech_unlearn.verdict.calibration import shipped

        return shipped(self.full.hash())

    @cached_property
    def full_neighbor_recall(self) -> Any:
        return recall(self.full, self.world.retain.neighbors, "prompt", self.seed)

    @contextmanager
    def subject(self, name: str) -> Iterator[Model]:
        """The model that a row is about, with its edit in force."""
        if name == "full":
            yield load(self.world.full)
        elif name == "retrained":
            yield self.retrained[0]
        else:
            edit, model = self.edit(name), load(self.world.full)
            with edit.on(model):
                yield model

    def audit(self, name: str) -> dict[str, Any]:
        """The cell of one row."""
        with self.subject(name) as model:
            self.log(f"audit {name}")
            cell = audit_row(
                self.reference,
                model,
                name=name,
                method=None if name in ("full", "retrained") else type(self.methods[name]).__name__,
                truth=TRUTH.get(name),
                neighbors=self.world.retain.neighbors,
                texts=self.world.retain.texts,
                full_neighbor_recall=self.full_neighbor_recall,
                thresholds=Thresholds(),
                calibration=self.calibration,
                seed=self.seed,
            )
        return cell

    def locate(self) -> dict[str, Any]:
        """The attributions of the locating step, as JSON by name."""
        from mech_unlearn.locate import LOCATORS

        self.log("locate: where does the full model keep these facts?")
        facts, retain = self.world.forget.facts, self.world.retain
        found = {
            "logit_lens": LOCATORS["logit_lens"].run(self.full, facts),
            "causal_trace": LOCATORS["causal_trace"].run(self.full, drawn(facts, 40, self.seed), seed=self.seed),
            "known_unknown": LOCATORS["known_unknown"].run(
                self.full, retain.neighbors, retain.unknown, [self.sae], texts=retain.texts, seed=self.seed
            ),
        }
        return {name: result.to_json() for name, result in found.items()}


def drawn(facts: Sequence[Fact], count: int, seed: int) -> list[Fact]:
    """So many of the facts, or all where there are fewer, in their order. Drawn and not taken at equal steps, which
    would be facts of one relation where each subject has as many as a step."""
    return [facts[i] for i in sorted(random.Random(seed).sample(range(len(facts)), min(count, len(facts))))]


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Run the main job on a world, or go on with it, and give the summary back.

    Raises:
        KeyError: no such world. ValueError: the output folder holds something else.
    """
    from mech_unlearn.restoration import CORE
    from mech_unlearn.testbed import open_world

    world = open_world(options.world)
    run = open_run(options.out, spec_of("demo", options))
    fits, prepared = len(ROWS) - 2, len(CORE)
    with progress(total=fits + 1 + prepared + len(ROWS) * (1 + len(CORE))) as log:
        study = Study(world, run, options.seed, log)
        hashes = {"facts": data_hash(world.forget.facts), "full": study.full.hash()}
        write_json(run.folder / "provenance.json", provenance(hashes, options.seed, str(study.full.device)))
        located = run.folder / "locate.json"
        if not located.exists():
            write_json(located, study.locate())
        audit_rows(study, [name for name in ROWS if not run.has(name)])
        cells = [run.cell(name, lambda name=name: study.audit(name)) for name in ROWS]
    write_json(run.folder / "captions.json", captions(world, study.calibration or Thresholds()))
    summary = run.finish("demo", options.world, cells)
    draw_figures(run.folder)
    write_report(run.folder)
    return summary


def audit_rows(study: Study, names: Sequence[str]) -> None:
    """Audit rows side by side in two forked processes: small models gain little from threads.

    The processes inherit the prepared tests and write their cells themselves. Where none can be forked (no Linux, one
    core) nothing is done and the caller audits one row after the other.
    """
    if sys.platform != "linux" or (os.cpu_count() or 1) < 2 or len(names) < 2:
        return
    _ = (study.reference, study.full_neighbor_recall, study.methods, study.calibration)  # made here, and inherited
    ordered = sorted(names, key=SLOWEST.index)
    for _ in side_by_side(ordered, _audit_inherited, method="fork", setup=_inherit, given=(study,), log=study.log):
        pass


_INHERITED: list[Study] = []
"""The study of a forked process."""


def _inherit(study: Study) -> None:
    study.log = say
    object.__setattr__(study.reference.case, "log", say)
    _INHERITED[:] = [study]


def _audit_inherited(name: str) -> None:
    study = _INHERITED[0]
    study.run.cell(name, lambda: study.audit(name))


def captions(world: Any, judged: Any) -> dict[str, Any]:
    """What is written under the table and the figures; `judged` is the calibration or the thresholds."""
    facts = world.forget.facts
    guess = sum(world.chance[fact.relation] for fact in facts) / len(facts)
    return {
        "chance": guess,
        "note": f"Site: the subject's last token. Chance recall {guess:.3f} (each relation's commonest object). "
        f"Rocr and SaeShift aim at the same unknown entities, at layers 3 and 2. {judged.describe()}",
        "1_causal_trace": "What restoring one clean state gives back of the answer's probability when the whole "
        "subject is corrupted: facts sit at the subject's last token in early layers, then move to the prompt's end.",
        "2_restoration_by_layer": "The unlearned model's states, patched into the full model: near 0 the full model "
        "still reads the fact there, near 1 they are as empty as a retrained model's. Above 1.5 is drawn at 1.5.",
        "3_recall": "Recall of the forget set before and after unlearning. The third bar is not a measured recall: "
        "it adds the share of the lost margin that relearning or 4-bit rounding recovers, beyond what it gives to "
        "retrained models.",
        "4_verdicts": "Share of testable facts by verdict.",
        "5_forms": "Recall of the forget set by form of the question, above chance. These models were trained on "
        "sentences only, so that even the full one answers few questions in other forms.",
    }
