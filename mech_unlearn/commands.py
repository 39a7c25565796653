"""What the commands on a user's own models and files do, without the printing: locate, unlearn, audit."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mech_unlearn.core import Attribution, Fact, ForgetSet, RetainSet
from mech_unlearn.data.jsonl import load_facts
from mech_unlearn.inputs import (
    choose,
    entities,
    key_values,
    make_method,
    mentions,
    open_model,
    open_sae,
    prompts_about,
    read_lines,
)
from mech_unlearn.run import data_hash, open_run, provenance, write_json

PIECE = 100
"""Facts located at a time; an interrupted run goes on behind the last finished piece."""


def run_locate(
    model: str,
    facts: Path,
    how: str,
    out: Path,
    *,
    settings: Sequence[str],
    unknown: Path | None,
    retain: Path | None,
    texts: Path | None,
    sae: str | None,
    device: str,
    dtype: str,
    seed: int,
) -> Attribution:
    """Run one locator over a facts file; writes locate.json, provenance.json and a figure, and resumes.

    Raises:
        ValueError: an unknown locator or setting, bad input, or an input that the locator needs and was not given.
    """
    from mech_unlearn import plots
    from mech_unlearn.locate import LOCATORS

    locator = choose(how, LOCATORS, "locator")
    wanted = key_values(settings)
    for key in wanted:
        choose(key, dict.fromkeys(locator.settings()), f"setting of {how}")
    known, kept = load_facts(facts), load_facts(retain) if retain else ()
    names = entities(unknown, known[0].kind)
    if how == "known_unknown" and not names:
        raise ValueError("known_unknown compares with entities the model does not know; pass --unknown FILE")
    if how == "sae_latents" and bool(names) == bool(kept):
        raise ValueError("sae_latents compares with unknown entities or retained facts; pass --unknown or --retain")
    passages = read_lines(texts)
    loaded = open_model(model, device, dtype)
    given: dict[str, Any] = {"seed": seed, "others": kept, "retain": kept, "unknown": names, "folder": out / "neurons"}
    given["texts"] = passages or (mentions((*known, *kept)) if how == "tuned_lens" else ())
    if {"sae", "saes"} & set(locator.inputs):
        corpus = (*mentions((*known, *kept)), *prompts_about(names, known), *passages)
        given["sae"] = open_sae(sae, loaded, corpus, seed)
        given["saes"] = (given["sae"],)
    passed = {key: value for key, value in given.items() if key in locator.inputs} | wanted
    spec = {"command": "locate", "model": model, "facts": str(facts), "how": how, "settings": wanted, "seed": seed}
    run = open_run(out, spec | {"unknown": unknown and str(unknown), "retain": retain and str(retain)})
    write_json(run.folder / "provenance.json", provenance(_hashes(known, model=loaded), seed, device))
    result = _locate_in_pieces(run, locator, loaded, known, passed)
    write_json(run.folder / "locate.json", {how: result.to_json()})
    plots.save(run.folder / "figures" / f"{how}.png", lambda ax: plots.draw(result, ax))
    return result


def _locate_in_pieces(run: Any, locator: Any, model: Any, facts: Sequence[Fact], passed: dict[str, Any]) -> Attribution:
    """The locator's result; where it works fact by fact, piece after piece, each kept as soon as it is there."""
    import torch
    from tqdm.auto import tqdm

    from mech_unlearn.locate.average import over_facts
    from mech_unlearn.locate.causal_trace import subject_sigma
    from mech_unlearn.prompts import make_queries

    if locator.per_fact is None:
        return Attribution.from_json(run.cell("all", lambda: locator.run(model, facts, **passed).to_json()))
    if "sigma" in locator.settings():  # one noise level for all pieces
        passed.setdefault("sigma", subject_sigma(model, make_queries(model.tokenizer, facts, "prompt", False)))
    if "others" in passed:  # partners are drawn among all facts
        passed["others"] = (*facts, *passed["others"])
    pieces = []
    starts = range(0, len(facts), PIECE)
    for start in tqdm(starts, desc="locate", unit="piece", disable=len(starts) < 2 or None):
        some = facts[start : start + PIECE]
        cell = run.cell(f"{start // PIECE:06d}", lambda some=some: locator.per_fact(model, some, **passed).to_json())
        pieces.append(Attribution.from_json(cell))
    labels = {**pieces[0].labels, "fact": tuple(fact.id for fact in facts)}
    note = pieces[0].note + (f"; in {len(pieces)} pieces, scores in this note are the first's" if pieces[1:] else "")
    whole = replace(pieces[0], values=torch.cat([p.values for p in pieces]), labels=labels, n=len(facts), note=note)
    return over_facts(whole, facts)


