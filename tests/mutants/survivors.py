"""Faults that tests need not notice, each with the reason; they are counted by themselves."""

from __future__ import annotations

import dataclasses

from tests.mutants.faults import Fault


@dataclasses.dataclass(frozen=True)
class Harmless:
    """The change ``change`` in a line ``source`` of ``file`` (any column)."""

    file: str
    source: str
    change: str
    reason: str


HARMLESS: tuple[Harmless, ...] = ()


def reason_of(fault: Fault) -> str:
    """Why the fault does no harm; "" if it does."""
    for known in HARMLESS:
        if (known.file, known.source, known.change) == (fault.file, fault.source, fault.change):
            return known.reason
    return ""
