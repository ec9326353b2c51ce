"""Keeps track of running requests, so that a server that shuts down can refuse new ones and cut off the last ones."""

from __future__ import annotations

from typing import Protocol

from mono_jax.serving.api.errors import ApiError


class Cuttable(Protocol):
    def cut(self, why: ApiError) -> None: ...


class Gate:
    """Admits requests until it is closed."""

    def __init__(self) -> None:
        self._inside: set[Cuttable] = set()
        self.closed = False

    def check(self) -> None:
        """Raises ApiError 503 once it is closed."""
        if self.closed:
            raise _stopping()

    def enter(self, one: Cuttable) -> None:
        """Admits a request; raises as ``check``."""
        self.check()
        self._inside.add(one)

    def leave(self, one: Cuttable) -> None:
        self._inside.discard(one)

    def close(self) -> None:
        self.closed = True

    def cut(self) -> None:
        """Cuts off all requests inside."""
        for one in list(self._inside):
            one.cut(_stopping())


def _stopping() -> ApiError:
    return ApiError(503, "the server is shutting down", code="stopping", retry_s=5)
