"""Pools of models whose truth is known, scored fact by fact: what verdicts are calibrated and measured on.

Every model of a family targets one group of facts (here one person), so that model, group and cluster are one. It is
made, checked against its truth, scored by the restoration tests, and dropped: scores are kept, weights are not. The
reference models of an audit (`retrained_0` to `_2`) are never the ones that deleted models are made from.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit, clone
from mech_unlearn.files import files_hash, write_json
from mech_unlearn.metrics import general_kl, recall
from mech_unlearn.model.bridge import Model
from mech_unlearn.restoration import audit
from mech_unlearn.restoration.weights.quantize import Rounding, quantize_
from mech_unlearn.run import data_hash, side_by_side
from mech_unlearn.testbed import spec as find_spec
from mech_unlearn.testbed.corpus import streams
from mech_unlearn.testbed.families import CONTROLS, FAMILIES, Made
from mech_unlearn.testbed.materials import TESTS, TEXTS, Lab, Materials, groups_of
from mech_unlearn.testbed.published import published
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import nll
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import train
from mech_unlearn.verdict.features import FEATURES, RECOVERY, Pool, matrix, measurements

JUDGED = ("suppressed", "deleted")
"""Pools that verdicts have to tell apart."""
SPARSE = ("mixture",)
"""Pools, like the controls, with a model for every second group only: no p-value comes from them."""
ATTACKS = ("nf4", "relearned")
"""What is done to some models before they are scored again: rounding to NF4, and eight epochs of the facts at 5e-4."""
ATTACKED = 5
"""Every so many groups the models of `JUDGED` families are attacked."""
KINDS = FAMILIES | CONTROLS


def score_model(lab: Lab, family: str, group: str) -> dict[str, Any]:
    """One model of a family for one group: checked against its truth, and the scores of each of its facts."""
    kind = KINDS[family]
    made = kind.make(lab.setting(group))
    with made.on() as model:
        found = score_facts(lab, group, model, family)
        checks = truth_audit(lab, family, group, made, model) | output_audit(kind.pool, found)
        edited = general_kl(made.base, model, lab.materials.retain.texts[:TEXTS]).value
        again = {}
        if family in FAMILIES and kind.pool in JUDGED and lab.groups.index(group) % ATTACKED == 0:
            for how in ATTACKS:
                with attacked(model, how, lab.facts(group)) as hit:
                    again[how] = score_facts(lab, group, hit, family)["rows"]
    side = f"/{kind.side}" if kind.side else ""
    return {
        "family": family, "kind": kind.pool + side, "group": group, "cluster": f"{family} {group}",
        "base": Path(made.base.name).name, "checks": checks, "edited": edited, **found, "attacked": again,
    }  # fmt: skip


def score_facts(lab: Lab, group: str, model: Model, name: str) -> dict[str, Any]:
    """Features and published scores of each testable fact of a group, and the model's health."""
    results = audit(lab.reference(group), model, name)
    singles = published(model, lab.known(group))
    kept = recall(model, lab.neighbors, "prompt").value
    drift = general_kl(lab.full, model, lab.materials.retain.texts[:TEXTS]).value
    output = results["output"]
    measured = measurements(results, lab.full_neighbor_recall - kept, drift)
    rows = [
        {
            "fact": fact.id,
            **measured[i],
            "recall": output.columns["recall"][i].item(),
            "published": {key: round(values[i].item(), 6) for key, values in singles.items()},
        }
        for i, fact in enumerate(output.facts)
        if output.columns["testable"][i]
    ]
    return {"rows": rows, "neighbor_recall": kept, "general_kl": drift}


@contextmanager
def attacked(model: Model, how: str, facts: Sequence[Fact]) -> Iterator[Model]:
    """A clone of the model after one of `ATTACKS`."""
    with clone(model) as copy:
        if how == "nf4":
            quantize_(copy, Rounding(bits=4, group=64, code="nf4"))
            yield copy
            return
        objective = Objective(lambda _: nll, retain_weight=0.0)
        schedule = Schedule(lr=5e-4, epochs=8, batch_size=64, weight_decay=0.0, clip=1.0)
        deltas, _ = train(copy, ForgetSet(facts=tuple(facts)), RetainSet(), objective, schedule, trainable="", seed=0)
        with Edit(name="relearned", base=copy.hash(), deltas=deltas).on(copy):
            yield copy


def output_audit(pool: str, found: Mapping[str, Any]) -> dict[str, bool]:
    """What has to hold of a model's outputs if its truth is what its family says.

    A suppressor has to suppress: one that is too weak for the model leaves it intact.
    """
    output = float(np.mean([row["output"] for row in found["rows"]])) if found["rows"] else float("nan")
    if pool == "suppressed":
        return {"the outputs lost the facts": output < 0.5}
    if pool == "intact":
        return {"outputs are those of the full model": abs(output - 1) <= 0.1}
    if pool == "collapsed":
        lost = found["neighbor_recall"] < 0.5
        return {"generic text costs a nat more, or half of the others is lost": found["general_kl"] >= 1 or lost}
    return {}


