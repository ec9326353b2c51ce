"""What a thread is to send, handed to it by the run, which never waits for it."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Items in order; ``most``: how many wait at most, the oldest give way (None = all are kept)."""

    def __init__(self, items: Iterable[T] = (), most: int | None = None):
        self._items = collections.deque(items, maxlen=most)
        self._more, self._ended = threading.Condition(), False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """Never waits for the thread that takes."""
        with self._more:
            self._items.append(item)
            self._more.notify()

    def end(self) -> None:
        """Nothing more will come."""
        with self._more:
            self._ended = True
            self._more.notify()

    def take(self) -> T | None:
        """The next item, once there is one; None = the end."""
        with self._more:
            self._more.wait_for(lambda: self._items or self._ended)
            return self._items.popleft() if self._items else None
