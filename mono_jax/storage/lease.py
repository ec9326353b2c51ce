"""Allows one run at a time on a workdir in a bucket, by an object that names the holder and is renewed while the run
lives.

Buckets have no locks that are tied to a process. So the object WORKDIR/.lock is created only if there is none, and
renewed every ``BEAT`` seconds only if it is still the one that this run wrote (with conditional writes, which GCS and
S3 support). A holder that does not renew it while it is watched for ``STALE`` seconds is considered dead.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from data_pipelines.errors import StorageError
from mono_jax.errors import CheckpointError
from mono_jax.storage.objects import MISSING, ObjectPath

BEAT = 20.0  # seconds
STALE = 60.0


class Lease:
    """The lease on a workdir; call ``check`` before writing anything that would disturb another run."""

    def __init__(self, file: ObjectPath, on_loss: Callable[[], None] = lambda: None):
        self._file, self._on_loss = file, on_loss
        self._me = {"id": uuid.uuid4().hex, **this_process()}
        self._generation = MISSING
        self._lost = ""

    @property
    def is_lost(self) -> bool:
        return bool(self._lost)

    def check(self) -> None:
        """Raises CheckpointError once another run has taken over the workdir."""
        if self.is_lost:
            raise CheckpointError(f"{self._file.parent}: taken over by {self._lost}: this run must not write there")

    def take(self, say: Callable[[str], None]) -> None:
        """Takes the lease. Raises CheckpointError that names the holder, if it is alive."""
        for _ in range(3):  # retried if another process is slightly faster
            found, generation = self._read()
            if found is not None and self._lives(found, generation, say):
                raise CheckpointError(
                    f"{self._file.parent}: in use by {holder(found)}: wait for it, or use another workdir"
                )
            if self._write(generation):
                if found is not None:
                    say(f"{self._file.parent}: taken over from {holder(found)}, which is gone")
                return
        raise CheckpointError(f"{self._file.parent}: in use by {holder(self._read()[0])}: use another workdir")

    def renew(self) -> None:
        """Renews the lease. Raises StorageError if storage does not answer; a lost lease is reported by ``check``."""
        if not self._lost and not self._write(self._generation):
            self._lost = holder(self._read()[0])
            self._on_loss()

    def release(self) -> None:
        if not self._lost:
            with contextlib.suppress(StorageError):  # then it becomes stale
                self._file.write_if(None, self._generation)

    def _lives(self, found: dict[str, Any], generation: bytes, say: Callable[[str], None]) -> bool:
        if found.get("host") == self._me["host"]:
            if not _is_running(found.get("pid")):
                return False
            if time.time() - found.get("beat", 0.0) < STALE:
                return True  # otherwise another process may have got its pid
        say(f"{self._file.parent}: in use by {holder(found)}: waiting up to {STALE:.0f} s for a sign of life")
        end = time.monotonic() + STALE
        while time.monotonic() < end:  # clocks of two hosts may differ, so only changes observed here count
            time.sleep(min(STALE / 20, 5.0))
            if self._read()[1] != generation:
                return True
        return False

    def _read(self) -> tuple[dict[str, Any] | None, bytes]:
        """The object's content (None if there is none) and its generation."""
        try:
            data, generation = self._file.read_generation()
        except FileNotFoundError:
            return None, MISSING
        try:
            return dict(json.loads(data)), generation
        except (ValueError, TypeError, RecursionError):
            return {}, generation

    def _write(self, generation: bytes) -> bool:
        """Whether the object, which had ``generation``, is now ours."""
        written = self._file.write_if(json.dumps(self._me | {"beat": time.time()}).encode(), generation)
        if written is None:  # it may still be ours: the answer to a first attempt may have been lost
            found, written = self._read()
            if found is None or found.get("id") != self._me["id"]:
                return False
        self._generation = written
        return True


def this_process() -> dict[str, Any]:
    """What a lock says about its holder."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def holder(found: Any) -> str:
    """A readable description of the process that ``this_process`` recorded; "another process" for a damaged lock."""
    try:
        return f"pid {found['pid']} on host {found['host']} since {found['since']}"
    except (KeyError, TypeError):
        return "another process"


def _is_running(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except OSError:
        pass  # another user's process
    return True


@contextlib.contextmanager
def held(file: ObjectPath, say: Callable[[str], None], on_loss: Callable[[], None] = lambda: None) -> Iterator[Lease]:
    """Context that holds the lease; ``on_loss`` is called once if another run takes it over.

    Raises CheckpointError that names the holder.
    """
    lease = Lease(file, on_loss)
    lease.take(say)
    try:
        with repeated(lease.renew, BEAT):
            yield lease
    finally:
        lease.release()


@contextlib.contextmanager
def repeated(function: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls ``function`` every ``seconds`` in a thread; if storage does not answer, it is retried the next time."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            with contextlib.suppress(StorageError, OSError):
                function()

    thread = threading.Thread(target=repeat, name="repeated", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)  # it may be waiting for storage
