"""Storage that does not answer: what counts as that, how often requests are retried, and how long to wait.

Whatever reads bytes raises ``StorageError``; whatever can be retried is called through ``patiently``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

from data_pipelines.errors import StorageError

T = TypeVar("T")

_MISSING = frozenset([errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP])
_MISSING_STATUS = frozenset([400, 404, 410, 414, 451])  # of HTTP; 401 and 403 are credential errors
_LONGEST_PAUSE = 30.0  # seconds between two requests
_LOG_SECONDS = 60.0  # seconds between two log lines while waiting for storage
_NAP = 0.1  # seconds
_AWAY = 3  # consecutive files without an answer after which storage as a whole counts as unavailable
_HOSTS_AWAY = 64  # consecutive web hosts without an answer after which the network counts as unavailable
_log = logging.getLogger(__name__)
_random = random.Random()  # separate, since pauses must not affect any seeded random numbers
_closing = 0  # ``impatient`` contexts currently entered
_given_up = False


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long requests to storage are retried.

    Attributes:
      retries: number of retries, with pauses that start at ``first_pause`` seconds and double.
      wait_s: seconds to wait for storage after that.
    """

    retries: int = 5
    wait_s: float = 0.0
    first_pause: float = 0.5


_patience = Patience()
_last_line = 0.0


def set_patience(patience: Patience) -> None:
    """Sets the patience of ``patiently`` in this process, which waits again if it had given up."""
    global _patience, _given_up
    _patience, _given_up = patience, False


def is_missing(error: BaseException) -> bool:
    """Whether an error is an answer from storage that the file does not exist, rather than the lack of an answer."""
    if isinstance(error, StorageError):
        return error.missing
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return True
    if isinstance(error, OSError) and error.errno in _MISSING:
        return True
    return getattr(error, "status", None) in _MISSING_STATUS


def storage_error(path: str, error: BaseException, hint: str = "") -> StorageError:
    """The StorageError for an error that a file system raised for ``path``."""
    if isinstance(error, StorageError):
        return error
    text = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    return StorageError(path, text + (f"; {hint}" if hint else ""), is_missing(error))


@contextlib.contextmanager
def storage(path: str, hint: str = "") -> Iterator[None]:
    """Turns an OSError into a StorageError for the file that it names, or else for ``path``."""
    try:
        yield
    except OSError as error:
        named = error.filename2 or error.filename
        raise storage_error(named if isinstance(named, str) else path, error, hint) from None


def patiently(function: Callable[[], T], *, missing: bool = False, forget: Callable[[], None] | None = None) -> T:
    """``function()``, retried while it raises StorageError: with pauses that double, then for ``wait_s`` seconds.

    Args:
      missing: whether to wait for a missing file too (because it existed before).
      forget: called before each retry, to drop handles that may be stale.

    Raises StorageError once patience is exhausted, and whatever else the function raises.
    """
    patience, tries, deadline = _patience, 0, None
    while True:
        try:
            return function()
        except StorageError as error:
            if error.exhausted or (error.missing and not missing):
                raise
            now = time.monotonic()
            if tries >= patience.retries and deadline is None:
                deadline = now + patience.wait_s
            if (deadline is not None and now >= deadline) or _is_leaving():
                error.exhausted = True
                raise
            pause = min(patience.first_pause * 2**tries, _LONGEST_PAUSE) * _random.uniform(0.75, 1.25)
            if deadline is not None:
                _log_waiting(error, deadline - now)
                pause = min(pause, deadline - now)
        tries += 1
        _sleep(pause)
        if forget is not None:
            forget()


def _log_waiting(error: StorageError, seconds: float) -> None:
    """At most one line per minute, however many threads wait."""
    global _last_line
    now = time.monotonic()
    if not _last_line or now - _last_line >= _LOG_SECONDS:
        _last_line = now
        _log.warning("%s; waiting for this storage, %.0f s more", error, seconds)


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Nothing waits for storage inside this context, since the results are no longer needed."""
    global _closing
    _closing += 1
    try:
        yield
    finally:
        _closing -= 1


def give_up(*_: object) -> None:
    """Ends all waiting for storage in this process until ``set_patience`` is called; waiting calls raise StorageError.

    Takes no lock and accepts any arguments, so that it may be called by a signal handler, or be one.
    """
    global _given_up
    _given_up = True


def _is_leaving() -> bool:
    return _given_up or _closing > 0


def _sleep(seconds: float) -> None:
    """Sleeps in short naps, since a signal may end the waiting."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not _is_leaving():
        time.sleep(min(left, _NAP))


class Questions:
    """Reads many small files, some of which may not answer; these are distinguished from storage being unavailable."""

    def __init__(self) -> None:
        self._in_a_row: Counter[str] = Counter()  # unanswered requests by host, since the last answer of any host
        self._dead: Counter[str] = Counter()  # the same, since the last answer of that host

    def ask(self, function: Callable[[], T], host: str = "") -> T:
        """``function()``, retried. Raises StorageError: for this file only or, if ``exhausted``, for all storage.

        ``host``: of a web address. A host may be gone for good, so it is not retried forever, and only many hosts
        without an answer mean that the network is unavailable.
        """
        try:
            result = function() if host and self._dead[host] >= _AWAY else _retried(function)
        except StorageError as error:
            if error.missing:
                self._answered(host)
                raise
            self._in_a_row[host] += 1
            self._dead[host] += 1
            if len(self._in_a_row) < _HOSTS_AWAY if host else self._in_a_row[host] < _AWAY:
                raise
            result = patiently(function)
        self._answered(host)
        return result

    def _answered(self, host: str) -> None:
        self._in_a_row.clear()
        self._dead.pop(host, None)


def _retried(function: Callable[[], T]) -> T:
    """``function()``, retried without further waiting; its StorageError is not ``exhausted``."""
    for number in range(_patience.retries):
        try:
            return function()
        except StorageError as error:
            if error.missing or _is_leaving():
                raise
        _sleep(min(_patience.first_pause * 2**number, _LONGEST_PAUSE) * _random.uniform(0.75, 1.25))
    return function()
