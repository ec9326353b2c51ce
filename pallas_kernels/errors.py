"""What the kernels raise besides ValueError, and how errors are displayed."""

from __future__ import annotations


class Unavailable(Exception):
    """Something this machine cannot do; the message says what is missing."""


def one_line(error: Exception) -> str:
    """The error's type and message, truncated, for a table or a record."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
