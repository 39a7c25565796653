"""What the commands on a user's own models and files do, without the printing: locate and unlearn."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mech_unlearn.core import Attribution, Entity, Fact, ForgetSet, RetainSet
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
from mech_unlearn.run import data_hash, files_hash, open_run, provenance, write_json

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
        ValueError: an unknown locator or setting, bad input, an input that the locator needs and was not given, or a
            folder that holds a run of something else, be it the same files with other contents.
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
    about = hashes(known, kept=kept, texts=passages, unknown=names, sae=sae, model=loaded)
    spec = {"command": "locate", "model": model, "facts": str(facts), "how": how, "settings": wanted, "seed": seed}
    spec |= {"unknown": unknown and str(unknown), "retain": retain and str(retain), "texts": texts and str(texts)}
    run = open_run(out, spec | {"sae": sae, "device": device, "dtype": dtype, "hashes": about})
    write_json(run.folder / "provenance.json", provenance(about, seed, device))
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


def hashes(
    facts: Sequence[Fact],
    *,
    kept: Sequence[Fact] = (),
    texts: Sequence[str] = (),
    unknown: Sequence[Entity] = (),
    sae: str | None = None,
    calibration: str | None = None,
    **models: Any,
) -> dict[str, str]:
    """What a run's numbers come from, by hash, for its spec and its provenance; only what is given is named.

    Facts, texts and names count as they were read, an SAE and a calibration by the contents of their files (a release's
    name stands in the spec), a model by its weights and the interventions in force on it.
    """
    from mech_unlearn.methods.key_statistics import state_hash

    found = {"facts": data_hash(facts)} | ({"kept": data_hash(kept)} if kept else {})
    for name, lines in (("texts", texts), ("unknown", [entity.name for entity in unknown])):
        found |= {name: hashlib.sha256("\n".join(lines).encode()).hexdigest()} if lines else {}
    files = {"sae": sae, "calibration": calibration}
    found |= {name: files_hash(source) for name, source in files.items() if source and Path(source).exists()}
    return found | {name: state_hash(model) for name, model in models.items()}


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

    A method that trains keeps a checkpoint in `out` while it does, and the edit is saved as soon as it is fitted; the
    same call goes on from there, until unlearn.json is written.

    Args:
        sequential: entities per request, fitted one request after another; None fits all at once.

    Raises:
        ValueError: bad input, or a folder with something else in it; nothing is written before all of it was read.
    """
    from mech_unlearn.edit import Edit, require_empty
    from mech_unlearn.methods import METHODS
    from mech_unlearn.methods.objective import Around
    from mech_unlearn.methods.sequential import fit_sequence, requests
    from mech_unlearn.methods.wrapping import trains
    from mech_unlearn.rows import measure_outputs

    kind = choose(method, METHODS, "method")
    checkpoint, saved = out / "checkpoint.safetensors", out / "edit.safetensors"
    begun = (out / "spec.yaml").is_file() and not (out / "unlearn.json").exists()
    training = out.is_dir() and [path.name for path in out.iterdir()] == [checkpoint.name]
    if not begun and not (training and trains(kind) and not sequential):
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
    about = hashes(
        (*forgotten, *kept), kept=kept, texts=retain_set.texts, unknown=retain_set.unknown, sae=sae, model=loaded
    )
    spec = {"command": "unlearn", "model": model, "forget": str(forget), "retain": str(retain), "method": method}
    spec |= {"settings": list(settings), "sequential": sequential, "sae": sae, "seed": seed}
    spec |= {"unknown": unknown and str(unknown), "texts": texts and str(texts)}
    spec |= {"device": device, "dtype": dtype, "hashes": about}
    if begun:
        open_run(out, spec)
    edit = Edit.load(saved, loaded) if begun and saved.is_file() else None
    made: Any = None
    if edit is None:
        given: dict[str, Any] = {}
        if needs_sae:
            corpus = (*mentions((*forgotten, *kept)), *prompts_about(retain_set.unknown, forgotten), *retain_set.texts)
            given = {"sae": open_sae(sae, loaded, corpus, seed)}
        made = make_method(method, settings, seed, **given)

    def outputs(of: Any) -> dict[str, Any]:
        return measure_outputs(loaded, of, forgotten, retain_set.neighbors, retain_set.texts, seed).to_json(seed)

    before = outputs(loaded)
    if edit is None:
        if parts:
            edit = fit_sequence(made, loaded, parts, retain_set)
        elif trains(made):
            edit = made.fit(loaded, forget_set, retain_set, around=Around(checkpoint=checkpoint))
        else:
            edit = made.fit(loaded, forget_set, retain_set)
        open_run(out, spec)
        edit.save(saved)
    with twin(loaded, edit) as edited:
        after = outputs(edited)
    result: dict[str, Any] = {"method": method, "recipe": dict(edit.recipe), "before": before, "after": after}
    result["files"] = [saved.name, "unlearn.json"]
    write_json(out / "provenance.json", provenance(about, seed, device))
    if edit.interventions:
        result["parity"] = None
    else:
        card = {"data": about["facts"], "measurements": {"before": before, "after": after}, "verdict": "not audited"}
        worst, bound = edit.export(loaded, out / "model", card)
        result["parity"] = {"max_abs_logit_difference": worst, "bound": bound}
        result["files"].append("model/")
    write_json(out / "unlearn.json", result)
    return result


@contextmanager
def twin(model: Any, edit: Any) -> Iterator[Any]:
    """A second model with the edit in force, beside the untouched one."""
    from mech_unlearn.edit import clone

    with clone(model) as copy, edit.on(copy):
        yield copy
