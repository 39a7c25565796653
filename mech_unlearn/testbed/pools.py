"""Pools of models whose truth is known, scored fact by fact: what verdicts are calibrated and measured on.

Every model of a family targets one group of facts (here one person), so that model, group and cluster are one. It is
made, checked against its truth, scored by the restoration tests, and dropped: scores are kept, weights are not. The
reference models of an audit (`retrained_0` to `_2`) are never the ones that deleted models are made from.
"""

import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mech_unlearn.calibration import FEATURES, Pool, strongest
from mech_unlearn.core import Fact
from mech_unlearn.metrics import general_kl, recall
from mech_unlearn.model import Model, load
from mech_unlearn.restoration import Case, Reference, Result, audit, reference
from mech_unlearn.run import write_json
from mech_unlearn.testbed import open_world
from mech_unlearn.testbed import spec as find_spec
from mech_unlearn.testbed.corpus import streams
from mech_unlearn.testbed.families import FAMILIES, Made, Setting

TESTS = ("output", "uds", "uds_subject", "sae", "logit_lens", "probe")
"""The restoration tests whose scores are features."""
REFERENCES = 3
"""Retrained models that audits compare with; those beyond are what deleted models are made from."""
NEIGHBORS, TEXTS = 120, 100


@dataclass(frozen=True)
class Lab:
    """A world with further retrained models, in one process."""

    world_name: str
    folder: Path
    """Holds `retrained_3`, `retrained_4`, ..., built as those of the world."""

    @cached_property
    def world(self) -> Any:
        return open_world(self.world_name)

    @cached_property
    def full(self) -> Model:
        return load(self.world.full)

    @cached_property
    def sae(self) -> Any:
        from mech_unlearn.latents import load_sae

        return load_sae(self.world.sae, self.full)

    @cached_property
    def references(self) -> tuple[Model, ...]:
        return tuple(load(path) for path in self.world.retrained[:REFERENCES])

    @cached_property
    def retrained(self) -> tuple[Model, ...]:
        return tuple(load(path) for path in extra_retrained(self.folder))

    @cached_property
    def groups(self) -> tuple[str, ...]:
        return tuple(entity.name for entity in self.world.forget.entities)

    def facts(self, group: str) -> tuple[Fact, ...]:
        return tuple(fact for fact in self.world.forget.facts if fact.subject == group)

    @cached_property
    def neighbors(self) -> tuple[Fact, ...]:
        """Kept facts that health is measured on; the others are for training."""
        return tuple(random.Random("neighbors").sample(self.world.retain.neighbors, NEIGHBORS))

    @cached_property
    def full_neighbor_recall(self) -> float:
        return recall(self.full, self.neighbors, "prompt").value

    @lru_cache(maxsize=2)  # noqa: B019 - a lab lives as long as its process
    def reference(self, group: str) -> Reference:
        case = Case(
            full=self.full, facts=self.facts(group), retrained=self.references, others=self.neighbors,
            texts=self.world.retain.texts[:TEXTS], unknown=self.world.retain.unknown, sae=self.sae, seed=0,
        )  # fmt: skip
        return reference(case, TESTS)

    def setting(self, group: str) -> Setting:
        place = self.groups.index(group)
        held = {fact.id for fact in self.neighbors}
        return Setting(
            self.full, self.retrained, self.facts(group), self.facts(self.groups[place - 1]),
            tuple(fact for fact in self.world.retain.neighbors if fact.id not in held), self.world.retain.texts[TEXTS:],
            place,
        )  # fmt: skip


def extra_retrained(folder: Path) -> tuple[Path, ...]:
    """The folders of the retrained models that deleted ones are made from, in order of their seeds."""
    found = (path.parent for path in folder.glob("retrained_*/config.json"))
    return tuple(sorted(found, key=lambda path: int(path.name.split("_")[1])))


def make_retrained(world: str, folder: Path, count: int, progress: bool = True) -> None:
    """Train what is missing of `count` retrained models beyond those of the world, and the base before them."""
    from mech_unlearn.testbed.build import build_retrained

    for k in range(REFERENCES, REFERENCES + count):
        build_retrained(world, folder, k, progress=progress)


def score_model(lab: Lab, family: str, group: str) -> dict[str, Any]:
    """One model of a family for one group: checked against its truth, and the features of each of its facts."""
    kind = FAMILIES[family]
    made = kind.make(lab.setting(group))
    ref = lab.reference(group)
    with made.on() as model:
        checks = truth_audit(lab, family, group, made, model)
        results = audit(ref, model, family)
        kept = recall(model, lab.neighbors, "prompt").value
        drift = general_kl(lab.full, model, lab.world.retain.texts[:TEXTS]).value
    output = results["output"]
    assert output.kappa is not None
    if kind.pool == "intact":
        checks["outputs are those of the full model"] = bool((output.kappa - 1).abs().mean() <= 0.1)
    if kind.pool == "collapsed":
        checks["generic text costs a nat more, or half of the others is lost"] = drift >= 1 or kept < 0.5
    testable = output.columns["testable"].bool()
    loss = lab.full_neighbor_recall - kept
    rows = [
        {"fact": fact.id, **{k: v for k, v in features(results, i, loss, drift).items()}}
        | {"recall": output.columns["recall"][i].item(), "margin": output.score_raw[i].item()}
        for i, fact in enumerate(output.facts)
        if testable[i]
    ]
    side = f"/{kind.side}" if kind.side else ""
    return {
        "family": family, "kind": kind.pool + side, "group": group, "cluster": f"{family} {group}", "rows": rows,
        "checks": checks, "neighbor_recall": kept, "general_kl": drift,
    }  # fmt: skip


