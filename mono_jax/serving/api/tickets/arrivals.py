"""The requests whose bodies are still arriving. Those that stall give way to others once a limit is reached."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mono_jax.serving.api.errors import ApiError

_STALLED_S = 1.0  # without progress
_PROGRESS = 1 << 14  # bytes: a client that sends one now and then makes no progress


class Arrival:
    """One body; all calls are made in the event loop.

    Attributes:
      refused: why no more of it is received; None = it is.
      timeout: of the wait for its next bytes; None = nothing waits for them now.
      moved_s: when it last made progress, in the event loop's time.
    """

    def __init__(self, release: Callable[[], None]):
        """``release``: gives back the bytes that it has taken."""
        self.refused: ApiError | None = None
        self.timeout: asyncio.Timeout | None = None
        self.moved_s = asyncio.get_running_loop().time()
        self._release, self._new = release, 0

    def moved(self, count: int) -> bool:
        """Whether these bytes, with those before them, are progress."""
        self._new += count
        if self._new < _PROGRESS:
            return False
        self._new, self.moved_s = 0, asyncio.get_running_loop().time()
        return True

    def refuse(self, why: ApiError) -> None:
        """Ends the wait for the rest of it."""
        self.refused = why
        self._release()
        if self.timeout is not None:
            self.timeout.reschedule(0.0)


class Arrivals:
    """At most ``most`` of them, ordered by their last progress."""

    def __init__(self, most: int):
        self._most = most
        self._inside: dict[Arrival, None] = {}

    def enter(self, one: Arrival) -> None:
        """Raises ApiError 429 if there are too many, none of which stalls."""
        if len(self._inside) >= self._most and not self.drop():
            why = f"the bodies of {self._most} requests are already arriving"
            raise ApiError(429, why, code="too_many_requests", retry_s=1, close=True)
        self._inside[one] = None

    def moved(self, one: Arrival, count: int) -> None:
        """Notes ``count`` new bytes of a body."""
        if one in self._inside and one.moved(count):
            del self._inside[one]
            self._inside[one] = None

    def leave(self, one: Arrival) -> None:
        self._inside.pop(one, None)

    def drop(self) -> bool:
        """Refuses the rest of the body that has made no progress for longest; False if none stalls."""
        first = next(iter(self._inside), None)
        if first is None or asyncio.get_running_loop().time() - first.moved_s < _STALLED_S:
            return False
        del self._inside[first]
        first.refuse(ApiError(408, "the body arrived too slowly while others waited", code="timeout", close=True))
        return True
