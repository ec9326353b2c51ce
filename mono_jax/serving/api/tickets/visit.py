"""A client's request from its headers to the last byte of its answer: its deadline, and the bytes it holds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from mono_jax.serving.api.errors import ApiError
from mono_jax.serving.api.tickets.gate import Gate

T = TypeVar("T")


class Room:
    """Accounts for the bytes held by all requests in progress, at most ``most`` at a time.

    reclaim: makes one of them give its bytes back; False if none can.
    """

    def __init__(self, most: int, reclaim: Callable[[], bool]):
        self._most, self._reclaim, self.used = most, reclaim, 0

    def take(self, more: int) -> None:
        """Raises ApiError 429 if there is no room; ``more`` is counted even then, until it is given back."""
        while self.used + more > self._most and self._reclaim():
            pass
        self.used += more
        if self.used > self._most:
            why = "the requests in progress already hold too many bytes"
            raise ApiError(429, why, code="too_many_bytes", retry_s=1, close=True)


class Visit:
    """Starts at construction.

    Attributes:
      started: ``time.perf_counter`` then.
      deadline: in the event loop's time. timeout_s: the seconds from the start to the deadline.
      taken: the bytes it holds: its body, the images fetched for it, the pixels of its prompt, its log-probabilities.
    """

    def __init__(self, room: Room, gate: Gate, timeout_s: float):
        self._room, self._gate = room, gate
        self.taken, self.timeout_s, self.started = 0, timeout_s, time.perf_counter()
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
        """Gives back the bytes taken."""
        self._room.used -= self.taken
        self.taken = 0

    def late(self) -> ApiError:
        return ApiError(504, f"not finished within {self.timeout_s:g} s", code="timeout")

    def cut(self, why: ApiError) -> None:
        """Ends ``within``."""
        if not self._cut.done():
            self._cut.set_result(why)

    async def in_time(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, cancelled at the deadline (ApiError 504), but not when the server shuts down."""
        try:
            async with asyncio.timeout(max(0.0, self.left_s)):
                return await work
        except TimeoutError:
            raise self.late() from None

    async def within(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, cancelled at the deadline (ApiError 504) or when the server shuts down (503)."""
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
