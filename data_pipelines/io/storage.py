"""Storage that does not answer: what counts as that, how often it is asked again, and how long it is waited for.

Whatever reads bytes raises ``StorageError``; whatever can be done again is called by ``patiently``.
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
_MISSING_STATUS = frozenset([400, 404, 410, 414, 451])  # of HTTP; 401 and 403 are faults of credentials
_LONGEST_PAUSE = 30.0  # seconds between two questions
_LOG_SECONDS = 60.0  # between two lines while storage is waited for
_NAP = 0.1  # seconds
_AWAY = 3  # files in a row that cannot be asked for: then storage as a whole is away
_HOSTS_AWAY = 64  # hosts of the web in a row: then the network is
_log = logging.getLogger(__name__)
_random = random.Random()  # of its own: pauses must not touch anybody's seeded numbers
_closing = 0  # contexts of ``impatient`` that are entered
_given_up = False


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long storage is asked again.

    Attributes:
      retries: number of retries, with pauses that double from ``first_pause`` seconds on.
      wait_s: seconds that storage is waited for after that.
    """

    retries: int = 5
    wait_s: float = 0.0
    first_pause: float = 0.5


_patience = Patience()
_last_line = 0.0


def set_patience(patience: Patience) -> None:
    """Sets what ``patiently`` goes by in this process, which waits again if it had given up."""
    global _patience, _given_up
    _patience, _given_up = patience, False


def is_missing(error: BaseException) -> bool:
    """Whether an error is storage's answer that there is no such file, rather than no answer."""
    if isinstance(error, StorageError):
        return error.missing
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return True
    if isinstance(error, OSError) and error.errno in _MISSING:
        return True
    return getattr(error, "status", None) in _MISSING_STATUS


def storage_error(path: str, error: BaseException, hint: str = "") -> StorageError:
    """The StorageError of an error that a file system has raised for ``path``."""
    if isinstance(error, StorageError):
        return error
    text = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    return StorageError(path, text + (f"; {hint}" if hint else ""), is_missing(error))


@contextlib.contextmanager
def storage(path: str, hint: str = "") -> Iterator[None]:
    """Turns an OSError into the StorageError of the file that it names, otherwise of ``path``."""
    try:
        yield
    except OSError as error:
        named = error.filename2 or error.filename
        raise storage_error(named if isinstance(named, str) else path, error, hint) from None


def patiently(function: Callable[[], T], *, missing: bool = False, forget: Callable[[], None] | None = None) -> T:
    """``function()``, called again while it raises StorageError: after pauses that double, then for ``wait_s`` seconds.

    Args:
      missing: whether a file that is not there is waited for too (it was there before).
      forget: called before each further call, to drop handles that may be stale.

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
    """At most one line a minute, however many threads wait."""
    global _last_line
    now = time.monotonic()
    if not _last_line or now - _last_line >= _LOG_SECONDS:
        _last_line = now
        _log.warning("%s; waiting for this storage, %.0f s more", error, seconds)


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Nobody waits for storage meanwhile, since what is waited for is not wanted any more."""
    global _closing
    _closing += 1
    try:
        yield
    finally:
        _closing -= 1


def give_up(*_: object) -> None:
    """Ends all waiting for storage in this process, until ``set_patience`` is called: what waits raises StorageError.

    Takes no lock and any arguments, so that it may be called by, or be, the handler of a signal.
    """
    global _given_up
    _given_up = True


def _is_leaving() -> bool:
    return _given_up or _closing > 0


def _sleep(seconds: float) -> None:
    """Short naps, since a signal that comes meanwhile may end the waiting."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not _is_leaving():
        time.sleep(min(left, _NAP))


class Questions:
    """Reads many small files where some may not answer: those are told apart from storage that is away as a whole."""

    def __init__(self) -> None:
        self._in_a_row: Counter[str] = Counter()  # questions without an answer, by host, since the last answer of any
        self._dead: Counter[str] = Counter()  # the same since the last answer of that host

    def ask(self, function: Callable[[], T], host: str = "") -> T:
        """``function()``, retried. Raises StorageError: of this file only, or, ``exhausted``, of all storage.

        ``host``: of an address in the web, where a host may be gone for good: it is not retried for ever, and only
        many hosts without an answer mean that the network is away.
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
    """``function()``, retried but not waited for; its StorageError is not ``exhausted``."""
    for number in range(_patience.retries):
        try:
            return function()
        except StorageError as error:
            if error.missing or _is_leaving():
                raise
        _sleep(min(_patience.first_pause * 2**number, _LONGEST_PAUSE) * _random.uniform(0.75, 1.25))
    return function()
