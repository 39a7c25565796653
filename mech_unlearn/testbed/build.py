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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mech_unlearn.core import Site
from mech_unlearn.files import write_json
from mech_unlearn.model.load import load
from mech_unlearn.testbed import spec as find_spec
from mech_unlearn.testbed.corpus import Spec, streams
from mech_unlearn.testbed.measure import measure_world
from mech_unlearn.testbed.recipe import Recipe, new_model, train, world_tokenizer

N_RETRAINED = 3
MODELS = ("base", "full", *(f"retrained_{k}" for k in range(N_RETRAINED)))
STAGES = (*MODELS, "saes", "report")
RECIPES = {"biographies": Recipe(), "wikidata": Recipe(base_steps=650, continue_steps=300, forget_weight=5)}
"""World -> its recipe; `wikidata` has a third of the sentences, so fewer steps, and its forget group more often."""
SAE_LAYERS = (1, 2)
"""resid_post of these layers: where subjects are enriched in both worlds."""


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


def save_model(hf: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write model and tokenizer as a Hugging Face folder that transformers 4 and 5 read; there is all of it or none."""
    import copy

    def fill(part: Path) -> None:
        copy.deepcopy(hf).to(dtype).save_pretrained(part)
        tokenizer.save_pretrained(part)
        config = part / "tokenizer_config.json"  # transformers 5 writes a class name that 4 does not know
        write_json(config, json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"})
        for path in part.iterdir():
            path.chmod(0o644)

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
    base, with_forget = name == "base", name.startswith("full")
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
    save_model(hf, tokenizer, folder, torch.float32 if base else torch.float16)


def _build_model(name: str, spec: Spec, recipe: Recipe, out: Path, seed: int, progress: bool) -> None:
    """Train one model. Data-order seeds: base `seed`, full and retrained_0 `seed + 1` (they differ by the forget group
    alone), full_k and retrained_k `seed + 1 + k`."""
    from transformers import LlamaForCausalLM

    tokenizer = world_tokenizer(spec)
    order = {"base": seed, "full": seed + 1}
    shuffle = order[name] if name in order else seed + 1 + int(name.rpartition("_")[2])
    if name == "base":
        hf = new_model(recipe, tokenizer, seed)
    elif (out / "base" / "config.json").exists():
        hf = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    else:
        raise ValueError(f"{name!r} continues the base model, and {str(out / 'base')!r} is not there: build it first")
    _phase(name, hf, tokenizer, spec, recipe, out / name, shuffle, progress)


def build_another(world: str, out: str | os.PathLike, name: str, *, seed: int = 0, progress: bool = True) -> Path:
    """One more `retrained_k` or `full_k` of a world as it is shipped; the base is made first where it is missing.

    Its data-order seed is `seed + 1 + k`, so that with k from 3 on none is one of the world's own.
    """
    folder, made, recipe = Path(out), find_spec(world), RECIPES[world]
    for each in ("base", name):
        if not (folder / each / "config.json").exists():
            _build_model(each, made, recipe, folder, seed, progress)
    return folder / name


def _sae_texts(spec: Spec) -> list[str]:
    """All training sentences of `full`."""
    told = streams(spec, with_forget=True)
    return [line.text for line in (*told.facts, *told.other)]


def _build_saes(spec: Spec, out: Path, seed: int) -> None:
    from mech_unlearn.model.latents import save_sae
    from mech_unlearn.model.sae_training import train_sae

    model = load(str(out / "full"))
    texts = _sae_texts(spec)
    for layer in SAE_LAYERS:
        folder = out / "saes" / f"L{layer}"
        if (folder / "cfg.json").exists():
            continue
        site = Site(layer, "resid_post")
        sae = train_sae(
            model, texts, site, d_sae=1024, k=32, training_tokens=1_500_000, buffer_tokens=400_000, seed=seed
        )
        sae.sae.cfg.metadata.model_name = f"mech_unlearn/{spec.name}/full"
        _write_folder(folder, lambda part, sae=sae: save_sae(sae, part))


def _settings(world: str, out: Path, seed: int, recipe: Recipe) -> None:
    """Write what the folder is, or check that it is the same."""
    wanted = {"world": world, "seed": seed, "weights": "float16; load as float32", "recipe": asdict(recipe)}
    path = out / "world.json"
    if path.exists() and (found := json.loads(path.read_text(encoding="utf-8"))) != wanted:
        differ = sorted(key for key in wanted if found.get(key) != wanted[key])
        raise ValueError(f"{str(out)!r} holds a world built with other settings ({', '.join(differ)}); name another")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def build(
    world: str,
    out: str | os.PathLike,
    *,
    seed: int = 0,
    only: str | None = None,
    recipe: Recipe | None = None,
    progress: bool = True,
) -> Path:
    """The folder of a world with its models, SAEs and report; what is finished is kept, the rest is made.

    Deterministic by seed on one machine and number of threads. Training is in float32; `full` and `retrained_k` are
    stored in float16. The base model stays beside them and is not needed afterwards.

    Args:
        only: one stage: base, full, retrained_0, retrained_1, retrained_2, saes or report.

    Raises:
        ValueError: an unknown world or stage, a stage before the one it needs, a folder with other settings.
    """
    if only is not None and only not in STAGES:
        raise ValueError(f"no stage {only!r}; choose from {', '.join(STAGES)}")
    made = find_spec(world)
    folder, recipe = Path(out), recipe or RECIPES[world]
    _settings(world, folder, seed, recipe)
    for stage in (only,) if only else STAGES:
        if stage in MODELS:
            if not (folder / stage / "config.json").exists():
                _build_model(stage, made, recipe, folder, seed, progress)
            continue
        if not (folder / "full" / "config.json").exists():
            raise ValueError(f"stage {stage!r} needs the full model in {str(folder)!r}: build it first")
        if stage == "saes":
            _build_saes(made, folder, seed)
        else:
            write_json(folder / "report.json", measure_world(made, folder))
    return folder
