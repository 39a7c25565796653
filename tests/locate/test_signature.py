"""Signatures of locators: every setting shows, with its type and default, and what shows is taken."""

import inspect
from typing import Any

import pytest

from mech_unlearn.locate import INPUTS, LOCATORS
from mech_unlearn.locate.signature import takes_settings_of


def inner(model: Any, facts: Any, depth: int = 3, *, width: float = 0.5) -> None: ...


@pytest.mark.parametrize("name", LOCATORS)
def test_a_locators_signature_names_its_settings(name):
    parameters = inspect.signature(LOCATORS[name].run).parameters
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    settings = LOCATORS[name].settings()
    assert settings and settings.keys() <= parameters.keys() and not settings.keys() & {"model", "facts", *INPUTS}
    assert all(p.annotation is not p.empty and p.default is not p.empty for p in settings.values())
    if LOCATORS[name].per_fact:
        assert inspect.signature(LOCATORS[name].per_fact).parameters.keys() >= settings.keys()


def test_the_settings_of_a_causal_trace_are_those_of_its_per_fact_form():
    assert {"kind", "window", "corruption", "sever"} <= inspect.signature(
        LOCATORS["causal_trace"].run
    ).parameters.keys()


def test_what_is_handed_on_shows_and_what_the_function_sets_itself_does_not():
    @takes_settings_of(inner, without=("width",))
    def outer(model: Any, **settings: Any) -> None:
        inner(model, None, width=1.0, **settings)

    assert list(inspect.signature(outer).parameters) == ["model", "depth"]
    assert inspect.signature(outer).parameters["depth"].default == 3
    outer(1, depth=4)
    with pytest.raises(TypeError, match="dept"):
        outer(1, dept=4)
