"""Locate, remove and prove: a mechanistic interpretability workbench for machine unlearning in language models.

    from mech_unlearn import load, load_facts, check, locate, unlearn, audit, judge, open_world, report

Importing this package imports nothing else; each verb comes with its room when it is first asked for. `locate` and
`report` are rooms as well as verbs: calling the room `mech_unlearn.locate` runs the verb, whatever was imported first.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mech_unlearn.commands.audit import audit
    from mech_unlearn.commands.check import check
    from mech_unlearn.commands.locate import locate
    from mech_unlearn.commands.report import report
    from mech_unlearn.commands.row import judge
    from mech_unlearn.commands.unknown import find_unknown
    from mech_unlearn.commands.unlearn import unlearn
    from mech_unlearn.data.jsonl import load_facts
    from mech_unlearn.model.load import load
    from mech_unlearn.testbed import open_world

__all__ = ["audit", "check", "find_unknown", "judge", "load", "load_facts", "locate", "open_world", "report", "unlearn"]

_HOME = {
    "audit": "mech_unlearn.commands.audit",
    "check": "mech_unlearn.commands.check",
    "find_unknown": "mech_unlearn.commands.unknown",
    "judge": "mech_unlearn.commands.row",
    "load": "mech_unlearn.model.load",
    "load_facts": "mech_unlearn.data.jsonl",
    "locate": "mech_unlearn.commands.locate",
    "open_world": "mech_unlearn.testbed",
    "report": "mech_unlearn.commands.report",
    "unlearn": "mech_unlearn.commands.unlearn",
}
"""Verb -> the module that has it."""


def _verb(name: str) -> Any:
    return getattr(import_module(_HOME[name]), name)


class _RoomAndVerb(ModuleType):
    """A room that is called as the verb of its name."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return _verb(self.__name__.rpartition(".")[2])(*args, **settings)

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(_verb(self.__name__.rpartition(".")[2]))


class _Package(ModuleType):
    """The package itself: a room that is bound to it under a verb's name becomes callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value.__class__ = _RoomAndVerb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mech_unlearn")
    if name in ("locate", "report"):
        return import_module(f"mech_unlearn.{name}")
    if name in _HOME:
        return _verb(name)
    raise AttributeError(f"module 'mech_unlearn' has no attribute {name!r}; its verbs: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
