"""Every removal method on both worlds: what it forgets, keeps, and what the restoration tests find afterwards.

    python -m experiments.002_methods.run [--workers N] [--methods NAME ...] [--seeds N]     goes on where it stopped
    python -m experiments.002_methods.run --report                       tables and figure from the finished cells alone

The forget group is split by subject: settings are chosen on every other subject (tune) and used on the rest (test).
One search serves all: of the settings in `settings.py` those with the smallest `cost` on the tune half win. Finished
cells lie in results/cells, packed in results/cells.jsonl.gz; summary.json, tables.md and pareto.png are made from them.
A third stage judges edits of weights once more, seed 0, by the calibration that ships for `biographies`.
"""

import re
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from experiments.runner import Cells, command_line, pack, provenance, unpack
from mech_unlearn.commands.row import audit_row
from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.metrics import forget_recall, recall
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.latents import load_sae
from mech_unlearn.model.load import load
from mech_unlearn.restoration import Case, Reference, reference
from mech_unlearn.run import data_hash, side_by_side
from mech_unlearn.testbed import WORLDS, open_world
from mech_unlearn.verdict.calibration import shipped
from mech_unlearn.verdict.verdict import CALIBRATED, Thresholds

from . import report, settings

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CELLS = Cells(RESULTS / "cells")
PACKED = RESULTS / "cells.jsonl.gz"
TESTS = ("output", "uds", "uds_subject", "sae", "relearn", "int4")
ON_STATES = ("output", "uds", "uds_subject", "sae")
"""The tests that see an intervention on activations; the others train or round weights, which it leaves alone."""
TRUTH = {"full": "intact", "retrained": "deleted", "last_layer_ascent": "suppressed"}
REFERENCES = ("full", "retrained")
Job = tuple[str, str, str, int, dict[str, Any]]
"""Stage, world, method, index of the grid point or seed, and the settings that the search chose."""
STAGES = ("tune", "test", "judged")
JUDGED = "biographies"
"""The world whose full model a calibration ships for."""


@dataclass(frozen=True)
class OpenWorld:
    """A world in one process: its models and the prepared restoration tests, each made once."""

    name: str

    @cached_property
    def world(self) -> Any:
        return open_world(self.name)

    @cached_property
    def full(self) -> Model:
        return load(self.world.full)

    @cached_property
    def sae(self) -> Any:
        return load_sae(self.world.sae, self.full)

    @cached_property
    def retrained(self) -> tuple[Model, ...]:
        return tuple(load(path) for path in self.world.retrained)

    def half(self, part: str) -> ForgetSet:
        """The forget facts of every other subject."""
        subjects = [entity.name for entity in self.world.forget.entities]
        chosen = set(subjects[part == "test" :: 2])
        return ForgetSet(facts=tuple(fact for fact in self.world.forget.facts if fact.subject in chosen))

    def selective(self) -> tuple[ForgetSet, RetainSet]:
        """A request for some relations of the test subjects: (first half of each subject's facts, retain set that
        holds a half of the others as same_subject)."""
        facts = self.half("test").facts
        place: dict[str, int] = {}
        gone, stay = [], []
        for fact in facts:
            place[fact.subject] = place.get(fact.subject, -1) + 1
            (gone if place[fact.subject] % 2 == 0 else stay).append(fact)
        retain = self.world.retain
        return ForgetSet(facts=tuple(gone)), RetainSet(
            neighbors=retain.neighbors, same_subject=tuple(stay), texts=retain.texts, unknown=retain.unknown
        )

    @cached_property
    def chance(self) -> float:
        facts = self.world.forget.facts
        return sum(self.world.chance[fact.relation] for fact in facts) / len(facts)

    @cached_property
    def neighbor_recall(self) -> Any:
        return recall(self.full, self.world.retain.neighbors, "prompt", 0)

    @cached_property
    def case(self) -> Case:
        return Case(
            full=self.full, facts=self.half("test").facts, retrained=self.retrained,
            others=self.world.retain.neighbors, texts=self.world.retain.texts, unknown=self.world.retain.unknown,
            sae=self.sae, seed=0, log=lambda _: None,
        )  # fmt: skip

    @cached_property
    def reference(self) -> Reference:
        return reference(self.case, TESTS)

    @cached_property
    def calibrated(self) -> Reference:
        return reference(self.case, CALIBRATED)

    def method(self, name: str, chosen: dict[str, Any], seed: int) -> Any:
        return settings.make(name, self, chosen, seed)


