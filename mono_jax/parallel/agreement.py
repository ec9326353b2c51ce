"""How the processes of a run coordinate outside their steps: barriers, shared errors and values from process 0.

Everything goes through the key-value store of JAX's distributed runtime, not through the devices, so nothing waits for
a step in flight, and no collective can interleave with a step's own in a different order. Every process must make these
calls in the same order, and never within ``together`` or ``first_process_first``, since other processes may have left
those with an error, or may enter them later.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import json
import socket
from collections.abc import Iterator
from typing import Any, Protocol

import jax

from mono_jax.errors import PeerError

FOR_EVER = 7 * 24 * 3600 * 1000  # ms; ``watch`` ends the wait for a lost process
_PREFIX = "mono_jax/agreement"
_number = itertools.count()
_is_inside = contextvars.ContextVar("is_inside", default=False)


class NestedMeeting(RuntimeError):
    """A call within another: with several processes it could wait forever, so it is an error with one process, too."""


class Store(Protocol):
    """The part of the client of JAX's distributed runtime that is used here."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None: ...


def store() -> Store:
    """The client of this process, which ``distributed.joined`` has connected."""
    from jax._src.distributed import global_state  # the only way to the store

    return global_state.client


class Meeting:
    """A sequence of barriers at which an error in one process becomes an error in all."""

    def __init__(self, name: str):
        self._name, self._points, self._told = f"{_PREFIX}/{name}", 0, False

    def pass_on(self, timeout_ms: int = FOR_EVER) -> None:
        """Waits for all processes; raises PeerError that names those that called ``fail``."""
        self._points += 1
        store().wait_at_barrier(self._point, timeout_ms)
        told = sorted((int(key.rsplit("/", 1)[1]), text) for key, text in store().key_value_dir_get(f"{self._point}/"))
        if told:
            raise PeerError("; ".join(text for _, text in told))

    def fail(self, error: BaseException) -> None:
        """Reports ``error`` to the others, once, at the barrier where they wait for this process; not a PeerError,
        which all have."""
        if not isinstance(error, PeerError) and not self._told:
            self._told, self._points = True, self._points + 1
            store().key_value_set(f"{self._point}/{jax.process_index()}", named(error))
            store().wait_at_barrier(self._point, FOR_EVER)

    @property
    def _point(self) -> str:
        return f"{self._name}/{self._points}"


def named(error: BaseException) -> str:
    """``error`` on one line, with the process where it occurred."""
    text = " ".join(str(error).split())[:500] or type(error).__name__
    return f"process {jax.process_index()} on host {socket.gethostname()}: {text}"


def barrier() -> None:
    """Waits until all processes get here."""
    _begin()
    if jax.process_count() > 1:
        Meeting(str(next(_number))).pass_on()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Succeeds on all processes or on none: if it ends with an error on one, it raises PeerError on the others."""
    _begin()
    if jax.process_count() == 1:
        with _inside():
            yield
        return
    meeting = Meeting(str(next(_number)))
    try:
        with _inside():
            yield
    except Exception as error:
        meeting.fail(error)
        error.known_to_all = True  # see ``watch``
        raise
    meeting.pass_on()


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Runs on the first process, then on the others, which find what it left on disk.

    An error in the first process raises PeerError on the others.
    """
    if jax.process_index() != 0:
        with together():
            pass
        with _inside():
            yield
    else:
        with together():
            yield


def from_first(value: Any) -> Any:
    """The first process's ``value`` (JSON-serialisable), on all processes."""
    _begin()
    if jax.process_count() == 1:
        return value
    key = f"{_PREFIX}/{next(_number)}/value"
    if jax.process_index() == 0:
        store().key_value_set(key, json.dumps(value))
    return json.loads(store().blocking_key_value_get(key, FOR_EVER))


def gathered(value: Any) -> list[Any]:
    """Every process's ``value`` (JSON-serialisable), in process order."""
    _begin()
    if jax.process_count() == 1:
        return [value]
    folder = f"{_PREFIX}/{next(_number)}"
    store().key_value_set(f"{folder}/values/{jax.process_index()}", json.dumps(value))
    store().wait_at_barrier(folder, FOR_EVER)
    found = {int(key.rsplit("/", 1)[1]): text for key, text in store().key_value_dir_get(f"{folder}/values/")}
    return [json.loads(found[index]) for index in range(jax.process_count())]


def _begin() -> None:
    if _is_inside.get():
        raise NestedMeeting("processes would meet within together() or first_process_first()")


@contextlib.contextmanager
def _inside() -> Iterator[None]:
    token = _is_inside.set(True)
    try:
        yield
    finally:
        _is_inside.reset(token)
