"""Signatures that show every setting of a locator, also where it hands settings on to another function."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def takes_settings_of(*inner: Callable[..., Any], without: tuple[str, ...] = ()) -> Callable[[F], F]:
    """For a function that hands its further keywords on to others: its signature names them, with types and defaults.

    `help`, `inspect.signature` and the command line then show what it takes; a keyword that none of them knows is
    refused where it arrives, as before.

    Args:
        inner: the functions that the keywords are handed on to.
        without: keywords that the function sets itself.
    """

    def named(function: F) -> F:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        hidden = {p.name for p in own} | set(without)
        handed_on = {
            p.name: p.replace(kind=p.KEYWORD_ONLY)
            for one in inner
            for p in inspect.signature(one).parameters.values()
            if p.name not in hidden and p.default is not p.empty
        }
        told = inspect.signature(function).replace(parameters=[*own, *handed_on.values()])
        function.__signature__ = told  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return named
