"""The verb `unlearn`, and what the command of that name does with files, without the printing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mech_unlearn.commands.inputs import (
    choose,
    entities,
    hashes,
    key_values,
    make_method,
    mentions,
    open_model,
    open_sae,
    prompts_about,
    read_lines,
    require_memory,
)
from mech_unlearn.commands.options import UnlearnOptions, spec_of
from mech_unlearn.commands.unknown import find_unknown, told
from mech_unlearn.core import Entity, Fact, ForgetSet, RetainSet, require_disjoint
from mech_unlearn.data.jsonl import load_facts
from mech_unlearn.edit.edit import Edit, twin
from mech_unlearn.files import require_empty, write_json
from mech_unlearn.run import open_run, provenance

STUCK, DRIFT, LOSS = 0.8, 0.1, 0.1
"""Share of the forget recall that is left, nats per token of unseen text, and recall of unseen neighbours lost, beyond
which an edit is said to have failed or done harm."""
CHECKPOINT, SAVED, RESULT = "checkpoint.safetensors", "edit.safetensors", "unlearn.json"


def unlearn(
    model: Any,
    forget: ForgetSet | Sequence[Fact],
    retain: RetainSet | Sequence[Fact] = (),
    method: str = "rocr",
    *,
    unknown: Sequence[Entity] = (),
    texts: Sequence[str] = (),
    sae: Any = None,
    sequential: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Edit:
    """Fit a removal method: the edit that makes the model forget. The model is left bit-identical.

    Args:
        model: as `load` gives it.
        forget: facts to forget.
        retain: facts to keep; those about forgotten subjects count as `same_subject`, the others as `neighbors`.
        method: one of `mech-unlearn list methods`.
        unknown: entities that the model knows nothing about; `retain` as a `RetainSet` has its own. Where a method asks
            for some and there are none, names are made up and measured (`find_unknown`); the edit's recipe has them.
        texts: running text to keep; without any, the kept facts written out.
        sae: as `load_sae` gives it, a folder or release/id; trained where a method reads one and none is given.
        sequential: entities per request, fitted one request after another; None fits all at once.
        settings: settings of the method, with dots for those inside (`**{"base.lr": 1e-4}`).

    Raises:
        ValueError: an unknown method or setting, or what the method refuses.
    """
    forget_set = forget if isinstance(forget, ForgetSet) else ForgetSet(facts=tuple(forget))
    kept = retain.facts if isinstance(retain, RetainSet) else tuple(retain)
    if not isinstance(retain, RetainSet):
        retain = retain_set(forget_set.facts, kept, texts, unknown)
    require_disjoint(forget_set, retain)
    choose_method(method, settings, seed)

    def fit(given: RetainSet) -> Edit:
        return _fit(_made(method, settings, seed, model, forget_set, given, sae), model, forget_set, given, sequential)

    return _with_unknown(fit, model, forget_set, retain, seed)


def retain_set(
    forgotten: Sequence[Fact], kept: Sequence[Fact], texts: Sequence[str], unknown: Sequence[Entity]
) -> RetainSet:
    """What is kept, told apart by whether it is about a forgotten subject; kept facts written out stand for texts."""
    subjects = {fact.subject for fact in forgotten}
    return RetainSet(
        neighbors=tuple(fact for fact in kept if fact.subject not in subjects),
        same_subject=tuple(fact for fact in kept if fact.subject in subjects),
        texts=tuple(texts) or mentions(kept),
        unknown=tuple(unknown),
    )


def choose_method(name: str, settings: Mapping[str, Any], seed: int) -> Any:
    """The class of a method, for which these are settings: a misspelt one is refused before a model is loaded.

    Raises:
        ValueError: unknown method or setting.
    """
    from mech_unlearn.methods import METHODS

    kind = choose(name, METHODS, "method")
    if not _reads_sae(kind):
        make_method(name, settings, seed)
    return kind


def _with_unknown(
    fit: Callable[[RetainSet], Edit], model: Any, forget: ForgetSet, retain: RetainSet, seed: int
) -> Edit:
    """What `fit` gives; where it asks for unknown names and there are none, with made-up ones, told in the recipe."""
    from mech_unlearn.methods.writing.anchors import LacksUnknown

    try:
        return fit(retain)
    except LacksUnknown:
        if retain.unknown:
            raise
    found = find_unknown(model, forget.facts, retain.facts, seed=seed)
    edit = fit(replace(retain, unknown=tuple(entity for some in found for entity in some.entities)))
    return replace(edit, recipe={**edit.recipe, "unknown": [some.to_json() for some in found]})


def _reads_sae(kind: Any) -> bool:
    return "sae" in {field.name for field in fields(kind)}


def _made(
    name: str,
    settings: Mapping[str, Any],
    seed: int,
    model: Any,
    forget: ForgetSet,
    retain: RetainSet,
    sae: Any,
) -> Any:
    """The method with its settings; an SAE is opened, or trained on all facts written out, for one that reads it."""
    from mech_unlearn.methods import METHODS

    if not _reads_sae(METHODS[name]):
        return make_method(name, settings, seed)
    if sae is None or isinstance(sae, str):
        written = (*mentions((*forget.facts, *retain.facts)), *prompts_about(retain.unknown, forget.facts))
        sae = open_sae(sae, model, (*written, *retain.texts), seed)
    return make_method(name, settings, seed, sae=sae)


def _fit(
    method: Any,
    model: Any,
    forget: ForgetSet,
    retain: RetainSet,
    sequential: int | None,
    checkpoint: Path | None = None,
) -> Edit:
    """The method's edit, of one request after another where `sequential` says how many entities each has."""
    from mech_unlearn.edit.sequential import fit_sequence, requests
    from mech_unlearn.training.around import Around
    from mech_unlearn.training.wrapping import trains

    if sequential is not None:
        return fit_sequence(method, model, requests(forget, sequential), retain)
    if checkpoint is not None and trains(method):
        return method.fit(model, forget, retain, around=Around(checkpoint=checkpoint))
    return method.fit(model, forget, retain)


