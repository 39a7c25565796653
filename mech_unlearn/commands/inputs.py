"""What a user hands to the command line, read and checked: models, settings, SAEs, names, text.

Over 300 lines, because all commands read the same things, and settings of methods nest.
"""

import ast
import difflib
import hashlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from mech_unlearn.core import Entity, Fact, Site
from mech_unlearn.files import files_hash, read_text
from mech_unlearn.run import data_hash
from mech_unlearn.training.schedule import Schedule

DTYPES = ("float32", "bfloat16", "float16")


def open_model(source: str, device: str, dtype: str) -> Any:
    """The model of a hub id or folder on a named device and dtype.

    Raises:
        ValueError: an unknown dtype, a device this machine lacks, or what `load` refuses.
    """
    import torch

    from mech_unlearn.model.load import load

    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return load(source, device=device, dtype=getattr(torch, dtype))


def require_memory(sources: Sequence[str], dtype: str, device: str, copies: int = 0) -> None:
    """Say on stderr what the models of these sources take, and refuse more than the machine has.

    Only weights are counted, and only models whose size the heads of their files tell; the first has `copies` more.

    Raises:
        ValueError: on the CPU, more than the machine's memory.
    """
    from mech_unlearn.model.checkpoint import parameters

    sizes, each = [parameters(source) or 0 for source in sources], 2 if dtype in ("bfloat16", "float16") else 4
    needed = each * (sum(sizes) + copies * sizes[0]) / 2**30
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    told = f"{len(sources) + copies} models in {dtype} take {needed:.1f} GiB"
    if device.startswith("cpu") and needed > there:
        mend = "give fewer models" if each == 2 else "use --dtype bfloat16, or give fewer models"
        raise ValueError(f"{told}, this machine has {there:.1f} GiB: {mend}")
    print(told, file=sys.stderr)


def read_lines(path: Path | None) -> tuple[str, ...]:
    """The non-empty lines of a text file without the white space around them; none without a file.

    Raises:
        ValueError: a file that is not there, empty, or not UTF-8 text.
    """
    if path is None:
        return ()
    lines = tuple(line.strip() for line in read_text(path).split("\n") if line.strip())
    if not lines:
        raise ValueError(f"file {str(path)!r} is empty")
    return lines


def choose(name: str, options: Mapping[str, Any], what: str) -> Any:
    """The option of that name.

    Raises:
        ValueError: there is none; the message lists the nearest, or all.
    """
    if name not in options:
        near = difflib.get_close_matches(name, options, n=3) or list(options)
        raise ValueError(f"unknown {what} {name!r}; choose from {', '.join(near)}")
    return options[name]


def key_values(settings: Sequence[str]) -> dict[str, Any]:
    """`key=value` strings as a dict, the last of each key; a value is a Python literal, else the text itself.

    Raises:
        ValueError: a string without an equals sign.
    """
    values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"setting {setting!r} is not of the form key=value")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            values[key] = text
    return values


def typed(kinds: Mapping[str, Any], settings: Sequence[str], name: str) -> dict[str, Any]:
    """`key=value` settings of what is named, each as its type in `kinds`.

    Raises:
        ValueError: unknown setting (the message lists the nearest), or a value of another type.
    """
    return {
        key: _parsed(choose(key, kinds, f"setting of {name}"), value, key, name)
        for key, value in key_values(settings).items()
    }


def arguments(function: Callable[..., Any], settings: Sequence[str], name: str, without: Sequence[str] = ()) -> Any:
    """Arguments of a function from `key=value` settings, each as the type its parameter has, in `without` none.

    The first parameter is never a setting. Where a list of texts is wanted, one text is a list of it alone.

    Raises:
        ValueError: unknown setting (the message lists the nearest), or a value of another type.
    """
    known = {key: found.annotation for key, found in list(inspect.signature(function).parameters.items())[1:]}
    return typed({key: kind for key, kind in known.items() if key not in without}, settings, name)