def _hashes(facts: Sequence[Fact], **models: Any) -> dict[str, str]:
    return {"facts": data_hash(facts)} | {name: model.hash() for name, model in models.items()}


def run_unlearn(
    model: str,
    forget: Path,
    retain: Path,
    method: str,
    out: Path,
    *,
    settings: Sequence[str],
    unknown: Path | None,
    texts: Path | None,
    sae: str | None,
    device: str,
    dtype: str,
    seed: int,
    sequential: int | None = None,
) -> dict[str, Any]:
    """Fit one method, save its edit and, where weights can hold it, export the edited model with a parity proof.

    A method that trains keeps a checkpoint in `out` while it does; the same call goes on from it.

    Args:
        sequential: entities per request, fitted one request after another; None fits all at once.

    Raises:
        ValueError: bad input; nothing is written before all of it was read.
    """
    from mech_unlearn.edit import require_empty
    from mech_unlearn.methods import METHODS
    from mech_unlearn.methods.objective import Around
    from mech_unlearn.methods.sequential import fit_sequence, requests
    from mech_unlearn.methods.wrapping import trains
    from mech_unlearn.rows import measure_outputs

    kind = choose(method, METHODS, "method")
    checkpoint = out / "checkpoint.safetensors"
    if sequential or not out.is_dir() or {path.name for path in out.iterdir()} != {checkpoint.name}:
        require_empty(out)
    forgotten, kept = load_facts(forget), load_facts(retain)
    subjects = {fact.subject for fact in forgotten}
    retain_set = RetainSet(
        neighbors=tuple(fact for fact in kept if fact.subject not in subjects),
        same_subject=tuple(fact for fact in kept if fact.subject in subjects),
        texts=read_lines(texts) or mentions(kept),
        unknown=entities(unknown, forgotten[0].kind),
    )
    forget_set = ForgetSet(facts=forgotten)
    parts = () if sequential is None else requests(forget_set, sequential)
    needs_sae = "sae" in {f.name for f in fields(kind)}
    if not needs_sae:
        make_method(method, settings, seed)  # a misspelt setting is refused before the model is loaded
    loaded = open_model(model, device, dtype)
    given: dict[str, Any] = {}
    if needs_sae:
        corpus = (*mentions((*forgotten, *kept)), *prompts_about(retain_set.unknown, forgotten), *retain_set.texts)
        given = {"sae": open_sae(sae, loaded, corpus, seed)}
    made = make_method(method, settings, seed, **given)
    if parts:
        edit = fit_sequence(made, loaded, parts, retain_set)
    elif trains(made):
        edit = made.fit(loaded, forget_set, retain_set, around=Around(checkpoint=checkpoint))
    else:
        edit = made.fit(loaded, forget_set, retain_set)

    def outputs(of: Any) -> dict[str, Any]:
        return measure_outputs(loaded, of, forgotten, retain_set.neighbors, retain_set.texts, seed).to_json()

    before = outputs(loaded)
    with _twin(loaded, edit) as twin:
        after = outputs(twin)
    result: dict[str, Any] = {"method": method, "recipe": dict(edit.recipe), "before": before, "after": after}
    hashes = _hashes((*forgotten, *kept), model=loaded)
    out.mkdir(parents=True, exist_ok=True)
    edit.save(out / "edit.safetensors")
    result["files"] = ["edit.safetensors", "unlearn.json"]
    if edit.interventions:
        result["parity"] = None
    else:
        card = {"data": hashes["facts"], "measurements": {"before": before, "after": after}, "verdict": "not audited"}
        worst, bound = edit.export(loaded, out / "model", card)
        result["parity"] = {"max_abs_logit_difference": worst, "bound": bound}
        result["files"].append("model/")
    write_json(out / "provenance.json", provenance(hashes, seed, device))
    write_json(out / "unlearn.json", result)
    return result


@contextmanager
def _twin(model: Any, edit: Any) -> Iterator[Any]:
    """A second model with the edit in force, beside the untouched one."""
    from mech_unlearn.edit import clone

    with clone(model) as copy, edit.on(copy):
        yield copy


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
            after = stack.enter_context(_twin(before, edit))
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
            write_json(run.folder / "provenance.json", provenance(_hashes(asked, **models), seed, device))
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
    from mech_unlearn.testbed.pools import Materials, cells, make_pools, read_pool

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
