"""Made-up names in the manner of given ones: new words spelled like theirs, or their words in new company.

A word is drawn letter by letter from a chain: each letter by how often it follows the one or the two before it in the
given words of the same place (first, last or between); the fewer words, the oftener by one alone. Whether nobody bears
a name is not known here, and whether a model knows it has to be measured.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

Manner = Literal["spelled", "combined"]
FEW = 16
"""Words of a place with which half of the letters are drawn by the two before them."""
TRIES = 2000
"""Draws in a row without a new name, after which there are said to be no more."""
END = ""


def made_up(names: Sequence[str], count: int, seed: int, manner: Manner = "spelled") -> tuple[str, ...]:
    """New names of as many words as given ones; fewer than `count` where no more are found.

    Args:
        manner: "spelled" makes new words; "combined" puts words of different names together, for names of several
            words and tokenizers that know no new ones.

    Raises:
        ValueError: no names, an empty one, or one word a name where words are to be combined.
    """
    words = [name.split() for name in names]
    if not words or not all(words):
        raise ValueError("names are made up in the manner of given ones: give names that are not empty")
    if manner == "combined" and max(map(len, words)) < 2:
        raise ValueError("names of one word have no words to combine")
    draw = random.Random(seed)
    make = _combined(words, draw) if manner == "combined" else _spelled(words, draw)
    taken = {name.casefold() for name in names}
    own = {word.casefold() for some in words for word in (some[0], some[-1])}
    found: list[str] = []
    left = TRIES
    while left and len(found) < count:
        name, left = make(), left - 1
        new = name.casefold()
        first, *_, last = new.split() * 2
        alike = any(new in one or one in new for one in taken) if manner == "spelled" else new in taken
        if not alike and (manner == "combined" or own.isdisjoint((first, last))):
            taken.add(new)
            found.append(name)
            left = TRIES
    return tuple(found)


def _by_place(words: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """The first, last and other words of names."""
    return {
        "first": [some[0] for some in words],
        "between": [word for some in words for word in some[1:-1]],
        "last": [some[-1] for some in words],
    }


def _places(size: int) -> tuple[str, ...]:
    """The places of the words of a name of so many."""
    return ("first", *["between"] * (size - 2), *["last"] * (size > 1))


def _combined(words: Sequence[Sequence[str]], draw: random.Random) -> Callable[[], str]:
    pools, sizes = _by_place(words), [len(some) for some in words if len(some) > 1]
    return lambda: " ".join(draw.choice(pools[place]) for place in _places(draw.choice(sizes)))


def _spelled(words: Sequence[Sequence[str]], draw: random.Random) -> Callable[[], str]:
    chains, sizes = {place: _Chain(pool) for place, pool in _by_place(words).items()}, [len(some) for some in words]
    return lambda: " ".join(chains[place].word(draw) for place in _places(draw.choice(sizes)))


class _Chain:
    """What follows one or two letters in some words, as often as it does; `END` behind the last."""

    def __init__(self, pool: Sequence[str]) -> None:
        self.sizes = [len(word) for word in pool]
        self.share = len(pool) / (len(pool) + FEW)
        self.after: dict[str, list[str]] = defaultdict(list)
        for word in pool:
            self.after[""].append(word[0])
            for end in range(1, len(word) + 1):
                letter = word[end : end + 1]
                self.after[word[end - 1 : end]].append(letter)
                if end > 1:
                    self.after[word[end - 2 : end]].append(letter)

    def word(self, draw: random.Random) -> str:
        """A word at least as long as the shortest, and at most one letter longer than the longest."""
        low, high = min(self.sizes), max(self.sizes) + 1
        while True:
            word = ""
            while len(word) <= high:
                two = len(word) > 1 and word[-2:] in self.after and draw.random() < self.share
                letter = draw.choice(self.after[word[-2:] if two else word[-1:]])
                if letter == END:
                    break
                word += letter
            if low <= len(word) <= high:
                return word
