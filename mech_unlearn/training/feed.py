"""The order in which rows are trained on: passes without repetition, whose state can be kept."""

import random
from collections.abc import Callable, Sequence
from typing import Any

Queue = Callable[[random.Random], list[int]]


class Feed:
    """Batches of at most `size` indices, each index once per pass, every pass in a new order.

    Several feeds may share one `order`, so that one random state stands for all.
    """

    def __init__(self, order: random.Random, size: int, n: int = 0, queue: Queue | None = None) -> None:
        """A feed of `n` indices that refills itself; of 0 it waits for `fill`. `queue` makes the order of a pass."""
        self.order, self.size, self.n, self.queue = order, size, n, queue
        self.left: list[int] = []

    def fill(self, members: Sequence[int]) -> None:
        """Begin a pass over these indices."""
        self.left = list(members)
        self.order.shuffle(self.left)

    def take(self) -> list[int]:
        """The next batch; the last of a pass may be smaller."""
        if not self.left and self.queue:
            self.left = self.queue(self.order)
        elif not self.left:
            self.fill(range(self.n))
        batch, self.left = self.left[: self.size], self.left[self.size :]
        return batch

    @property
    def state(self) -> dict[str, Any]:
        """What is left of the pass and the random state, as JSON values."""
        version, numbers, gauss = self.order.getstate()
        return {"left": self.left, "order": [version, list(numbers), gauss]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        version, numbers, gauss = state["order"]
        self.left = list(state["left"])
        self.order.setstate((version, tuple(numbers), gauss))


def by_entity(owners: Sequence[str]) -> Queue:
    """Passes that take one row of each owner in turn; owners and each owner's rows in a new order every pass."""
    groups: dict[str, list[int]] = {}
    for i, owner in enumerate(owners):
        groups.setdefault(owner or f"text {i}", []).append(i)

    def queue(order: random.Random) -> list[int]:
        shuffled = [order.sample(rows, len(rows)) for rows in groups.values()]
        order.shuffle(shuffled)
        rounds = max(map(len, shuffled))
        return [rows[turn] for turn in range(rounds) for rows in shuffled if turn < len(rows)]

    return queue