def run_unlearn(options: UnlearnOptions) -> dict[str, Any]:
    """Fit one method, save its edit and, where weights can hold it, export the edited model with a parity proof.

    A method that trains keeps a checkpoint in the folder while it does, and the edit is saved as soon as it is fitted;
    the same call goes on from there, until unlearn.json is written.

    Raises:
        ValueError: bad input, or a folder with something else in it; nothing is written before all of it was read.
    """
    out, settings = options.out, key_values(options.settings)
    kind = choose_method(options.method, settings, options.seed)
    begun = _begun(out, kind, options.sequential)
    forgotten, kept = load_facts(options.forget), load_facts(options.retain)
    forget, texts = ForgetSet(facts=forgotten), read_lines(options.texts)
    given = retain_set(forgotten, kept, texts, entities(options.unknown, forgotten))
    require_disjoint(forget, given)
    retain, unseen = given.split(options.unseen, options.seed)
    if not texts:  # kept facts written out are no general text, and an unseen one must not be read by the method
        retain, unseen = replace(retain, texts=mentions(retain.facts)), replace(unseen, texts=())
    require_memory([options.model], options.dtype, options.device, copies=1)  # the edited twin
    model = open_model(options.model, options.device, options.dtype)
    about = hashes((*forgotten, *kept), kept=kept, texts=texts, unknown=retain.unknown, sae=options.sae, model=model)
    spec = spec_of("unlearn", options, hashes=about)
    if begun:
        open_run(out, spec)
    edit = Edit.load(out / SAVED, model) if begun and (out / SAVED).is_file() else None
    kept_apart = Kept(seen=retain, unseen=unseen, general=bool(texts))
    before = _outputs(model, model, forget, kept_apart, options.seed)
    if edit is None:

        def fit(given: RetainSet) -> Edit:
            made = _made(options.method, settings, options.seed, model, forget, given, options.sae)
            return _fit(made, model, forget, given, options.sequential, out / CHECKPOINT)

        edit = _with_unknown(fit, model, forget, retain, options.seed)
        open_run(out, spec)
        edit.save(out / SAVED)
    with twin(model, edit) as edited:
        after = _outputs(model, edited, forget, kept_apart, options.seed)
    write_json(out / "provenance.json", provenance(about, options.seed, options.device))
    result = {"method": options.method, "recipe": dict(edit.recipe), "before": before, "after": after}
    result["notes"] = [*map(told, edit.recipe.get("unknown", ())), *notes(before, after)]
    result |= _export(edit, model, out, {"data": about["facts"], "measurements": {"before": before, "after": after}})
    write_json(out / RESULT, result)
    return result


def _begun(out: Path, kind: Any, sequential: int | None) -> bool:
    """Whether the folder holds a run that was interrupted behind its spec.

    Raises:
        ValueError: it holds something else, but for the checkpoint of a method that trains.
    """
    from mech_unlearn.training.wrapping import trains

    begun = (out / "spec.yaml").is_file() and not (out / RESULT).exists()
    training = out.is_dir() and [path.name for path in out.iterdir()] == [CHECKPOINT]
    if not begun and not (training and trains(kind) and not sequential):
        require_empty(out)
    return begun


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is kept, and what of it a method was not shown."""

    seen: RetainSet
    unseen: RetainSet
    general: bool
    """Whether the texts are running text that was given, and not kept facts written out."""


def _outputs(full: Any, model: Any, forget: ForgetSet, kept: Kept, seed: int) -> dict[str, Any]:
    """What outputs say: recall of unseen neighbours and drift on unseen texts, those of the seen under `seen`."""
    from mech_unlearn.commands.row import measure_outputs

    def said(part: RetainSet) -> dict[str, Any]:
        texts = part.texts if kept.general else ()
        return measure_outputs(full, model, forget.facts, part.neighbors, texts, seed).to_json(seed)

    seen, unseen = said(kept.seen), said(kept.unseen)
    return unseen | {"seen": {name: seen[name] for name in ("neighbor_recall", "general_kl")}}


def notes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What an edit did that nobody wants: it moved nothing, or more than it was to. One line each."""
    said = []
    old, new = before["forget_recall"]["value"], after["forget_recall"]["value"]
    if old > 0 and new > STUCK * old:
        said.append(
            f"forget recall hardly moved ({old:.2f} -> {new:.2f}): train longer or faster, or change --set layers="
        )
    if (drift := after["general_kl"]) and drift["value"] > DRIFT:
        said.append(f"unseen text drifted by {drift['value']:.2f} nats: take smaller steps or a smaller scale")
    kept, left = before["neighbor_recall"], after["neighbor_recall"]
    if kept and left and kept["value"] - left["value"] > LOSS:
        said.append(f"unseen neighbours lost {kept['value'] - left['value']:.2f} of their recall: keep more facts")
    return said


def _export(edit: Edit, model: Any, out: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """Parity of the exported folder (None where no weights can hold the edit), and the files that were made."""
    if edit.interventions:
        return {"parity": None, "files": [SAVED, RESULT]}
    worst, bound = edit.export(model, out / "model", {**card, "verdict": "not audited"})
    return {
        "parity": {"max_abs_logit_difference": worst, "bound": bound},
        "files": [SAVED, RESULT, "model/"],
    }
