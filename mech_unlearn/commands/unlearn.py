"""What the command `unlearn` does on a user's own model and facts, without the printing."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mech_unlearn.commands.inputs import (
    choose,
    entities,
    hashes,
    make_method,
    mentions,
    open_model,
    open_sae,
    prompts_about,
    read_lines,
)
from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.data.jsonl import load_facts
from mech_unlearn.edit.edit import twin
from mech_unlearn.files import write_json
from mech_unlearn.run import open_run, provenance


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
    from mech_unlearn.commands.row import measure_outputs
    from mech_unlearn.edit.edit import Edit
    from mech_unlearn.edit.sequential import fit_sequence, requests
    from mech_unlearn.files import require_empty
    from mech_unlearn.methods import METHODS
    from mech_unlearn.training.around import Around
    from mech_unlearn.training.wrapping import trains

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
