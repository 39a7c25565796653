"""What the commands `audit` and `calibrate` do on a user's own models and files, without the printing."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mech_unlearn.commands import hashes, twin
from mech_unlearn.core import RetainSet
from mech_unlearn.data.jsonl import load_facts
from mech_unlearn.inputs import (
    choose,
    entities,
    mentions,
    open_model,
    open_sae,
    read_lines,
)
from mech_unlearn.run import open_run, provenance, write_json


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
    from mech_unlearn.edit import Edit
    from mech_unlearn.metrics import recall
    from mech_unlearn.report import write_report
    from mech_unlearn.restoration import CORE, TESTS, Case, core_of, reference
    from mech_unlearn.rows import audit_row
    from mech_unlearn.verdict import Thresholds

    named = {"core": CORE, "all": tuple(TESTS)}
    wanted = named.get(tests) or tuple(name.strip() for name in tests.split(","))
    for name in wanted:
        choose(name, TESTS, "restoration test")
    if "output" not in wanted:
        wanted = ("output", *wanted)
    asked, kept = load_facts(facts), load_facts(retain) if retain else ()
    before = open_model(full, device, dtype)
    with ExitStack() as stack:
        if unlearned.endswith(".safetensors"):
            edit = Edit.load(unlearned, before)
            after = stack.enter_context(twin(before, edit))
        else:
            after = open_model(unlearned, device, dtype)
        others = tuple(open_model(source, device, dtype) for source in retrained)
        spec = {"command": "audit", "full": full, "unlearned": unlearned, "retrained": list(retrained)}
        spec |= {"facts": str(facts), "retain": retain and str(retain), "sae": sae, "seed": seed}
        spec |= {"calibration": calibration}
        with progress(total=8 * (len(wanted) + 1)) as log:
            subjects = {fact.subject for fact in asked}
            case = Case(
                full=before,
                facts=asked,
                retrained=others,
                others=tuple(fact for fact in kept if fact.subject not in subjects),
                texts=mentions(kept),
                sae=open_sae(sae, before, (), seed) if sae else None,
                seed=seed,
                log=log,
            )
            if tests == "core":
                wanted = core_of(case)
            made_for = _calibration(calibration, before, wanted, bool(retrained))
            run = open_run(out, spec | {"tests": list(wanted)})
            models = {"full": before, "unlearned": after}
            write_json(run.folder / "provenance.json", provenance(hashes(asked, **models), seed, device))
            common = {
                "method": None,
                "truth": None,
                "neighbors": case.others,
                "texts": case.texts,
                "full_neighbor_recall": recall(before, case.others, "prompt", seed) if case.others else None,
                "thresholds": Thresholds(),
                "calibration": made_for,
                "seed": seed,
            }
            subjects_of_audit = {"full": open_model(full, device, dtype), "unlearned": after}
            if len(others) > 1:
                subjects_of_audit["retrained"] = others[0]
            made: list[Any] = []

            def compute(name: str) -> dict[str, Any]:
                if not made:
                    made.append(reference(case, wanted))
                return audit_row(made[0], subjects_of_audit[name], name=name, **common)

            cells = [run.cell(name, lambda name=name: compute(name)) for name in subjects_of_audit]
    note = f"Evidence of grade {case.grade}"
    note += "" if others else ": no retrained model given, sham facts stand in for one"
    note += "" if sae else "; no SAE given, the mean-difference direction stands in for expert latents"
    without = tests == "core" and "probe" not in wanted
    note += "; no probe, for want of kept facts to train one on." if without else "."
    write_json(run.folder / "captions.json", {"note": f"{note} {(made_for or Thresholds()).describe()}"})
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
    from mech_unlearn.calibration import fit_whole, save
    from mech_unlearn.testbed.materials import Materials
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
    model = open_model(full, device, dtype)
    make_pools(materials, out, workers=workers, log=lambda line: print(line, file=sys.stderr))
    pool = read_pool([cell for cell in cells(out) if not cell["kind"].startswith("mixture")])
    made = fit_whole(pool, model.hash(), seed, models_from="pools of your own models")
    save(made, out / "calibration.json")
    return out / "calibration.json", made.describe()
