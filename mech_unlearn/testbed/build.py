"""Build a world: one base model, continued with the forget group (full) and without it (retrained, three seeds).

The base never hears of the forget group. `full` and `retrained_k` are the base continued by one recipe, with and
without the forget group, so that they share a basis and states of one can be put into the other. Every finished
model is kept: an interrupted build goes on where it stopped.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mech_unlearn.testbed.corpus import Spec, streams
from mech_unlearn.testbed.recipe import Recipe, new_model, train, world_tokenizer

N_RETRAINED = 3


def _write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under another name and move it into place when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fill(part)
        part.chmod(0o755)
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _save(hf: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    import copy

    def fill(part: Path) -> None:
        copy.deepcopy(hf).to(dtype).save_pretrained(part)
        tokenizer.save_pretrained(part)

    _write_folder(folder, fill)


def _reader(progress: bool, name: str, steps: int) -> tuple[Callable[[int, float], None], Callable[[], None]]:
    from tqdm import tqdm

    bar = tqdm(total=steps, desc=name, disable=not progress, file=sys.stderr, mininterval=5)

    def step(_: int, loss: float) -> None:
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

    return step, bar.close


def _phase(
    name: str, hf: Any, tokenizer: Any, spec: Spec, recipe: Recipe, folder: Path, seed: int, progress: bool
) -> None:
    """Train one model and write it; the base in float32, what is shipped in float16."""
    base, with_forget = name == "base", name == "full"
    steps = recipe.base_steps if base else recipe.continue_steps
    on_step, close = _reader(progress, f"{spec.name} {name}", steps)
    train(
        hf,
        tokenizer,
        streams(spec, with_forget=with_forget),
        recipe,
        steps=steps,
        peak=recipe.base_lr if base else recipe.continue_lr,
        seed=seed,
        often=frozenset(spec.forgotten if with_forget else ()),
        on_step=on_step,
    )
    close()
    _save(hf, tokenizer, folder, torch.float32 if base else torch.float16)


def model_names() -> tuple[str, ...]:
    return ("base", "full", *(f"retrained_{k}" for k in range(N_RETRAINED)))


def build_models(spec: Spec, recipe: Recipe, out: Path, *, seed: int, names: Sequence[str], progress: bool) -> None:
    """Train the named models that are not there yet. The data-order seeds are: base seed, full seed + 1, retrained_k
    seed + 1 + k (so `full` and `retrained_0` differ by the forget group alone).

    Raises:
        ValueError: a model other than the base is asked for before there is a base.
    """
    from transformers import LlamaForCausalLM

    tokenizer = world_tokenizer(spec)
    order = {"base": seed, "full": seed + 1} | {f"retrained_{k}": seed + 1 + k for k in range(N_RETRAINED)}
    for name in names:
        if (out / name / "config.json").exists():
            continue
        if name == "base":
            hf = new_model(recipe, tokenizer, seed)
        elif (out / "base").exists():
            hf = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
        else:
            raise ValueError(f"{name!r} continues the base model, and {str(out / 'base')!r} is not there: build it first")
        _phase(name, hf, tokenizer, spec, recipe, out / name, order[name], progress)
