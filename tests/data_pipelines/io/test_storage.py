"""Storage that does not answer: retried, waited for, and then an error that names the path."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.errors import StorageError
from data_pipelines.io import blobs, paths, storage
from data_pipelines.io.storage import Patience, Questions, patiently, set_patience


def failing(times: int, missing: bool = False) -> tuple[Callable[[], str], list[float]]:
    """A function that raises that often before it returns, and when it was called."""
    calls: list[float] = []

    def function() -> str:
        calls.append(time.monotonic())
        if len(calls) <= times:
            raise StorageError("/away/a.tar", "Input/output error", missing)
        return "bytes"

    return function, calls


def test_pauses_double() -> None:
    set_patience(Patience(retries=3, first_pause=0.05))
    function, calls = failing(3)
    assert patiently(function) == "bytes"
    pauses = [later - earlier for earlier, later in itertools.pairwise(calls)]
    assert all(0.75 * pause <= found < 1.25 * pause + 0.1 for pause, found in zip((0.05, 0.1, 0.2), pauses))


def test_after_the_retries_storage_is_waited_for(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(storage, "_last_line", 0.0)
    set_patience(Patience(retries=1, wait_s=0.5, first_pause=0.02))
    function, calls = failing(4)
    with caplog.at_level(logging.WARNING):
        assert patiently(function) == "bytes"
    assert len(calls) == 5
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["/away/a.tar: Input/output error; waiting for this storage, 0 s more"]  # one line a minute
    function, calls = failing(10**9)
    with pytest.raises(StorageError, match=r"^/away/a\.tar: Input/output error$") as error:
        patiently(function)
    assert error.value.exhausted and 0.5 < calls[-1] - calls[0] < 5
    count = len(calls)
    with pytest.raises(StorageError):  # an outer call does not wait again
        patiently(lambda: (_ for _ in ()).throw(error.value))
    assert len(calls) == count


def test_a_missing_file_is_waited_for_only_where_it_was_there_before() -> None:
    set_patience(Patience(retries=2, first_pause=0.01))
    function, calls = failing(2, missing=True)
    with pytest.raises(StorageError):
        patiently(function)
    assert len(calls) == 1
    assert patiently(function, missing=True) == "bytes"


def test_handles_are_forgotten_between_tries() -> None:
    set_patience(Patience(retries=2, first_pause=0.01))
    function, calls = failing(2)
    forgotten: list[int] = []
    patiently(function, forget=lambda: forgotten.append(len(calls)))
    assert forgotten == [1, 2]


def test_waiting_ends_when_nobody_wants_the_bytes_any_more() -> None:
    set_patience(Patience(retries=0, wait_s=60))
    function, _ = failing(10**9)
    errors: list[StorageError] = []

    def wait() -> None:
        try:
            patiently(function)
        except StorageError as error:
            errors.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.1)
    with storage.impatient():
        thread.join(timeout=5)
    assert errors and not thread.is_alive()


def test_one_file_that_does_not_answer_is_told_from_storage_that_is_away() -> None:
    set_patience(Patience(retries=1, first_pause=0.01))
    questions = Questions()
    for _ in range(5):
        with pytest.raises(StorageError) as error:
            questions.ask(failing(2)[0])
        assert not error.value.exhausted
        assert questions.ask(failing(1)[0]) == "bytes"
    away = failing(10**9)[0]
    exhausted = []
    for _ in range(3):
        with pytest.raises(StorageError) as error:
            questions.ask(away)
        exhausted.append(error.value.exhausted)
    assert exhausted == [False, False, True]


class Answer(Exception):
    def __init__(self, status: int):
        super().__init__(f"status {status}")
        self.status = status


@pytest.mark.parametrize(
    ("error", "missing"),
    [
        (OSError(errno.EIO, "Input/output error"), False),
        (OSError(errno.ESTALE, "Stale file handle"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.ETIMEDOUT, "Connection timed out"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), True),
        (FileNotFoundError("https://host/a.jpg"), True),
        (Answer(503), False),
        (Answer(404), True),
        (Answer(403), False),
        (Answer(429), False),
        (TimeoutError(), False),
    ],
    ids=repr,
)
def test_kinds_of_errors(error: Exception, missing: bool) -> None:
    found = storage.storage_error("s3://bucket/a", error)
    assert (found.path, found.missing) == ("s3://bucket/a", missing)
    assert str(found).startswith("s3://bucket/a: ") and "\n" not in str(found)
    copy = pickle.loads(pickle.dumps(found))
    assert (str(copy), copy.missing, copy.path) == (str(found), missing, found.path)


def test_a_file_is_opened_again_while_it_is_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_patience(Patience(retries=2, first_pause=0.01))
    path = tmp_path / "a"
    path.write_bytes(bytes(range(200)))
    with blobs.open_file(str(path)) as file:
        assert file.read(3) == b"\0\1\2"
        os.close(file._file.fileno())  # as if the server had closed it
        file._file = open(os.open(os.devnull, os.O_WRONLY), "wb")  # noqa: SIM115  cannot be read from
        assert file.read(2) == b"\3\4"
        assert (file.seek(-1, os.SEEK_END), file.read(), file.read()) == (199, b"\xc7", b"")


def test_a_file_cut_while_it_is_scanned(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(1 << 20))
    with blobs.scan_view(str(path)) as view:
        view.read(0, 10)
        os.truncate(path, 1000)
        with pytest.raises(StorageError, match=r"a: truncated while read: \d+ of 1048576 bytes are left"):
            view.read(1 << 19, 1 << 19)


@pytest.mark.parametrize("size", [100, (1 << 22) + 12345])
def test_marks_of_content(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(os.urandom(size))
    first = blobs.content_mark(str(path))
    os.utime(path, (1, 1))
    assert blobs.content_mark(str(path)) == first
    for place in (0, size - 1):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        assert blobs.content_mark(str(path)) != first
        data[place] ^= 1
        path.write_bytes(data)
    path.write_bytes(path.read_bytes() + b"\0")
    assert blobs.content_mark(str(path)) != first


def test_errors_of_a_folder_are_not_taken_for_its_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> os.stat_result:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(paths.os, "stat", broken)
    for function in (paths.exists, paths.is_dir, paths.stamp):
        with pytest.raises(StorageError, match="Input/output error"):
            function(str(tmp_path / "a"))
