"""What the kernels raise besides ValueError."""

from __future__ import annotations


class Unavailable(Exception):
    """Something this machine cannot do; the message says what is missing."""
