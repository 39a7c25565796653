"""The architecture page and the README's map name files, functions, folders that are there, and leave no room out."""

import ast
import re
from pathlib import Path

import pytest

from tests.test_walls import arrows, closure, room

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`((?:mech_unlearn|tests)/[\w/.]*)(?::(\w+))?`", PAGE)))


def defined(path: Path) -> set[str]:
    """Names of functions, classes and constants at the top of a file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)}
    return names - {None}


@pytest.mark.parametrize("path, name", NAMED, ids=[":".join(filter(None, pair)) for pair in NAMED])
def test_what_the_page_names_is_there(path, name):
    assert (ROOT / path).exists()
    assert not name or name in defined(ROOT / path)


def test_a_name_that_is_not_there_would_be_seen():
    names = defined(ROOT / "mech_unlearn" / "core.py")
    assert "Fact" in names and "Fakt" not in names


def drawn() -> set[tuple[str, str]]:
    """The arrows of the page's picture."""
    return set(re.findall(r"^  (\w+) --> (\w+)$", PAGE, re.MULTILINE))


def test_the_picture_shows_the_imports_between_rooms_and_no_other():
    own = {"mech_unlearn", "__main__"}
    pairs = {(room(a), room(b)) for a, others in arrows().items() for b in others}
    graph: dict[str, set[str]] = {}
    for a, b in {(a, b) for a, b in pairs if a != b and not {a, b} & own}:
        graph.setdefault(a, set()).add(b)
    reached = {a: closure(set(others), graph) for a, others in graph.items()}
    direct = {
        (a, b) for a, others in graph.items() for b in others if not any(b in reached.get(c, ()) for c in others - {b})
    }
    assert drawn() == direct


def rooms() -> set[str]:
    """The top-level folders and files of the package, as a reader sees them."""
    inside = (ROOT / "mech_unlearn").iterdir()
    return {
        path.name + "/" * path.is_dir()
        for path in inside
        if (path.is_dir() and path.name != "__pycache__") or (path.suffix == ".py" and not path.name.startswith("__"))
    }


def test_every_room_is_on_the_architecture_page():
    assert not {room for room in rooms() if f"`mech_unlearn/{room}`" not in PAGE and room not in PAGE}


def test_the_readmes_map_shows_every_room_and_no_other():
    (house,) = re.findall(r"## The house\n\n```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert set(re.findall(r"^  (\w+(?:/|\.py))", house, re.MULTILINE)) == rooms()
    for folder in re.findall(r"^(\w+)/", house, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
