"""Ends a process whose peers are lost, instead of letting it wait for them forever.

Every process sends the others a heartbeat every ``BEAT`` seconds through the key-value store of JAX's distributed
runtime. If one has not been heard from for ``LOST_AFTER`` seconds, or reports that it ended with an error, all of them
end: their devices wait in a collective that cannot finish, so nothing could be saved, and the newest checkpoint is the
one to resume from. If process 0, which hosts the store, is killed, JAX's runtime aborts the others at once; then only
an exit code and a message are added.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from mono_jax.parallel.agreement import FOR_EVER, Store, store

BEAT = 3  # seconds
_SIDE_BY_SIDE = 5  # seconds that a process ending with an error waits for others that do the same
LOST_AFTER = 30  # seconds
_ANSWER = 10  # the store answers within this many seconds unless the connection is cut
PEER_LOST = 76  # exit code: another process was lost; run the same command again to resume (EX_PROTOCOL)
_BEATS, _ENDED = "mono_jax/beat/", "mono_jax/ended/"
_ADVICE = "; stopping; run again to resume from the newest checkpoint"
_kept: list[object] = []  # objects that C code holds pointers to


def explain_aborts() -> None:
    """Turns the runtime's abort of this process, when process 0 is gone, into an exit with a message that says so."""
    from jax._src.distributed import global_state

    host, port = str(global_state.coordinator_address).rsplit(":", 1)
    libc = ctypes.CDLL(None)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(_: int) -> None:
        try:
            socket.create_connection((host, int(port)), timeout=3).close()
        except OSError:
            _leave(f"process 0 on {host} is lost{_ADVICE}")
        libc.signal(signal.SIGABRT, 0)  # another reason: abort as usual

    _kept.append(aborted)
    libc.signal(signal.SIGABRT, aborted)


def _leave(message: str) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(PEER_LOST)


class Watch:
    """Sends and checks heartbeats in threads while the context is active. An error that leaves the context is
    reported."""

    def __init__(
        self,
        process: int,
        processes: int,
        host: str,
        connection: Store | None = None,
        leave: Callable[[str], None] = _leave,
        beat: float = BEAT,
        lost_after: float = LOST_AFTER,
    ):
        self._process, self._host = process, host
        self._store, self._leave, self._beat, self._lost_after = connection or store(), leave, beat, lost_after
        self._stop = threading.Event()
        self._ending = False
        self._hosts: dict[int, str] = {}
        self._ended: dict[int, dict[str, Any]] = {}
        self._heard = dict.fromkeys(range(processes), time.monotonic())
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._beats = threading.Thread(target=self._talk, name="beats", daemon=True)

    def __enter__(self) -> Watch:
        self._heard = dict.fromkeys(self._heard, time.monotonic())
        self._thread.start()
        self._beats.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wait = FOR_EVER  # the first process may upload or score for hours; the threads end the wait for a lost one
        if error is not None and not isinstance(error, SystemExit):
            if _by_others(error):
                self._stop.wait(2 * self._lost_after)  # the thread finds out which process it was, and exits
            self._ending, wait = True, 1000 * _SIDE_BY_SIDE
            if not getattr(error, "known_to_all", False):
                self._tell(f"{type(error).__name__}: {error}")
        with contextlib.suppress(Exception):  # the first process keeps the store until all have arrived
            self._store.wait_at_barrier("mono_jax/end", timeout_in_ms=wait)
        self._stop.set()
        self._thread.join()
        self._beats.join(_ANSWER)  # a thread that returns from C++ after Python's shutdown kills the process

    def _tell(self, message: str) -> None:
        with contextlib.suppress(Exception):  # the store may be gone
            value = json.dumps({"host": self._host, "error": " ".join(message.split())[:500]})
            self._store.key_value_set(f"{_ENDED}{self._process}", value, allow_overwrite=True)

    def _run(self) -> None:
        """Looks for lost processes; another thread talks to the store, because a cut connection would block it."""
        while not self._stop.wait(self._beat):
            if lost := self._lost(time.monotonic()):
                self._leave(f"{lost}{_ADVICE}")
                return

    def _talk(self) -> None:
        seen: dict[int, int] = {}
        for number in itertools.count():
            with contextlib.suppress(Exception):  # runtime errors of any kind: the store is unreachable
                beat = json.dumps({"host": self._host, "number": number})
                self._store.key_value_set(f"{_BEATS}{self._process}", beat, allow_overwrite=True)
                beats, self._ended = (self._read(prefix) for prefix in (_BEATS, _ENDED))
                self._heard[0] = now = time.monotonic()  # process 0 hosts the store
                for other, value in beats.items():
                    self._hosts[other] = value["host"]
                    if seen.get(other) != value["number"]:
                        seen[other], self._heard[other] = value["number"], now
            if self._stop.wait(self._beat):
                return

    def _read(self, prefix: str) -> dict[int, dict[str, Any]]:
        found = self._store.key_value_dir_get(prefix)
        return {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in found}

    def _lost(self, now: float) -> str | None:
        for other, value in dict(self._ended).items():
            if other != self._process and not self._ending:
                return f"process {other} on host {value['host']} ended: {value['error']}"
        for other, when in dict(self._heard).items():
            if other != self._process and now - when > self._lost_after:
                host = f" on host {self._hosts[other]}" if other in self._hosts else ""
                return f"process {other}{host} has not been heard from for {now - when:.0f} s"
        return None


def _by_others(error: BaseException) -> bool:
    """Whether ``error`` may come from a collective that another process did not join."""
    words = ("Gloo", "NCCL", "collective", "DEADLINE_EXCEEDED", "UNAVAILABLE", "Connection", "heartbeat", "peer")
    return any(word in str(error) for word in words) and "RESOURCE_EXHAUSTED" not in str(error)
