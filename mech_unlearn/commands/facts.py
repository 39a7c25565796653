"""What the command `facts convert` does: facts of a published data set, in files that the other commands read."""

import inspect
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mech_unlearn.commands.inputs import arguments, choose
from mech_unlearn.commands.list import datasets
from mech_unlearn.commands.options import ConvertOptions
from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.data.jsonl import save_facts


def loader(name: str) -> Callable[..., Any]:
    """The loader of a data set that has facts to forget and facts to keep (`sets`).

    Raises:
        ValueError: no such data set, or one without facts; the message lists the nearest that have them, or all.
    """
    from mech_unlearn.data import DATASETS

    quick = DATASETS.get(name)  # without the benchmarks, whose modules take seconds to import
    return quick if quick and _has_sets(quick) else choose(name, _convertible(), "data set with facts")


def _convertible() -> dict[str, Callable[..., Any]]:
    return {name: load for name, load in datasets().items() if _has_sets(load)}


def _has_sets(load: Callable[..., Any]) -> bool:
    return hasattr(inspect.signature(load).return_annotation, "sets")


def run_convert(options: ConvertOptions) -> dict[str, Any]:
    """Read a data set by its loader and write its facts to forget and, where `retain` is given, its facts to keep.

    Raises:
        ValueError: bad input, no fact to write, or a file that is already there; then nothing is written.
    """
    name, out, retain, limit = options.name, options.out, options.retain, options.limit
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more facts, got {limit}")
    load = loader(name)
    for path in (out, retain):
        require_new_file(path, out if path is retain else None)
    drawn = {"seed": options.seed} if "seed" in inspect.signature(load).parameters else {}
    found = load(options.data, **drawn | arguments(load, options.settings, name))
    reasons = Counter(item.reason for item in found.left_out)
    forget, kept = _sets(name, found, reasons)
    if retain is not None and not kept.facts:
        raise ValueError(f"{name} has no fact to keep here: leave --retain out, or choose fewer subjects to forget")
    files = {out: forget.facts} | ({} if retain is None else {retain: kept.facts})
    for path, facts in files.items():
        save_facts(facts[:limit], path)
        reasons["beyond --limit"] += len(facts[limit:]) if limit else 0
    return {
        "dataset": name,
        "data": options.data,
        "facts": len(forget.facts[:limit]),
        "subjects": len({fact.subject for fact in forget.facts[:limit]}),
        "kept": len(kept.facts[:limit]),
        "files": {"forget": str(out), "retain": None if retain is None else str(retain)},
        "left_out": dict((+reasons).most_common()),
    }


def told(result: dict[str, Any]) -> str:
    """The counts in one line, and the command to go on with in another."""
    forget, retain = result["files"]["forget"], result["files"]["retain"]
    kept = f"{result['kept']} to keep " + (f"in {retain}" if retain else "not written (give --retain FILE)")
    left = "; ".join(f"{count} ({reason})" for reason, count in result["left_out"].items()) or "nothing"
    go_on = f"locate --model M --facts {forget} --how causal_trace"
    if retain:
        go_on = f"unlearn --model M --forget {forget} --retain {retain} --method NAME --out DIR"
    return (
        f"{result['facts']} facts about {result['subjects']} subjects in {forget}; {kept}; left out: {left}\n"
        f"next: mech-unlearn {go_on}"
    )


def _sets(name: str, found: Any, reasons: Counter[str]) -> tuple[ForgetSet, RetainSet]:
    try:
        return found.sets
    except ValueError as error:
        why = "; ".join(f"{count} ({reason})" for reason, count in reasons.most_common())
        raise ValueError(f"{name}: {error}" + (f"; left out: {why}" if why else "")) from error


def require_new_file(path: Path | None, other: Path | None = None) -> None:
    """Raises ValueError for a file that is there already, is to be written twice, or cannot be written."""
    if path is None:
        return
    if path.exists() or (other is not None and path.absolute() == other.absolute()):
        raise ValueError(f"output file {str(path)!r} is there already; name another file or remove it")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"output file {str(path)!r} cannot be written: {str(parent)!r} is no folder to write in")
