"""Running work in several threads or processes, and locks between processes."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_WATCH_SECONDS = 1.0


def end_with_parent(*_: object) -> None:
    """Makes this process end when its parent dies, however that happens; called by workers when they start.

    On Linux the kernel does this, even during a long call. Elsewhere, and if the parent is already gone, a thread
    checks every second. Takes any arguments, so that it can serve as an initializer.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent.pid,), name="parent-watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def in_processes(function: Callable[..., T], calls: Sequence[tuple], workers: int) -> Iterator[T | None]:
    """``function(*call)`` for every call in order, in ``workers`` processes; None for a call that kills its process.

    Raises what the function raises.
    """
    ready: dict[int, T | None] = {}
    turn = 0
    for number, result in _as_they_come(function, calls, workers):
        ready[number] = result
        while turn in ready:
            yield ready.pop(turn)
            turn += 1


def _as_they_come(function: Callable[..., T], calls: Sequence[tuple], workers: int) -> Iterator[tuple[int, T | None]]:
    """(number, result) of every call. When a process dies, all unfinished calls of its pool are lost.

    Calls start in order, so the one at fault is among the first ``workers`` of these: they are retried one by one, the
    rest in a new pool.
    """
    context = multiprocessing.get_context("spawn")  # threads of the parent do not survive a fork
    left = list(range(len(calls)))
    while left:
        lost = []
        with concurrent.futures.ProcessPoolExecutor(min(workers, len(left)), context, end_with_parent) as pool:
            futures = [_submitted(pool, function, calls[number]) for number in left]
            for number, future in zip(left, futures):
                try:
                    yield number, future.result()
                except BrokenProcessPool:
                    lost.append(number)
        for number in lost[:workers]:
            with concurrent.futures.ProcessPoolExecutor(1, context, end_with_parent) as pool:
                try:
                    yield number, pool.submit(function, *calls[number]).result()
                except BrokenProcessPool:
                    yield number, None
        left = lost[workers:]


def _submitted(
    pool: concurrent.futures.Executor, function: Callable[..., T], call: tuple
) -> concurrent.futures.Future[T]:
    """A call's future, even if the pool is already broken."""
    try:
        return pool.submit(function, *call)
    except BrokenProcessPool as error:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        future.set_exception(error)
        return future


def ahead(function: Callable[..., T], calls: Iterable[tuple], threads: int) -> Iterator[concurrent.futures.Future[T]]:
    """Futures of ``function(*call)`` in order, run by threads that mostly wait for remote storage.

    Up to four per thread are started ahead, so that memory does not grow with the number of calls. If closed early, the
    iterator waits for the running calls and drops the rest.
    """
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[concurrent.futures.Future[T]] = collections.deque()
        try:
            for call in calls:
                waiting.append(pool.submit(function, *call))
                if len(waiting) == 4 * threads:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keeps out other threads and processes of this machine."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough: a process forked since then has the file open too
