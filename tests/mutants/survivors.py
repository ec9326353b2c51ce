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


HARMLESS: tuple[Harmless, ...] = (
    Harmless(
        "data_pipelines/packing/pack.py",
        "self.visual_room, self.text_room = np.zeros(0, np.int64), np.zeros(0, np.int64)",
        "zeros -> ones",
        "arrays without elements",
    ),
    Harmless(
        "data_pipelines/packing/pack.py",
        "giving = self._first_of_row(giving[self.text[giving] <= takes.max(initial=0)], -self.text)",
        "0 -> 1",
        "counts only where nothing takes; then nothing is exchanged",
    ),
    Harmless(
        "data_pipelines/loading/packed_data.py",
        "todo = epochs * self.plan.blocks_per_epoch - len(self.plan.counts)",
        "- -> +",
        "from where on worker processes help to count: the counts are the same",
    ),
    Harmless(
        "mono_jax/parallel/mesh.py",
        "sizes[open_axis] = len(devices) // known if known else 0",
        "0 -> 1",
        "MeshConfig refuses an axis of 0, so that there is always a product of the known ones",
    ),
    Harmless(
        "mono_jax/training/callbacks/recorder.py",
        "pending.seconds = max(now - self._since, 1e-9) / len(new)",
        "now - self._since, 1e-9 -> 1e-9, now - self._since",
        "the larger of two numbers, in any order",
    ),
    Harmless(
        "mono_jax/training/callbacks/recorder.py",
        "pending.seconds = max(now - self._since, 1e-9) / len(new)",
        "1e-9 -> 2e-09",
        "any small number keeps the division possible",
    ),
    Harmless(
        "mono_jax/weights/convert.py",
        'print(f"\\r{done}/{total} {path:50}", end="" if done < total else "\\n", file=sys.stderr, flush=True)',
        "< -> <=",
        "the end of a line of progress",
    ),
)


def reason_of(fault: Fault) -> str:
    """Why the fault does no harm; "" if it does."""
    for known in HARMLESS:
        if (known.file, known.source, known.change) == (fault.file, fault.source, fault.change):
            return known.reason
    return ""
