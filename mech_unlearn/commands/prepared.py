"""An audit made ready: the case, the tests that it allows, and what judges it; shared by `audit` and `bench`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mech_unlearn.commands.inputs import (
    choose,
    mentions,
    open_model,
    open_sae,
)
from mech_unlearn.core import Entity, Fact
from mech_unlearn.edit.edit import twin
from mech_unlearn.run import Run


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """What is tested, on which facts, and what judges it: everything but the audited models."""

    case: Any
    tests: tuple[str, ...]
    calibration: Any
    """None for provisional thresholds."""
    note: str
    """How far the evidence goes, for captions."""
    lenient: bool = False
    """Whether tests that the case does not allow are left out, and named in the cells, instead of ending the work."""

    def note_of(self, cells: Sequence[Mapping[str, Any]]) -> str:
        """The note, with what was left out."""
        gone = {test: why for cell in cells for test, why in cell["refused"].items()}
        return self.note + "".join(f" Left out: {test} ({why})." for test, why in gone.items())

    def cells(self, run: Run, models: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The cell of each model (row, records, verdicts, curves) by `audit_row`; a finished one is read.

        Args:
            models: by the names of their rows; a retrained one is compared with the other retrained models.
        """
        from mech_unlearn.commands.row import audit_row
        from mech_unlearn.metrics import recall
        from mech_unlearn.restoration import reference
        from mech_unlearn.verdict.verdict import Thresholds

        made: list[tuple[Any, Any]] = []
        gone: dict[str, str] = {}

        def compute(name: str) -> dict[str, Any]:
            case = self.case
            if not made:
                kept = recall(case.full, case.others, "prompt", case.seed) if case.others else None
                made.append((reference(case, self.tests, gone.__setitem__ if self.lenient else None), kept))
            return {"refused": gone} | audit_row(
                made[0][0],
                models[name],
                name=name,
                method=None,
                truth=None,
                neighbors=case.others,
                texts=case.texts,
                full_neighbor_recall=made[0][1],
                thresholds=Thresholds(),
                calibration=self.calibration,
                seed=case.seed,
            )

        return [run.cell(name, lambda name=name: compute(name)) for name in models]


def named_tests(tests: str) -> tuple[str, ...]:
    """The restoration tests of `core`, `all`, or of a list of names with commas; `output` is always among them.

    Raises:
        ValueError: an unknown test; the message lists the nearest.
    """
    from mech_unlearn.restoration import CORE, TESTS

    named = {"core": CORE, "all": tuple(TESTS)}
    wanted = named.get(tests) or tuple(name.strip() for name in tests.split(","))
    for name in wanted:
        choose(name, TESTS, "restoration test")
    return wanted if "output" in wanted else ("output", *wanted)


def prepare_audit(
    full: Any,
    facts: Sequence[Fact],
    kept: Sequence[Fact],
    *,
    retrained: Sequence[Any],
    sae: Any,
    tests: str,
    calibration: str,
    seed: int,
    log: Callable[[str], None],
    texts: Sequence[str] = (),
    unknown: Sequence[Entity] = (),
) -> Prepared:
    """An audit of some facts; writes nothing.

    Args:
        full: the loaded model before unlearning; `retrained` likewise.
        kept: facts that were to stay; those about other subjects than the facts' serve as contrast.
        texts: running text on which drift is measured; without any, the kept facts written out.
        unknown: names that no model knows.

    Raises:
        ValueError: an unknown test, or a calibration that cannot serve.
    """
    from mech_unlearn.restoration import Case
    from mech_unlearn.verdict.verdict import Thresholds

    subjects = {fact.subject for fact in facts}
    case = Case(
        full=full,
        facts=tuple(facts),
        retrained=tuple(retrained),
        others=tuple(fact for fact in kept if fact.subject not in subjects),
        texts=tuple(texts) or mentions(kept),
        unknown=tuple(unknown),
        sae=open_sae(sae, full, (), seed) if isinstance(sae, str) else sae,
        seed=seed,
        log=log,
    )
    case, wanted, lacks = _core(case) if tests == "core" else (case, named_tests(tests), [])
    made_for, unfit = _calibration(calibration, case, wanted)
    note = f"Evidence of grade {case.grade}"
    stand_in = "no retrained model given, sham facts stand in for one (scores, but no verdict on what the outputs lost)"
    note += "" if retrained else f": {stand_in}"
    note += "" if sae else "; no SAE given, the mean-difference direction stands in for expert latents"
    note = "; ".join([note, *lacks, *unfit]) + "."
    note = f"{note} {(made_for or Thresholds()).describe()}"
    return Prepared(case=case, tests=wanted, calibration=made_for, note=note, lenient=tests == "all")


