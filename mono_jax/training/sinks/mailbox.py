"""Items that the run hands to a sending thread without ever waiting for it."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """A queue of items; ``most``: how many may wait before the oldest are dropped (None = all are kept)."""

    def __init__(self, items: Iterable[T] = (), most: int | None = None):
        self._items = collections.deque(items, maxlen=most)
        self._more, self._ended = threading.Condition(), False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """Adds an item; never waits for the thread that takes them."""
        with self._more:
            self._items.append(item)
            self._more.notify()

    def end(self) -> None:
        """Says that no more items will come."""
        with self._more:
            self._ended = True
            self._more.notify()

    def take(self) -> T | None:
        """Waits for the next item; None = the end."""
        with self._more:
            self._more.wait_for(lambda: self._items or self._ended)
            return self._items.popleft() if self._items else None
