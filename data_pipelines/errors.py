"""The kinds of data errors: a bad sample (skipped and counted), a user error, and storage that does not answer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BadSample(Exception):
    """One sample cannot be used. It is skipped, counted under ``reason`` and listed by ``key``.

    Attributes:
      reason: short_snake_case, from a small closed set, so that it can be counted ("truncated_image", ...).
      key: the sample's key; empty where it is not known (a caller that knows it fills it in).
      detail: exactly what was found, for the report.
    """

    def __init__(self, reason: str, key: str = "", detail: str = ""):
        super().__init__(reason, key, detail)  # all three, so that the exception survives pickling
        self.reason = reason
        self.key = key
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.key or 'sample'}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class DataError(Exception):
    """The user asked for something impossible. The message is one line: which file or key, and how to fix it."""


class StorageError(DataError):
    """Bytes that could not be read, or that differ from those indexed: storage is unavailable, or a file changed.

    This says nothing about samples: the read is retried and waited for (see ``io.storage``), and then ends the run.

    Attributes:
      path: of the file or folder.
      detail: what happened.
      missing: whether storage did answer that there is no such file.
      exhausted: whether retrying and waiting have already been tried.
    """

    def __init__(self, path: str, detail: str = "", missing: bool = False):
        super().__init__(path, detail, missing)  # all of them, so that the exception survives pickling
        self.path = path
        self.detail = detail
        self.missing = missing
        self.exhausted = False

    def __str__(self) -> str:
        return " ".join(f"{self.path}: {self.detail}".split())


def check_keys(given: Iterable[str], valid: Iterable[str], what: str) -> None:
    """Raises a DataError that names the first unknown key of ``given`` and the nearest valid one."""
    valid = sorted(valid)
    for key in given:
        if key not in valid:
            raise DataError(f"{what}: unknown key {key!r}; {did_you_mean(key, valid)}")


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """ "did you mean 'x'?" if one of ``valid`` is similar to ``word``, otherwise the list of valid words."""
    valid = sorted(valid)
    near = difflib.get_close_matches(str(word), valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(valid)}"