def make_method(name: str, settings: Mapping[str, Any], seed: int, **given: Any) -> Any:
    """A removal method from its settings, each checked against the type its field has.

    Dots reach into a field that has settings of its own: base.lr=1e-3, base.base.epochs=2, optimize.steps=20; those of
    the `schedule` of a method that trains need none: lr=1e-3. The base of a method that wraps another is named,
    base=npo, and takes the same seed.

    Raises:
        ValueError: unknown method or setting, or a value of another type.
    """
    from mech_unlearn.methods import METHODS

    return _made(choose(name, METHODS, "method"), name, settings, seed, given)


def _made(
    kind: Any, name: str, values: Mapping[str, Any], seed: int, given: Mapping[str, Any], prefix: str = ""
) -> Any:
    """A method from its settings; keys in messages carry the prefix that leads to them."""
    types = {f.name: f.type for f in fields(kind)}
    made = {key: value for key, value in {"seed": seed, **given}.items() if key in types}
    inner: dict[str, dict[str, Any]] = {"base": {}} if "base" in types else {}
    rates = {f.name: f.type for f in fields(Schedule)} if "schedule" in types else {}
    own = {prefix + k: k for k in types if k not in given}
    scheduled: dict[str, Any] = {}
    for key, value in values.items():
        key = key.removeprefix("schedule.") if rates else key
        head, dot, rest = key.partition(".")
        known = own | {prefix + k: k for k in rates}
        here = choose(prefix + (head if prefix + head in own else key), known, f"setting of {name}")
        if dot or here == "base":
            inner.setdefault(here, {})[rest] = value
        else:
            into, kinds = (scheduled, rates) if here in rates else (made, types)
            into[here] = _parsed(kinds[here], value, f"{prefix}{key}", name)
    if scheduled:
        made["schedule"] = replace(made.get("schedule", kind.schedule), **scheduled)
    for head, some in inner.items():
        made[head] = _inner(kind, name, head, some, seed, f"{prefix}{head}.")
    if lacks := [key for key in _needs(kind) if key not in made]:
        raise ValueError(f"method {name} needs {', '.join(lacks)}, which no setting can give")
    return kind(**made)


def _inner(kind: Any, name: str, head: str, values: dict[str, Any], seed: int, prefix: str) -> Any:
    """The value of a field that has settings of its own: a wrapped method, or a dataclass."""
    from mech_unlearn.methods import METHODS
    from mech_unlearn.training.wrapping import trains

    default = next(
        f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else None
        for f in fields(kind)
        if f.name == head
    )
    if head == "base":
        usual = next(key for key, method in METHODS.items() if type(default) is method)
        chosen = str(values.pop("", usual))
        wrapped = choose(chosen, {k: m for k, m in METHODS.items() if trains(m) and not _needs(m)}, f"base of {name}")
        return _made(wrapped, chosen, values, seed, {}, prefix)
    if not is_dataclass(default):
        raise ValueError(f"setting {prefix}{next(iter(values))} of {name}: {head} has no settings of its own")
    types = {prefix + f.name: f.type for f in fields(default)}
    parsed = {}
    for key, value in values.items():
        wanted = choose(prefix + key, types, f"setting of {name}")
        parsed[key] = _parsed(wanted, value, prefix + key, name)
    return replace(default, **parsed)  # pyright: ignore[reportArgumentType]


def _needs(kind: Any) -> list[str]:
    """Fields without a default, which no setting can give."""
    return [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]


def plain(kind: Any) -> bool:
    """Whether values of a type can be written in a setting: numbers, texts, choices, and lists or mappings of such."""
    if get_origin(kind) is Literal or kind in (bool, int, float, str, os.PathLike, type(None), ...):
        return True
    of = (Union, UnionType, tuple, Iterable, Sequence, Mapping)
    return get_origin(kind) in of and all(map(plain, get_args(kind)))


def _parsed(kind: Any, value: Any, key: str, name: str) -> Any:
    """A setting as its type; where a list of texts is wanted, one text is a list of it alone."""
    from pydantic import TypeAdapter, ValidationError

    if not plain(kind):
        if isinstance(value, kind):
            return value
        raise ValueError(f"setting {key} of {name} cannot be written as one value; set what is in it, {key}.NAME=VALUE")
    wanted = TypeAdapter(kind)
    try:
        return _finite(wanted.validate_python(value), key, name)
    except ValidationError as error:
        if isinstance(value, str):
            with suppress(ValidationError):
                return wanted.validate_python([value])
        raise ValueError(f"setting {key}={value} of {name}: {error.errors()[0]['msg']}") from error