def truth_audit(lab: Lab, family: str, group: str, made: Made, model: Model) -> dict[str, bool]:
    """What has to hold of a model's weights if its truth is what its family says; of outputs see `output_audit`."""
    kind = KINDS[family]
    checks: dict[str, bool] = {}
    if made.confined:
        frozen = [name for name in model.held if not re.search(made.confined, name)]
        checks["all but the named tensors are those of the base, bit by bit"] = all(
            torch.equal(model.held[name], made.base.held[name]) for name in frozen
        )
    if kind.pool in ("suppressed", "intact"):
        checks["the base is a full model"] = made.base in (lab.fulls if family in CONTROLS else (lab.full,))
    if kind.pool == "deleted":
        checks["the base is a retrained model"] = made.base in lab.retrained
        if lab.materials.world is not None:
            checks["the base never heard of the group"] = _unheard(lab.materials.world, group)
        else:
            checks["the base answers less than half"] = recall(made.base, lab.facts(group)).value < 0.5
    return checks


@cache
def _unheard(world: str, group: str) -> bool:
    """Whether the name is nowhere in the stream that retrained models are trained on."""
    told = streams(find_spec(world), with_forget=False)
    return not any(group in line.text for line in (*told.facts, *told.other))


_LABS: list[Lab] = []
"""The lab of a worker process."""


def _open_lab(materials: Materials) -> None:
    _LABS.append(Lab(materials))


def _cell(folder: str, job: tuple[str, str]) -> None:
    write_json(_path(Path(folder), *job), score_model(_LABS[0], *job))


def _path(folder: Path, family: str, group: str) -> Path:
    name = f"{family} {group}"
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]  # names may differ in letters that no file name keeps
    return folder / "cells" / f"{re.sub('[^a-z0-9]+', '_', name.lower())}_{mark}.json"


def make_pools(
    materials: Materials,
    folder: str | os.PathLike,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    workers: int = 2,
    log: Callable[[str], None] = print,
) -> Path:
    """Score the models of all families on the groups of facts; what is finished is kept.

    Raises:
        ValueError: an unknown family, or a folder with pools of other models.
    """
    if unknown := set(families) - set(KINDS):
        raise ValueError(f"no family {sorted(unknown)[0]!r}; choose from {', '.join(KINDS)}")
    if set(families) & set(CONTROLS) and not materials.fulls:
        raise ValueError(f"the families {', '.join(CONTROLS)} need further full models: Materials(fulls=...)")
    root, full = Path(folder), Lab(materials).full
    _same_models(root, materials, full)
    lacking = {family: why for family in families if (why := KINDS[family].lacks(full))}
    for family, why in lacking.items():
        log(f"left out: {family}: {why}")
    jobs = [
        (family, group)
        for k, group in enumerate(groups_of(materials.facts))
        for family in families
        if family not in lacking
        and (k % 2 == 0 or not (family in CONTROLS or KINDS[family].pool in SPARSE))
        and not _path(root, family, group).exists()
    ]
    work = partial(_cell, str(root))
    ran = side_by_side(jobs, work, workers=workers, setup=_open_lab, given=(materials,))
    for done, ((family, group), _) in enumerate(ran, 1):
        log(f"{done}/{len(jobs)} {family}, {group}")
    return root


def _same_models(root: Path, materials: Materials, full: Model) -> None:
    """Cells of one folder are about one full model, one SAE, the same retrained models and the same facts and texts."""
    kept = materials.retain
    mine = {
        "full": full.hash(),
        "facts": data_hash(materials.facts),
        "references": [files_hash(path) for path in materials.references],
        "retrained": [files_hash(path) for path in materials.retrained],
        "sae": materials.sae and files_hash(materials.sae),
        "retain": hashlib.sha256(repr((kept.neighbors, kept.texts, kept.unknown)).encode()).hexdigest(),
        "dtype": materials.dtype,
        "tests": list(TESTS),
        "features": list(FEATURES),
    }
    path = root / "pools.json"
    if path.exists() and (theirs := json.loads(path.read_text(encoding="utf-8"))) != mine:
        what = next((key for key in mine if mine[key] != theirs.get(key)), "format")
        raise ValueError(f"{str(root)!r} holds pools made with another {what!r}; choose another folder")
    write_json(path, mine)


def cells(folder: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The finished cells of a folder."""
    for path in sorted(Path(folder).glob("cells/*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def read_pool(found: Sequence[Mapping[str, Any]], audited: bool = True) -> Pool:
    """The facts of cells as a pool; with `audited` only of models that passed every check of their truth."""
    rows, meta = [], []
    for cell in found:
        if audited and not all(cell["checks"].values()):
            continue
        for row in cell["rows"]:
            rows.append(row)
            meta.append((cell["kind"], cell["family"], cell["cluster"], cell["group"], cell["base"]))
    plain = [row for row, (_, family, *_) in zip(rows, meta, strict=True) if family == "retrained"]
    spread = {name: _spread([row[name] for row in plain]) for name in RECOVERY}
    return Pool(
        matrix(rows, [cluster for _, _, cluster, *_ in meta], spread),
        *(tuple(part) for part in zip(*meta, strict=True)),
        spread=spread,
    )


def _spread(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.std(known)) if known else 0.0