@lru_cache(maxsize=2)
def opened(world: str) -> OpenWorld:
    return OpenWorld(world)


def cost(forgotten: float, chance: float, kept: float, kept_before: float) -> float:
    """What the search minimises: recall above chance on the phrasings trained on, plus neighbours' recall lost."""
    return max(0.0, forgotten - chance) + max(0.0, kept_before - kept)


def tune(world: str, name: str, index: int) -> dict[str, Any]:
    """One point of a method's grid on the tune half."""
    at = opened(world)
    chosen = settings.GRID[name][index]
    forget = at.half("tune")
    start = time.perf_counter()
    edit = at.method(name, chosen, 0).fit(at.full, forget, at.world.retain)
    seconds = time.perf_counter() - start
    with edit.on(at.full):
        found = forget_recall(at.full, forget.facts).value
        kept = recall(at.full, at.world.retain.neighbors, "prompt").value
    return {
        "settings": chosen, "forget_recall": found, "neighbor_recall": kept, "seconds": seconds,
        "cost": cost(found, at.chance, kept, at.neighbor_recall.value),
    }  # fmt: skip


def test(world: str, name: str, seed: int, chosen: dict[str, Any]) -> dict[str, Any]:
    """One method with one seed on the test half: outputs, restoration tests, verdicts."""
    at = opened(world)
    ref, retain, forget = at.reference, at.world.retain, at.half("test")
    arguments: dict[str, Any] = dict(
        name=name, truth=TRUTH.get(name), neighbors=retain.neighbors, texts=retain.texts,
        full_neighbor_recall=at.neighbor_recall, thresholds=Thresholds(), seed=seed,
    )  # fmt: skip
    if name in REFERENCES:
        model = at.full if name == "full" else at.retrained[seed % len(at.retrained)]
        return audit_row(ref, model, method=None, **arguments)
    made = at.method(name, chosen, seed)
    start = time.perf_counter()
    edit = made.fit(at.full, forget, retain)
    seconds = time.perf_counter() - start
    if edit.interventions:
        tests = settings.tests_of(name, ON_STATES)
        ref = Reference(ref.case, {test: ref.ready[test] for test in tests})
    subject = load(at.world.full)
    with edit.on(subject):
        cell = audit_row(ref, subject, method=type(made).__name__, **arguments)
    report_ = dict(edit.recipe["report"])
    parts = {
        "settings": chosen, "seconds": seconds, "selective": selective(at, made) if seed == 0 else None,
        "n_forward": report_.get("n_forward"), "n_backward": report_.get("n_backward"),
    }  # fmt: skip
    return {"row": cell["row"], "curves": cell["curves"], **parts}


def judged(name: str, seed: int, chosen: dict[str, Any]) -> dict[str, Any]:
    """The verdicts of a calibration with measured error rates on one method; none on activation interventions, which
    leave the weights alone and so suppress by definition."""
    at = opened(JUDGED)
    calibration = shipped(at.full.hash())
    assert calibration is not None
    arguments: dict[str, Any] = dict(
        name=name, truth=TRUTH.get(name), neighbors=at.world.retain.neighbors, texts=at.world.retain.texts,
        full_neighbor_recall=at.neighbor_recall, thresholds=Thresholds(), seed=seed, calibration=calibration,
    )  # fmt: skip
    if name in REFERENCES:
        model = at.full if name == "full" else at.retrained[seed % len(at.retrained)]
        return {"row": audit_row(at.calibrated, model, method=None, **arguments)["row"]}
    made = at.method(name, chosen, seed)
    edit = made.fit(at.full, at.half("test"), at.world.retain)
    if edit.interventions:
        return {"intervention": True}
    subject = load(at.world.full)
    with edit.on(subject):
        return {"row": audit_row(at.calibrated, subject, method=type(made).__name__, **arguments)["row"]}


