"""The verb `locate`, and what the command of that name does with files, without the printing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mech_unlearn import attribution
from mech_unlearn.attribution import Attribution
from mech_unlearn.commands.inputs import (
    choose,
    entities,
    hashes,
    mentions,
    open_model,
    open_sae,
    plain,
    prompts_about,
    read_lines,
    typed,
)
from mech_unlearn.commands.options import LocateOptions, spec_of
from mech_unlearn.commands.unknown import find_unknown
from mech_unlearn.core import Entity, Fact
from mech_unlearn.data.jsonl import load_facts
from mech_unlearn.files import write_json
from mech_unlearn.run import open_run, provenance

PIECE = 100
"""Facts located at a time; an interrupted run goes on behind the last finished piece."""


def locate(
    model: Any,
    facts: Sequence[Fact],
    how: str = "causal_trace",
    *,
    retain: Sequence[Fact] = (),
    unknown: Sequence[Entity] = (),
    texts: Sequence[str] = (),
    sae: Any = None,
    seed: int = 0,
    **settings: Any,
) -> Attribution:
    """Where a model keeps facts: one of `mech-unlearn list locators`, with what it needs found among the arguments.

    Args:
        model: as `load` gives it.
        retain: other facts: what to compare with, partners for patching.
        unknown: entities that the model knows nothing about; made up where `known_unknown` is given none.
        texts: running text.
        sae: as `load_sae` gives it, a folder or release/id; trained on the facts written out where a locator reads one
            and none is given.
        settings: of the locator, as `inspect.signature(LOCATORS[how].run)` shows them.

    Raises:
        ValueError: an unknown locator or setting, or an input that the locator needs and was not given.
    """
    locator = chosen(how)
    for key in settings:
        choose(key, locator.settings(), f"setting of {how}")
    _require_inputs(how, unknown, retain)
    unknown, note = _unknown(how, model, facts, retain, unknown, seed)
    found = _inputs(locator, model, facts, retain=retain, unknown=unknown, texts=texts, sae=sae, seed=seed)
    result = locator.run(model, facts, **found, **settings)
    return replace(result, note=result.note + note)


def chosen(how: str) -> Any:
    """The locator of that name.

    Raises:
        ValueError: an unknown one; the message lists the nearest.
    """
    from mech_unlearn.locate import LOCATORS

    return choose(how, LOCATORS, "locator")


def run_locate(options: LocateOptions) -> Attribution:
    """Run one locator over a facts file; writes locate.json, provenance.json and a figure, and resumes.

    Raises:
        ValueError: an unknown locator or setting, bad input, an input that the locator needs and was not given, or a
            folder that holds a run of something else, be it the same files with other contents.
    """
    locator = chosen(options.how)
    written = {key: p.annotation for key, p in locator.settings().items() if plain(p.annotation)}
    wanted = typed(written, options.settings, options.how)
    facts, kept = load_facts(options.facts), load_facts(options.retain) if options.retain else ()
    unknown, passages = entities(options.unknown, facts), read_lines(options.texts)
    _require_inputs(options.how, unknown, kept)
    model = open_model(options.model, options.device, options.dtype)
    about = hashes(facts, kept=kept, texts=passages, unknown=unknown, sae=options.sae, model=model)
    unknown, note = _unknown(options.how, model, facts, kept, unknown, options.seed)
    found = _inputs(
        locator, model, facts, retain=kept, unknown=unknown, texts=passages, sae=options.sae, seed=options.seed,
        folder=options.out / "neurons",
    )  # fmt: skip
    run = open_run(options.out, spec_of("locate", options, settings=wanted, hashes=about))
    write_json(run.folder / "provenance.json", provenance(about, options.seed, options.device))
    result = _locate_in_pieces(run, locator, model, facts, found | wanted)
    result = replace(result, note=result.note + note)
    write_json(run.folder / "locate.json", {options.how: result.to_json()})
    attribution.save(run.folder / "figures" / f"{options.how}.png", lambda ax: attribution.draw(result, ax))
    return result


def _unknown(
    how: str, model: Any, facts: Sequence[Fact], kept: Sequence[Fact], unknown: Sequence[Entity], seed: int
) -> tuple[Sequence[Entity], str]:
    """(Names that the model does not know, made up where a locator compares with some and none were given; the note of
    what was taken)."""
    if unknown or how != "known_unknown":
        return unknown, ""
    found = find_unknown(model, facts, kept, seed=seed)
    return [entity for some in found for entity in some.entities], "".join(f"; {some}" for some in found)


def _require_inputs(how: str, unknown: Sequence[Entity], retain: Sequence[Fact]) -> None:
    if how == "sae_latents" and bool(unknown) == bool(retain):
        raise ValueError("sae_latents compares with unknown entities or retained facts; pass --unknown or --retain")


def _inputs(
    locator: Any,
    model: Any,
    facts: Sequence[Fact],
    *,
    retain: Sequence[Fact],
    unknown: Sequence[Entity],
    texts: Sequence[str],
    sae: Any,
    seed: int,
    folder: Path | None = None,
) -> dict[str, Any]:
    """What a locator asks for beside model and facts; an SAE is opened or trained only for one that reads it."""
    from mech_unlearn.locate import LOCATORS

    written = mentions((*facts, *retain))
    given: dict[str, Any] = {"seed": seed, "others": retain, "retain": retain, "unknown": unknown, "folder": folder}
    given["texts"] = texts or (written if locator is LOCATORS["tuned_lens"] else ())
    if {"sae", "saes"} & set(locator.inputs):
        if sae is None or isinstance(sae, str):
            sae = open_sae(sae, model, (*written, *prompts_about(unknown, facts), *texts), seed)
        given |= {"sae": sae, "saes": (sae,)}
    return {key: value for key, value in given.items() if key in locator.inputs}


def _locate_in_pieces(run: Any, locator: Any, model: Any, facts: Sequence[Fact], passed: dict[str, Any]) -> Attribution:
    """The locator's result; where it works fact by fact, piece after piece, each kept as soon as it is there."""
    import torch
    from tqdm.auto import tqdm

    from mech_unlearn.locate.patching.causal_trace import subject_sigma
    from mech_unlearn.model.tokens import make_queries

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
    return whole.mean(facts)