def features(results: Mapping[str, Result], i: int, neighbor_loss: float, drift: float) -> dict[str, float | None]:
    """The features of one fact, but for `strongest`, which needs the pool; None where a test did not speak."""
    output = results["output"]
    assert output.kappa is not None
    found: dict[str, float | None] = {"output": output.kappa[i].item()}
    heldout = output.columns.get("heldout_margin")
    base = output.score_retrained.mean(0)[i].item()
    gap = output.score_full[i].item() - base
    found["heldout"] = None if heldout is None else (heldout[i].item() - base) / gap
    for name in TESTS[1:]:
        value = results[name].recoverability[i].item() if name in results else float("nan")
        found[name] = None if value != value else value
    return found | {"neighbor_loss": neighbor_loss, "general_kl": min(drift, 5.0)}


def truth_audit(lab: Lab, family: str, group: str, made: Made, model: Model) -> dict[str, bool]:
    """What has to hold of a model if its truth is what its family says; of outputs see `score_model`."""
    kind = FAMILIES[family]
    checks: dict[str, bool] = {}
    if made.confined:
        frozen = [name for name in model.held if not re.search(made.confined, name)]
        checks["all but the named tensors are those of the base, bit by bit"] = all(
            torch.equal(model.held[name], made.base.held[name]) for name in frozen
        )
    if kind.pool in ("suppressed", "intact"):
        checks["the base is the full model"] = made.base is lab.full
    if kind.pool == "deleted":
        checks["the base never heard of the group"] = made.base in lab.retrained and _unheard(lab.world_name, group)
    return checks


@cache
def _unheard(world: str, group: str) -> bool:
    """Whether neither the name nor any of its facts is in the stream that retrained models are trained on."""
    told = streams(find_spec(world), with_forget=False)
    return not any(group in line.text for line in (*told.facts, *told.other))


@lru_cache(maxsize=1)
def _lab(world: str, folder: str) -> Lab:
    return Lab(world, Path(folder))


def _cell(world: str, folder: str, family: str, group: str) -> str:
    torch.set_num_threads(1)
    write_json(_path(Path(folder), family, group), score_model(_lab(world, folder), family, group))
    return f"{family}, {group}"


def _path(folder: Path, family: str, group: str) -> Path:
    return folder / "cells" / f"{re.sub('[^a-z0-9]+', '_', f'{family} {group}'.lower())}.json"


def make_pools(
    world: str,
    folder: str | os.PathLike,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    retrained: int = 8,
    workers: int = 2,
    log: Callable[[str], None] = print,
) -> Path:
    """Score the models of all families on all groups of a world; what is finished is kept.

    Raises:
        ValueError: an unknown family or world.
    """
    if unknown := set(families) - set(FAMILIES):
        raise ValueError(f"no family {sorted(unknown)[0]!r}; choose from {', '.join(FAMILIES)}")
    root = Path(folder)
    make_retrained(world, root, retrained)
    groups = Lab(world, root).groups
    jobs = [(f, g) for g in groups for f in families if not _path(root, f, g).exists()]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(_cell, world, str(root), family, group) for family, group in jobs]
        for done, future in enumerate(as_completed(running), 1):
            log(f"{done}/{len(jobs)} {future.result()}")
    return root


def cells(folder: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The finished cells of a folder."""
    for path in sorted(Path(folder).glob("cells/*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def read_pool(found: Sequence[Mapping[str, Any]], audited: bool = True) -> tuple[Pool, dict[str, float]]:
    """(The pool of cells, spread of each recoverability in plain retrained models). With `audited` only models that
    passed every check of their truth."""
    rows, meta = [], []
    for cell in found:
        if audited and not all(cell["checks"].values()):
            continue
        for row in cell["rows"]:
            rows.append([np.nan if row.get(name) is None else row[name] for name in FEATURES])
            meta.append((cell["kind"], cell["family"], cell["cluster"], cell["group"]))
    x = np.array(rows, dtype=float)
    plain = np.array([m[1] == "retrained" for m in meta])
    with np.errstate(all="ignore"):
        spread = {name: float(np.nanstd(x[plain, i])) for i, name in enumerate(FEATURES)}
    x[:, FEATURES.index("strongest")] = strongest(x, spread)
    return Pool(x, *(tuple(part) for part in zip(*meta, strict=True))), spread
