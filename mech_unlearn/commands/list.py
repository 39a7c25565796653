"""What there is: every method, locator, test, dataset or world with its paper and a sentence."""

import inspect
import re
from typing import Any


def summary_of(thing: Any) -> tuple[str, str]:
    """First sentence and paper of a method or locator, read from the docstring of its file.

    What shares its file with the one the file is named after speaks for itself in its own docstring.
    """
    module = inspect.getmodule(thing)
    own = inspect.getdoc(thing) or ""
    text = own if "\nPaper: " in own else inspect.getdoc(module) or ""
    named = module is not None and module.__name__.rpartition(".")[2].startswith(getattr(thing, "__name__", "").lower())
    first = (text if named or not inspect.isfunction(thing) else inspect.getdoc(thing) or text).partition("\n")[0]
    paper = re.search(r"^Paper:\s*(.*(?:\n[ ]{4,}.*)*)", text, re.MULTILINE)
    return first, " ".join(paper[1].split()) if paper else ""


def _dataset(load: Any) -> tuple[str, str]:
    """First line and source, the sentence that begins with that word, of the docstring of a loader's file."""
    text = inspect.getdoc(inspect.getmodule(load)) or ""
    source = re.search(r"Sources?:\s+(.*?(?<!al)\.)(?=\s|$)", text, re.DOTALL)
    return text.partition("\n")[0], " ".join(source[1].split()).rstrip(".") if source else ""


def datasets() -> dict[str, Any]:
    """The loader of every data set by name: general ones, and those of the published benchmarks."""
    from mech_unlearn.benchmarks import BENCHMARKS
    from mech_unlearn.data import DATASETS

    return DATASETS | {name: benchmark.dataset for name, benchmark in BENCHMARKS.items()}


def listing(kind: str) -> list[dict[str, str]]:
    """Name, paper and summary of every method, locator, test, dataset or world; a method without evidence of its own is
    marked as experimental."""
    if kind == "tests":
        from mech_unlearn.restoration import TESTS

        return [{"name": name, "paper": test.paper, "summary": test.summary} for name, test in TESTS.items()]
    if kind == "methods":
        from mech_unlearn.methods import METHODS as things
    elif kind == "locators":
        from mech_unlearn.locate import LOCATORS as things
    elif kind == "worlds":
        from mech_unlearn.testbed import WORLDS as things
    else:
        loaders = datasets().items()
        return [dict(zip(("name", "summary", "paper"), (name, *_dataset(load)))) for name, load in loaders]
    rows = []
    for name, thing in things.items():
        first, paper = summary_of(getattr(thing, "run", thing))
        mark = "Experimental. " if kind == "methods" and ".experimental." in thing.__module__ else ""
        rows.append({"name": name, "paper": paper, "summary": mark + first})
    return rows