def _core(case: Any) -> tuple[Any, tuple[str, ...], list[str]]:
    """(The case, with relearning split by fact where there is one subject; the core tests it allows; what it lacks)."""
    from mech_unlearn.restoration import CORE, core_of

    subjects = {fact.subject for fact in case.facts}
    known = (*case.facts, *case.others)
    gone: dict[tuple[str, ...], str] = {}
    if "probe" not in core_of(case):
        gone["probe",] = "no probe, for want of kept facts to train one on"
    if len({fact.subject for fact in known}) < 2:
        gone["sae",] = "no write-back of profiles, for want of facts about another subject"
    alone = (f for f in case.facts if not any(o.subject != f.subject and o.object != f.object for o in known))
    if not case.retrained and next(alone, None):
        gone["uds", "uds_subject", "logit_lens"] = "no UDS and no lens, for want of a retrained model or other subjects"
    lacks = list(gone.values())
    if len(case.facts) < case.relearn.folds:
        gone["relearn",] = "no relearning, for want of a second fact to teach"
        lacks.append(gone["relearn",])
    elif len(subjects) < case.relearn.folds:
        case = replace(case, relearn=replace(case.relearn, split="fact"))
        lacks.append("relearning teaches other facts of the same subject, for want of other subjects")
    out = {test for tests in gone for test in tests}
    return case, tuple(test for test in CORE if test not in out), lacks


def open_unlearned(stack: ExitStack, source: str, full: Any, device: str, dtype: str) -> Any:
    """The unlearned model: a hub id or folder, or an edit file of ours in force on a twin of the full model.

    Raises:
        ValueError: a model or an edit that cannot be read, an edit of another base model, or a model of another shape
            or tokenizer.
    """
    from mech_unlearn.edit.edit import Edit
    from mech_unlearn.restoration.engine.case import require_same_shape

    if source.endswith(".safetensors"):
        return stack.enter_context(twin(full, Edit.load(source, full)))
    opened = open_model(source, device, dtype)
    require_same_shape(full, opened)
    return opened


def _calibration(source: str, case: Any, tests: Sequence[str]) -> tuple[Any, list[str]]:
    """(The calibration that an audit is judged by, or None for provisional thresholds; why one of the package's was not
    used).

    Raises:
        ValueError: a file that is none, or one that was asked for and cannot serve: made for another full model, or
            with more than this audit has.
    """
    from mech_unlearn.verdict.calibration import load, shipped

    if source == "none":
        return None, []
    if source == "auto":
        made = shipped(case.full.hash())
        lacks = _lacks(made, case, tests) if made else []
        return (
            (None, [f"not judged by the calibration of this model, for want of {', '.join(lacks)}"])
            if lacks
            else (
                made,
                [],
            )
        )
    if not Path(source).is_file():
        raise ValueError(f"calibration {source!r}: no such file; give auto, none, or what `calibrate` wrote")
    made = load(source)
    if made.provenance.get("full") != case.full.hash():
        raise ValueError(f"calibration {source!r} was made for another full model; its error rates do not hold here")
    if lacks := _lacks(made, case, tests):
        raise ValueError(f"calibration {source!r} cannot judge this audit, for want of {', '.join(lacks)}")
    return made, []


def _lacks(made: Any, case: Any, tests: Sequence[str]) -> list[str]:
    """What the audits had that a calibration was measured on, and this one has not."""
    from mech_unlearn.verdict.verdict import CALIBRATED

    site = made.provenance.get("sae")
    return [
        what
        for what, there in {
            "two retrained models": len(case.retrained) > 1,
            f"the tests {', '.join(CALIBRATED)}": set(CALIBRATED) <= set(tests),
            "facts about other subjects": bool(case.others),
            f"an SAE at {site}" if site else "leaving the SAE out": site == (case.sae and case.sae.site.hook),
        }.items()
        if not there
    ]
