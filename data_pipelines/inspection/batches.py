"""The batches that a config yields: their hashes, occupancy, skipped samples, and an HTML page."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.batch import Batch, boundaries
from data_pipelines.errors import DataError
from data_pipelines.inspection.page import page
from data_pipelines.loading.packed_data import PackedData

Say = Callable[[str], None]


def batch_hash(batch: Batch) -> str:
    """SHA-256 of all fields: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        array = np.ascontiguousarray(batch[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def global_batches(data: PackedData, start: int, steps: int, hosts: int) -> Iterator[tuple[int, Batch]]:
    """(step, global batch), joined from the parts that each of ``hosts`` hosts makes."""
    if not 1 <= hosts <= data.batch_size:
        raise DataError(f"data.batch_size is {data.batch_size}: it cannot be split over {hosts} hosts")
    borders = [data.batch_size * host // hosts for host in range(hosts + 1)]
    with contextlib.ExitStack() as stack:
        parts = [
            stack.enter_context(contextlib.closing(data.iterate(start, range(first, end))))
            for first, end in itertools.pairwise(borders)
        ]
        for step, items in zip(range(start, start + steps), zip(*parts)):
            if any(item[0] != step for item in items):
                raise DataError(f"hosts disagree: step {step} expected, got {[item[0] for item in items]}")
            yield step, {name: np.concatenate([item[1][name] for item in items]) for name in items[0][1]}


@dataclasses.dataclass
class Occupancy:
    """Slots and tokens of the batches so far; index 0 = visual, 1 = text."""

    slots: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2, np.int64))
    tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2, np.int64))

    def add(self, batch: Batch) -> tuple[int, int]:
        """Adds a batch; returns its visual and text tokens."""
        ends = boundaries(batch)
        is_text = (batch["order"] >= ends[:, None])[batch["segments"] > 0]
        visual, text = np.count_nonzero(~is_text), np.count_nonzero(is_text)
        self.tokens += visual, text
        self.slots += ends.sum(), (batch["order"].shape[1] - ends).sum()
        return visual, text

    def shares(self) -> dict[str, float | None]:
        """Share of the slots that hold tokens; None for visual slots where there are none."""
        visual, text = (self.tokens / np.maximum(self.slots, 1)).tolist()
        return {"visual_occupancy": visual if self.slots[0] else None, "text_occupancy": text}


def inspect(
    data: PackedData,
    start: int = 0,
    steps: int = 4,
    hosts: int = 1,
    html: Path | None = None,
    html_rows: int = 8,
    say: Say = print,
) -> dict[str, Any]:
    """Makes ``steps`` batches, host by host, reports a line for each, and returns the figures.

    ``html``: file for a page with the first ``html_rows`` rows of each step.
    """
    hashes, shown, occupancy = [], [], Occupancy()
    started = time.perf_counter()
    for step, batch in global_batches(data, start, steps, hosts):
        data.spec.check(batch)
        hashes.append({"step": step, "sha256": batch_hash(batch)})
        visual, text = occupancy.add(batch)
        say(f"step {step}  {hashes[-1]['sha256'][:16]}  {visual} visual and {text} text tokens")
        if html:
            shown.append((step, {name: array[:html_rows].copy() for name, array in batch.items()}))
    result = {
        "steps": hashes,
        **occupancy.shares(),
        "samples": data.report.samples,
        "skipped": dict(data.report.skipped),
        "problems": {c.name: s.problems() for c, s in zip(data.config.sources, data.sources) if s.problems()},
        "filtered": {c.name: s.dropped() for c, s in zip(data.config.sources, data.sources) if s.dropped()},
        "seconds": round(time.perf_counter() - started, 3),
        "wait_seconds": round(data.report.wait_seconds, 3),
    }
    for key, reason, detail in data.report.bad[:20]:
        say(f"skipped {key}: {reason} {detail}")
    say(
        f"{len(hashes)} steps, {result['samples']} samples, skipped {result['skipped']}, occupancy: "
        f"visual {_percent(result['visual_occupancy'])}, text {_percent(result['text_occupancy'])}"
    )
    if html:
        names = ("visual_occupancy", "text_occupancy", "samples", "skipped")
        facts = [("identity", data.identity), *((name, short(result[name])) for name in names)]
        skipped = data.report.bad
        html.write_text(page("Packed rows", shown, data.geometry, data.tokenizer, facts, skipped, html_rows), "utf-8")
        say(f"wrote {html}")
    return result


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"


def short(value: Any) -> str:
    """For a line or a cell of a table."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