def selective(at: OpenWorld, method: Any) -> dict[str, Any]:
    """Recall of what was to go and of what was to stay when only some relations of each subject are forgotten."""
    gone, retain = at.selective()
    with method.fit(at.full, gone, retain).on(at.full):
        return {
            "forget": forget_recall(at.full, gone.facts).to_json(),
            "same_subject": forget_recall(at.full, retain.same_subject).to_json(),
        }


def run_cell(job: Job) -> dict[str, Any]:
    """Compute a cell and write it; a method that fails leaves its error in the cell."""
    stage, world, name, index, chosen = job
    try:
        if stage == "judged":
            found = judged(name, index, chosen)
        else:
            found = tune(world, name, index) if stage == "tune" else test(world, name, index, chosen)
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}", "settings": settings.GRID.get(name, [{}])[0]}
    found |= {"stage": stage, "world": world, "name": name, "index": index}
    CELLS.put(key(*job[:4]), found)
    return found


def key(stage: str, world: str, name: str, index: int) -> str:
    return f"{stage}-{world}-{re.sub('[^a-z0-9]+', '_', name)}-{index}"


def lay_out() -> None:
    """The packed cells that are not there yet, so that another checkout can go on."""
    for file, cell in unpack(PACKED) if PACKED.exists() else ():
        if not CELLS.has(name := file.removesuffix(".json")):
            CELLS.put(name, cell)


def best(world: str, name: str) -> dict[str, Any] | None:
    """The settings with the smallest cost on the tune half; None where none ran through or some are missing."""
    found = [CELLS.get(key("tune", world, name, i)) for i in range(len(settings.GRID[name]))]
    if any(cell is None for cell in found):
        return None
    good = [cell for cell in found if cell and "error" not in cell]
    return min(good, key=lambda cell: cell["cost"])["settings"] if good else None


def todo(names: Sequence[str], seeds: int, stage: str) -> Iterator[Job]:
    """The cells of a stage that are not there yet."""
    for world in WORLDS if stage != "judged" else (JUDGED,):
        for name in names if stage == "tune" else (*REFERENCES, *names):
            if stage == "tune":
                jobs = [(stage, world, name, i, {}) for i in range(len(settings.GRID[name]))]
            else:
                chosen = {} if name in REFERENCES else best(world, name)
                count = 1 if stage == "judged" else {"full": 1, "retrained": 3}.get(name, seeds)
                jobs = [] if chosen is None else [(stage, world, name, i, chosen) for i in range(count)]
            yield from (job for job in jobs if not CELLS.has(key(*job[:4])))


def main() -> None:
    parser = command_line(__doc__, HERE, report="only (re)make tables and figure")
    parser.add_argument("--methods", nargs="+", default=list(settings.GRID), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    if unknown := set(given.methods) - set(settings.GRID):
        parser.error(f"unknown {sorted(unknown)}; choose from {', '.join(settings.GRID)}")
    lay_out()
    for stage in () if given.report else STAGES:
        jobs = list(todo(given.methods, given.seeds, stage))
        for done, (_, cell) in enumerate(side_by_side(jobs, run_cell, workers=given.workers), 1):
            said = cell.get("error") or (report.headline(cell) if "row" in cell else cell.get("cost"))
            print(f"{stage} {done}/{len(jobs)} {cell['world']} {cell['name']} {cell['index']}: {said}", flush=True)
    cells = {name: CELLS[name] for name in CELLS.names()}
    pack(PACKED, ([f"{name}.json", cell] for name, cell in cells.items()))
    hashes = {f"{name}_facts": data_hash(OpenWorld(name).world.forget.facts) for name in WORLDS}
    chance = {name: OpenWorld(name).chance for name in WORLDS}
    report.write(RESULTS, list(cells.values()), chance, provenance(**hashes))


if __name__ == "__main__":
    main()
