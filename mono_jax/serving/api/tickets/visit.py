"""One client's request from its head to the last byte of its answer: the time that it has, and the bytes it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from mono_jax.serving.api.errors import ApiError
from mono_jax.serving.api.tickets.gate import Gate

T = TypeVar("T")


class Room:
    """Bytes of all requests that are here, ``most`` at a time."""

    def __init__(self, most: int):
        self._most, self.used = most, 0

    def take(self, more: int) -> None:
        """Raises ApiError 429 if there is no room; ``more`` is counted all the same, until it is given back."""
        self.used += more
        if self.used > self._most:
            why = "the requests that are here have too many bytes already"
            raise ApiError(429, why, code="too_many_bytes", retry_s=1, close=True)


class Visit:
    """Begins when it is made.

    Attributes:
      deadline: of the loop's time. timeout_s: how long that is.
      taken: bytes it holds: of its body, of images that it had fetched, of its prompt's pixels.
    """

    def __init__(self, room: Room, gate: Gate, timeout_s: float):
        self._room, self._gate = room, gate
        self.taken, self.timeout_s = 0, timeout_s
        self.deadline = asyncio.get_running_loop().time() + timeout_s
        self._cut: asyncio.Future[ApiError] | None = None

    @property
    def left_s(self) -> float:
        return self.deadline - asyncio.get_running_loop().time()

    def take(self, count: int) -> None:
        """Raises ApiError 429 if there is no room."""
        self.taken += count
        self._room.take(count)

    def end(self) -> None:
        """Gives back what was taken."""
        self._room.used -= self.taken
        self.taken = 0

    def late(self) -> ApiError:
        return ApiError(504, f"not done in {self.timeout_s:g} s", code="timeout")

    def cut(self, why: ApiError) -> None:
        """Ends ``within``."""
        if not self._cut.done():
            self._cut.set_result(why)

    async def within(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, which is cancelled after the time (ApiError 504), and when the server stops (503)."""
        task = asyncio.ensure_future(work)
        self._cut = asyncio.get_running_loop().create_future()
        try:
            self._gate.enter(self)
            await asyncio.wait((task, self._cut), timeout=max(0.0, self.left_s), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self._cut.result() if self._cut.done() else self.late()
        finally:
            self._gate.leave(self)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
