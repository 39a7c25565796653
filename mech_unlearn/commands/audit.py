"""The verb `audit`, and what the command of that name does with files, without the printing."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from mech_unlearn.commands.inputs import (
    entities,
    hashes,
    open_model,
    progress,
    read_lines,
    require_memory,
)
from mech_unlearn.commands.options import AuditOptions, spec_of
from mech_unlearn.commands.prepared import named_tests, open_unlearned, prepare_audit
from mech_unlearn.commands.row import Audited
from mech_unlearn.core import Entity, Fact
from mech_unlearn.data.jsonl import load_facts
from mech_unlearn.files import write_json
from mech_unlearn.run import open_run, provenance

UNSPECIFIED = ("texts", "unknown")
"""Options that stand in a run's spec by the hash of what was read."""


def audit(
    full: Any,
    unlearned: Any,
    facts: Sequence[Fact],
    *,
    retrained: Sequence[Any] = (),
    retain: Sequence[Fact] = (),
    texts: Sequence[str] = (),
    unknown: Sequence[Entity] = (),
    sae: Any = None,
    tests: str = "core",
    calibration: str = "auto",
    seed: int = 0,
    log: Callable[[str], None] = lambda message: None,
) -> Audited:
    """Outputs and restoration tests of one model after unlearning; `judge` gives the verdicts.

    Without retrained models the evidence is of grade B, scores and no verdict on what the outputs lost; without an SAE
    the mean-difference direction stands in for expert latents.

    Args:
        full: the model before unlearning, as `load` gives it; `unlearned` and `retrained` likewise.
        facts: what was to be forgotten.
        retain: facts that were to stay; those about other subjects show the model's health and serve as contrast.
        texts: running text on which drift is measured; without any, the kept facts written out.
        unknown: entities that no model knows.
        sae: as `load_sae` gives it, a folder or release/id.
        tests: core, all, or names from `mech-unlearn list tests` with commas.
        calibration: auto (the package's, if it has one for this full model), none, or a file of `calibrate`.
        log: told each step of work.

    Raises:
        ValueError: an unknown test, one that the case does not allow, or a calibration that cannot serve.
    """
    from mech_unlearn.commands.row import measure
    from mech_unlearn.metrics import recall
    from mech_unlearn.restoration import reference

    prepared = prepare_audit(
        full, facts, retain, retrained=retrained, sae=sae, tests=tests, calibration=calibration, seed=seed, log=log,
        texts=texts, unknown=unknown,
    )  # fmt: skip
    case = prepared.case

    def left_out(test: str, why: str) -> None:
        log(f"left out: {test}: {why}")

    return measure(
        reference(case, prepared.tests, left_out if prepared.lenient else None),
        unlearned,
        name=unlearned.name,
        neighbors=case.others,
        texts=case.texts,
        full_neighbor_recall=recall(full, case.others, "prompt", seed) if case.others else None,
        seed=seed,
        calibration=prepared.calibration,
    )


def run_audit(options: AuditOptions) -> dict[str, Any]:
    """Restoration tests and a verdict per fact for one before/after pair, in a run directory.

    `unlearned` is a model, or an edit file of ours to be put on the full model. Without retrained models the evidence
    is of grade B, scores and no verdict on what the outputs lost; without an SAE the mean-difference direction stands
    in for expert latents.

    Raises:
        ValueError: bad input; nothing is written before all of it was read.
    """
    from mech_unlearn.edit.edit import clone
    from mech_unlearn.report.figures import draw_figures
    from mech_unlearn.report.page import write_report

    wanted = named_tests(options.tests)
    asked, kept = load_facts(options.facts), load_facts(options.retain) if options.retain else ()
    given = {"texts": read_lines(options.texts), "unknown": entities(options.unknown, asked)}
    edit = options.unlearned.endswith(".safetensors")
    sources = [options.full, *([] if edit else [options.unlearned]), *options.retrained]
    require_memory(sources, options.dtype, options.device, copies=1 + edit)  # tests act on a clone of the full model
    before = open_model(options.full, options.device, options.dtype)
    with ExitStack() as stack:
        after = open_unlearned(stack, options.unlearned, before, options.device, options.dtype)
        others = tuple(open_model(source, options.device, options.dtype) for source in options.retrained)
        about = hashes(
            asked, kept=kept, sae=options.sae, calibration=options.calibration, full=before, unlearned=after,
            **given, **{f"retrained {k}": model for k, model in enumerate(others)},
        )  # fmt: skip
        log = stack.enter_context(progress(total=8 * (len(wanted) + 1)))
        prepared = prepare_audit(
            before, asked, kept, retrained=others, sae=options.sae, tests=options.tests,
            calibration=options.calibration, seed=options.seed, log=log, **given,
        )  # fmt: skip
        spec = spec_of("audit", options, UNSPECIFIED, tests=list(prepared.tests), hashes=about)
        run = open_run(options.out, spec)
        write_json(run.folder / "provenance.json", provenance(about, options.seed, options.device))
        models = {"full": stack.enter_context(clone(before)), "unlearned": after}
        if len(others) > 1:
            models["retrained"] = others[0]
        cells = prepared.cells(run, models)
    write_json(run.folder / "captions.json", {"note": prepared.note_of(cells)})
    summary = run.finish("audit", None, cells)
    draw_figures(run.folder)
    write_report(run.folder)
    return summary
