"""What pools of known truth are made from: models and facts, and audits of one group's facts, opened once a process."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from mech_unlearn.core import Fact, RetainSet
from mech_unlearn.metrics import recall
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.load import load
from mech_unlearn.restoration import Case, Reference, reference
from mech_unlearn.testbed import open_world
from mech_unlearn.testbed.making import KEPT, Ingredients
from mech_unlearn.testbed.published import Known, known

TESTS = ("output", "uds", "uds_subject", "writeback", "sae", "logit_lens", "probe")
"""The restoration tests whose scores are features."""
REFERENCES = 3
"""Retrained models that audits compare with; those beyond are what deleted models are made from."""
NEIGHBORS, TEXTS = 120, 100


@dataclass(frozen=True, kw_only=True)
class Materials:
    """Models and facts that pools are made from; paths and plain data, so that every process can open them itself."""

    full: str
    references: tuple[str, ...]
    """Retrained models that every audit compares with."""
    retrained: tuple[str, ...]
    """Further retrained models, which deleted ones are made from; at least two."""
    facts: tuple[Fact, ...]
    retain: RetainSet
    sae: str | None = None
    fulls: tuple[str, ...] = ()
    """Further full models, for the families of `CONTROLS`."""
    world: str | None = None
    """A testbed world, whose training text can be searched for the facts."""
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.references) < 2 or len(self.retrained) < 2:
            raise ValueError(
                f"pools need two retrained models to compare with and two to make deleted ones from, got "
                f"{len(self.references)} and {len(self.retrained)}"
            )
        if both := set(self.references) & set(self.retrained):
            raise ValueError(f"retrained model {sorted(both)[0]!r} is both compared with and made deleted ones from")
        if len(groups_of(self.facts)) < 4:
            raise ValueError(f"pools need facts about at least four subjects, got {len(groups_of(self.facts))}")
        if len(self.retain.neighbors) < NEIGHBORS + KEPT or len(self.retain.texts) < 2 * TEXTS:
            raise ValueError(
                f"pools need {NEIGHBORS + KEPT} facts about other subjects and {2 * TEXTS} texts, got "
                f"{len(self.retain.neighbors)} and {len(self.retain.texts)}"
            )


def groups_of(facts: Sequence[Fact]) -> tuple[str, ...]:
    """What is removed together: the facts' groups, or their subjects, in order."""
    return tuple(dict.fromkeys(fact.group or fact.subject for fact in facts))


def world_materials(
    world: str, folder: str | os.PathLike, retrained: int = 8, fulls: int = 0, progress: bool = True
) -> Materials:
    """A shipped world with so many further models in a folder; those that are missing are trained."""
    from mech_unlearn.testbed.build import build_another

    def more(kind: str, count: int) -> tuple[str, ...]:
        names = [f"{kind}_{k}" for k in range(REFERENCES, REFERENCES + count)]
        return tuple(str(build_another(world, folder, name, progress=progress)) for name in names)

    made = open_world(world)
    return Materials(
        full=str(made.full), references=tuple(map(str, made.retrained[:REFERENCES])),
        retrained=more("retrained", retrained), fulls=more("full", fulls), facts=made.forget.facts,
        retain=made.retain, sae=str(made.sae), world=world,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Lab:
    """Materials opened in one process."""

    materials: Materials

    def _open(self, source: str) -> Model:
        return load(source, device=self.materials.device, dtype=getattr(torch, self.materials.dtype))

    @cached_property
    def full(self) -> Model:
        return self._open(self.materials.full)

    @cached_property
    def sae(self) -> Any:
        from mech_unlearn.model.latents import load_sae

        return None if self.materials.sae is None else load_sae(self.materials.sae, self.full)

    @cached_property
    def references(self) -> tuple[Model, ...]:
        return tuple(map(self._open, self.materials.references))

    @cached_property
    def retrained(self) -> tuple[Model, ...]:
        return tuple(map(self._open, self.materials.retrained))

    @cached_property
    def fulls(self) -> tuple[Model, ...]:
        return tuple(map(self._open, self.materials.fulls))

    def described(self) -> dict[str, Any]:
        """What the audits of the pools had, for the provenance of a calibration."""
        site = None if self.sae is None else self.sae.site.hook
        return {"sae": site, "references": len(self.references), "retrained_models": len(self.retrained)}

    @cached_property
    def groups(self) -> tuple[str, ...]:
        return groups_of(self.materials.facts)

    def facts(self, group: str) -> tuple[Fact, ...]:
        return tuple(fact for fact in self.materials.facts if (fact.group or fact.subject) == group)

    @cached_property
    def neighbors(self) -> tuple[Fact, ...]:
        """Kept facts that health is measured on; the others are for training."""
        return tuple(random.Random("neighbors").sample(self.materials.retain.neighbors, NEIGHBORS))

    @cached_property
    def full_neighbor_recall(self) -> float:
        return recall(self.full, self.neighbors, "prompt").value

    @lru_cache(maxsize=1)  # noqa: B019 - a lab lives as long as its process
    def known(self, group: str) -> Known:
        """What the published scores need."""
        return known(self.full, self.references, self.facts(group))

    @lru_cache(maxsize=2)  # noqa: B019
    def reference(self, group: str) -> Reference:
        case = Case(
            full=self.full, facts=self.facts(group), retrained=self.references, others=self.neighbors,
            texts=self.materials.retain.texts[:TEXTS], unknown=self.materials.retain.unknown, sae=self.sae, seed=0,
        )  # fmt: skip
        return reference(case, TESTS)

    def setting(self, group: str) -> Ingredients:
        place = self.groups.index(group)
        held = {fact.id for fact in self.neighbors}
        retain = self.materials.retain
        return Ingredients(
            self.full, self.retrained, self.facts(group), self.facts(self.groups[place - 1]),
            tuple(fact for fact in retain.neighbors if fact.id not in held), retain.texts[TEXTS:], place, self.fulls,
        )  # fmt: skip