def _finite(value: Any, key: str, name: str) -> Any:
    """The value, in which no number is NaN or infinite."""
    for item in value if isinstance(value, tuple | list) else ():
        _finite(item, key, name)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"setting {key}={value} of {name} must be a finite number")
    return value


def default_site(model: Any) -> Site:
    """Where an SAE is trained when none is given: a third of the way up, where subjects are enriched.

    Source: arXiv 2304.14767 (early to middle layers); any layer can be had by training one and passing it.
    """
    return Site(max(1, round(model.n_layers / 3) - 1), "resid_post")


def open_sae(source: str | None, model: Any, texts: Sequence[str], seed: int) -> Any:
    """The SAE at that place, or one trained on the texts when none is given.

    Raises:
        ValueError: none given and fewer than 50 texts to train on.
    """
    from mech_unlearn.model.latents import load_sae
    from mech_unlearn.model.sae_training import train_sae

    if source is not None:
        return load_sae(source, model)
    if len(texts) < 50:
        raise ValueError(f"no SAE given and only {len(texts)} texts to train one on; pass --sae or more --texts")
    width = model.d_model
    d_sae = 16 * width if width <= 256 else 8 * width
    return train_sae(model, texts, default_site(model), d_sae=d_sae, k=min(32, width // 2), seed=seed)


def mentions(facts: Sequence[Fact]) -> tuple[str, ...]:
    """The facts written out as sentences: text to train an SAE on."""
    return tuple(dict.fromkeys(f.stated(t) for f in facts for t in f.templates))


def entities(path: Path | None, facts: Sequence[Fact]) -> tuple[Entity, ...]:
    """Entities from a file of names, one per line, of the kind that the facts are about or of one behind a tab; lines
    that begin with # are comments.

    Raises:
        ValueError: a line of a facts file, no kind behind a tab where the facts are about several kinds, or a kind that
            they are not about.
    """
    kinds = dict.fromkeys(fact.kind for fact in facts)
    found = []
    for line in read_lines(path):
        if line.startswith("#"):
            continue
        if line.startswith(("{", "[")):
            raise ValueError(f"file {str(path)!r} holds JSON, not names: give one name per line (--unknown)")
        name, tab, kind = line.partition("\t")
        if (not tab and len(kinds) > 1) or (tab and kind not in kinds):
            known = ", ".join(sorted(map(str, kinds)))
            raise ValueError(f"file {str(path)!r}: {name!r} needs one of the facts' kinds, {known}, behind a tab")
        found.append(Entity(name=name, kind=kind if tab else next(iter(kinds))))
    return tuple(found)


def prompts_about(names: Sequence[Entity], facts: Sequence[Fact]) -> tuple[str, ...]:
    """The facts' prompts with other names in the slot, without an answer."""
    templates = dict.fromkeys(t for fact in facts for t in fact.templates)
    return tuple(t.replace("{}", e.name) for e in names for t in templates)


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
    found = {"facts": data_hash(facts)} | ({"kept": data_hash(kept)} if kept else {})
    for name, lines in (("texts", texts), ("unknown", [entity.name for entity in unknown])):
        found |= {name: hashlib.sha256("\n".join(lines).encode()).hexdigest()} if lines else {}
    files = {"sae": sae, "calibration": calibration}
    found |= {name: files_hash(source) for name, source in files.items() if source and Path(source).exists()}
    return found | {name: model.state_hash() for name, model in models.items()}


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; calling it names the step under way and moves the bar on."""
    from tqdm.auto import tqdm

    tqdm.monitor_interval = 0  # no watching thread, which a fork would not survive
    with tqdm(total=total, file=sys.stderr, bar_format="{l_bar}{bar}| {elapsed} {desc}", leave=False) as bar:

        def log(message: str) -> None:
            bar.set_description_str(message[:60])
            bar.update(1)

        yield log
