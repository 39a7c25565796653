"""What the command `locate` does on a user's own model and facts, without the printing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mech_unlearn.attribution import Attribution
from mech_unlearn.commands.inputs import (
    choose,
    entities,
    hashes,
    key_values,
    mentions,
    open_model,
    open_sae,
    prompts_about,
    read_lines,
)
from mech_unlearn.core import Fact
from mech_unlearn.data.jsonl import load_facts
from mech_unlearn.files import write_json
from mech_unlearn.run import open_run, provenance

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
    from mech_unlearn import attribution
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
    attribution.save(run.folder / "figures" / f"{how}.png", lambda ax: attribution.draw(result, ax))
    return result


def _locate_in_pieces(run: Any, locator: Any, model: Any, facts: Sequence[Fact], passed: dict[str, Any]) -> Attribution:
    """The locator's result; where it works fact by fact, piece after piece, each kept as soon as it is there."""
    import torch
    from tqdm.auto import tqdm

    from mech_unlearn.attribution import over_facts
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
    return over_facts(whole, facts)
