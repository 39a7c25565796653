"""Damage to files, as disks, editors and people do it: for readers that are to give a result or one line."""

from collections.abc import Callable
from os import PathLike
from random import Random
from typing import Any

VALUES = ("null", "NaN", "-1e999", "[]", "{}", '""', "7", "true", '"\\ud800"', "[[[[]]]]", "99999999999999999999")


def damaged(data: bytes, random: Random) -> bytes:
    """The bytes cut short, with some overwritten, doubled or left out, or with a JSON value in another's place."""
    start = random.randrange(len(data))
    stop = min(len(data), start + random.choice((1, 1, 2, 8, 64)))
    return random.choice(
        (
            data[:start],
            data[:start] + random.randbytes(stop - start) + data[stop:],
            data[:start] + data[start:stop] * 2 + data[stop:],
            data[:start] + data[stop:],
            data[:start] + random.choice(VALUES).encode() + data[stop:],
        )
    )


def altered(value: Any, random: Random) -> Any:
    """A JSON value with one place in it replaced by a value of any kind, or left out."""
    other = random.choice((None, float("nan"), -1, 1.5, "x", "", True, [], {}, [[1]], {"a": 1}, 10**30))
    if not isinstance(value, dict | list) or not value or random.random() < 0.1:
        return other
    keys = list(value) if isinstance(value, dict) else range(len(value))
    at = random.choice(keys)
    if isinstance(value, dict) and random.random() < 0.2:
        return {key: item for key, item in value.items() if key != at}
    changed = altered(value[at], random)
    return value | {at: changed} if isinstance(value, dict) else [*value[:at], changed, *value[at + 1 :]]


def assert_result_or_one_line(read: Callable[[], Any], path: str | PathLike) -> Any:
    """What the reader gives, or None where it refused the file by name in one line."""
    try:
        return read()
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error), error
