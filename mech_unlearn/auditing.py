"""What the commands `audit` and `calibrate` do on a user's own models and files, without the printing."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mech_unlearn.commands import hashes, twin
from mech_unlearn.core import Fact, RetainSet
from mech_unlearn.data.jsonl import load_facts
from mech_unlearn.inputs import (
    choose,
    entities,
    mentions,
    open_model,
    open_sae,
    read_lines,
)
from mech_unlearn.run import Run, open_run, provenance, write_json


@dataclass(frozen=True, eq=False, kw_only=True)
class Audit:
    """What is tested, on which facts, and what judges it: everything but the audited models."""

    case: Any
    tests: tuple[str, ...]
    calibration: Any
    """None for provisional thresholds."""
    note: str
    """How far the evidence goes, for captions."""

    def cells(self, run: Run, models: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The cell of each model (row, records, verdicts, curves) by `audit_row`; a finished one is read.

        Args:
            models: by the names of their rows; a retrained one is compared with the other retrained models.
        """
        from mech_unlearn.metrics import recall
        from mech_unlearn.restoration import reference
        from mech_unlearn.rows import audit_row
        from mech_unlearn.verdict import Thresholds

        made: list[tuple[Any, Any]] = []

        def compute(name: str) -> dict[str, Any]:
            case = self.case
            if not made:
                kept = recall(case.full, case.others, "prompt", case.seed) if case.others else None
                made.append((reference(case, self.tests), kept))
            return audit_row(
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
    sae: str | None,
    tests: str,
    calibration: str,
    seed: int,
    log: Callable[[str], None],
) -> Audit:
    """An audit of some facts; writes nothing.

    Args:
        full: the loaded model before unlearning; `retrained` likewise.
        kept: facts that were to stay; those about other subjects than the facts' serve as contrast.

    Raises:
        ValueError: an unknown test, or a calibration that cannot serve.
    """
    from mech_unlearn.restoration import Case
    from mech_unlearn.verdict import Thresholds

    subjects = {fact.subject for fact in facts}
    case = Case(
        full=full,
        facts=tuple(facts),
        retrained=tuple(retrained),
        others=tuple(fact for fact in kept if fact.subject not in subjects),
        texts=mentions(kept),
        sae=open_sae(sae, full, (), seed) if sae else None,
        seed=seed,
        log=log,
    )
    case, wanted, lacks = _core(case) if tests == "core" else (case, named_tests(tests), [])
    made_for = _calibration(calibration, full, wanted, bool(retrained))
    note = f"Evidence of grade {case.grade}"
    note += "" if retrained else ": no retrained model given, sham facts stand in for one"
    note += "" if sae else "; no SAE given, the mean-difference direction stands in for expert latents"
    note = "; ".join([note, *lacks]) + "."
    return Audit(case=case, tests=wanted, calibration=made_for, note=f"{note} {(made_for or Thresholds()).describe()}")


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
        ValueError: a model or an edit that cannot be read, or an edit of another base model.
    """
    from mech_unlearn.edit import Edit

    if source.endswith(".safetensors"):
        return stack.enter_context(twin(full, Edit.load(source, full)))
    return open_model(source, device, dtype)


def run_audit(
    full: str,
    unlearned: str,
    facts: Path,
    out: Path,
    *,
    retrained: Sequence[str],
    retain: Path | None,
    sae: str | None,
    tests: str,
    device: str,
    dtype: str,
    seed: int,
    calibration: str = "auto",
) -> dict[str, Any]:
    """Restoration tests and a verdict per fact for one before/after pair, in a run directory.

    `unlearned` is a model, or an edit file of ours to be put on the full model. Without retrained models the evidence
    is of grade B; without an SAE the mean-difference direction stands in for expert latents.

    Raises:
        ValueError: bad input; nothing is written before all of it was read.
    """
    from mech_unlearn.demo import draw_figures, progress
    from mech_unlearn.edit import clone
    from mech_unlearn.report import write_report

    wanted = named_tests(tests)
    asked, kept = load_facts(facts), load_facts(retain) if retain else ()
    before = open_model(full, device, dtype)
    with ExitStack() as stack:
        after = open_unlearned(stack, unlearned, before, device, dtype)
        others = tuple(open_model(source, device, dtype) for source in retrained)
        spec = {"command": "audit", "full": full, "unlearned": unlearned, "retrained": list(retrained)}
        spec |= {"facts": str(facts), "retain": retain and str(retain), "sae": sae, "seed": seed}
        spec |= {"calibration": calibration}
        log = stack.enter_context(progress(total=8 * (len(wanted) + 1)))
        given = {"sae": sae, "tests": tests, "calibration": calibration, "seed": seed, "log": log}
        audit = prepare_audit(before, asked, kept, retrained=others, **given)
        run = open_run(out, spec | {"tests": list(audit.tests)})
        write_json(
            run.folder / "provenance.json",
            provenance(hashes(asked, full=before, unlearned=after), seed, device),
        )
        models = {"full": stack.enter_context(clone(before)), "unlearned": after}
        if len(others) > 1:
            models["retrained"] = others[0]
        cells = audit.cells(run, models)
    write_json(run.folder / "captions.json", {"note": audit.note})
    summary = run.finish("audit", None, cells)
    draw_figures(run.folder)
    write_report(run.folder)
    return summary


def _calibration(source: str, full: Any, tests: Sequence[str], retrained: bool) -> Any:
    """The calibration that an audit is judged by, or None for provisional thresholds.

    Raises:
        ValueError: a file that is none, or one that was asked for and cannot serve: made for another full model,
            without retrained models, or without the tests that it reads.
    """
    from mech_unlearn.calibration import load, shipped
    from mech_unlearn.verdict import CALIBRATED

    if source == "none":
        return None
    ready = retrained and set(CALIBRATED) <= set(tests)
    if source == "auto":
        return shipped(full.hash()) if ready else None
    if not Path(source).is_file():
        raise ValueError(f"calibration {source!r}: no such file; give auto, none, or what `calibrate` wrote")
    made = load(source)
    if made.provenance.get("full") != full.hash():
        raise ValueError(f"calibration {source!r} was made for another full model; its error rates do not hold here")
    if not ready:
        raise ValueError(f"calibration {source!r} needs retrained models and the tests {', '.join(CALIBRATED)}")
    return made


def run_calibrate(
    full: str,
    facts: Path,
    retain: Path,
    texts: Path,
    out: Path,
    *,
    references: Sequence[str],
    retrained: Sequence[str],
    unknown: Path | None,
    sae: str | None,
    workers: int,
    device: str,
    dtype: str,
    seed: int,
) -> tuple[Path, str]:
    """Pools of known truth from a user's own models, and the calibration they give: (its file, what it says of itself).

    Raises:
        ValueError: bad or too little input, or a folder with pools of other models.
    """
    from mech_unlearn.calibration import fit_whole, require_enough, save
    from mech_unlearn.testbed.materials import Materials, groups_of
    from mech_unlearn.testbed.pools import cells, make_pools, read_pool

    known, kept = load_facts(facts), load_facts(retain)
    subjects = {fact.subject for fact in known}
    materials = Materials(
        full=full,
        references=tuple(references),
        retrained=tuple(retrained),
        facts=known,
        retain=RetainSet(
            neighbors=tuple(fact for fact in kept if fact.subject not in subjects),
            texts=read_lines(texts),
            unknown=entities(unknown, known[0].kind),
        ),
        sae=sae,
        device=device,
        dtype=dtype,
    )
    require_enough(len(groups_of(known)))
    model = open_model(full, device, dtype)
    make_pools(materials, out, workers=workers, log=lambda line: print(line, file=sys.stderr))
    pool = read_pool([cell for cell in cells(out) if not cell["kind"].startswith("mixture")])
    made = fit_whole(pool, model.hash(), seed, models_from="pools of your own models")
    save(made, out / "calibration.json")
    return out / "calibration.json", made.describe()
