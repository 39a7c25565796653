"""The walls of the house: which room may reach which, read from the code's own imports, those in functions included."""

import ast
import statistics
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mech_unlearn"
HOUSE = ("core", "attribution", "files", "run", "model", "edit", "verdict")
MAY_REACH = {
    "core": (),
    "files": (),
    "attribution": ("core", "files"),
    "run": ("core", "files"),
    "model": ("core", "files"),
    "edit": ("core", "files", "attribution", "model"),
    "verdict": ("core", "files", "attribution"),
    "data": ("core", "files"),
    "metrics": ("core", "model"),
    "locate": ("core", "files", "attribution", "model", "edit", "metrics"),
    "training": ("core", "files", "model", "edit"),
    "methods": ("core", "files", "attribution", "model", "edit", "locate", "training"),
    "restoration": ("core", "model", "edit", "verdict", "locate", "metrics"),
    "benchmarks": ("core", "model", "data", "locate", "metrics"),
    "testbed": ("core", "files", "run", "model", "edit", "verdict", "training", "metrics", "restoration"),
    "report": ("core", "files", "attribution"),
}
"""Room -> the rooms whose files its files may import. `commands` may reach all, and nobody reaches `commands`."""
ONE_MEANING = ("Row", "Probe", "Setting", "Asked", "Split", "Bench", "RECOVERY", "mentions", "last_states")


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@cache
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules().items()}


def imported(tree: ast.Module, known: frozenset[str]) -> set[str]:
    """The modules of the package that a file imports anywhere in it: at its top, in functions, for type checkers."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mech_unlearn":
            found |= {name if (name := f"{node.module}.{a.name}") in known else node.module for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "mech_unlearn"}
    return found


@cache
def arrows() -> dict[str, set[str]]:
    known = frozenset(modules())
    return {name: imported(tree, known) - {name} for name, tree in trees().items()}


def room(name: str) -> str:
    """The top-level file or folder of the package in which a module lies."""
    return name.split(".")[1] if "." in name else "mech_unlearn"


def closure(start: set[str], graph: dict[str, set[str]]) -> set[str]:
    """Everything reached by imports; importing a module also runs the packages above it."""
    seen, todo = set(), set(start)
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= graph.get(name, set()) - seen
    return seen


def with_parents(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same with an arrow to each package above an imported module, because importing runs their `__init__`."""

    def parents(name: str) -> set[str]:
        parts = name.split(".")
        return {".".join(parts[:i]) for i in range(2, len(parts))}

    return {name: some.union(*map(parents, some)) | parents(name) for name, some in graph.items()}


def test_a_circle_and_a_hidden_arrow_would_be_seen():
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}).prepare()
    known = frozenset({"mech_unlearn.run", "mech_unlearn.core"})
    hidden = ast.parse("def f():\n    from mech_unlearn import run\n    from mech_unlearn.core import Fact\n")
    assert imported(hidden, known) == known


def test_every_room_has_its_walls_written_down():
    assert {room(name) for name in modules()} == {*MAY_REACH, "commands", "mech_unlearn", "__main__"}
    assert {reached for inside in HOUSE for reached in MAY_REACH[inside]} <= set(HOUSE)


@pytest.mark.parametrize("inside", MAY_REACH)
def test_a_room_reaches_only_what_it_may(inside):
    wrong = {
        f"{name} imports {other}"
        for name, others in arrows().items()
        for other in others
        if room(name) == inside and room(other) not in (inside, *MAY_REACH[inside])
    }
    assert not wrong


def test_no_files_import_each_other_in_a_circle():
    TopologicalSorter(arrows()).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("inside", ["verdict", "edit"])
def test_what_importing_a_room_of_the_house_runs_lies_in_the_house(inside):
    start = {name for name in modules() if room(name) == inside}
    reached = {room(name) for name in closure(start, with_parents(arrows()))}
    assert reached <= {*HOUSE, "mech_unlearn"}


def test_only_the_room_of_the_model_touches_the_bridge():
    wrong = set()
    for name, tree in trees().items():
        for node in ast.walk(tree):
            touches = isinstance(node, ast.Attribute) and node.attr == "bridge"
            library = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformer_lens")
            if (touches or library) and room(name) != "model":
                wrong.add(f"{name}:{node.lineno}")
    assert not wrong


def test_a_word_means_one_thing():
    places = {word: [] for word in ONE_MEANING}
    for name, tree in trees().items():
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for word in (getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)):
                if word in places:
                    places[word].append(name)
    assert not {word: where for word, where in places.items() if len(where) > 1}


def test_every_module_has_a_door():
    """It is reached from another, it is an entry, or the README names it."""
    reached = set().union(*with_parents(arrows()).values())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = {name for name in modules() if f"`{name}`" in readme}
    entries = {"mech_unlearn", "mech_unlearn.__main__"}
    assert sorted(set(modules()) - reached - told - entries) == []


def test_the_top_level_can_be_read_at_a_glance():
    files = [path for path in PACKAGE.iterdir() if path.suffix == ".py"]
    folders = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(files) <= 6 and len(folders) <= 13


def test_functions_are_short():
    sizes = sorted(
        node.end_lineno - node.lineno + 1
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert statistics.median(sizes) <= 10 and sizes[int(0.9 * len(sizes))] <= 30 and sizes[-1] <= 80
