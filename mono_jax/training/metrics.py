"""What a run reports: the console line and metrics.jsonl.

metrics.jsonl is the primary record: one object per logged step, each step once. Its views (``training.sinks``) are
filled from it when a run starts. None of them ends a run: records that cannot be written are kept and retried with the
next one.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeGuard

from data_pipelines.io import publish
from mono_jax.errors import CheckpointError
from mono_jax.training.appender import Appender, Say

Record = Mapping[str, Any]


class Sink(Protocol):
    """A view of the records. Its methods neither raise nor block."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


# Makes a view of the existing records; None = it cannot be made, which is reported.
MakeSink = Callable[[Sequence[Record]], Sink | None]


def numbers(record: Record) -> dict[str, float]:
    """The values of a record that a view can plot."""
    return {
        name: value
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m, 4d03h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


def is_finite(value: float | None) -> TypeGuard[float]:
    """Whether ``value`` was measured and is finite; records have None for what is not finite."""
    return value is not None and math.isfinite(value)


def newest(records: Sequence[Record], name: str) -> float | None:
    """The newest finite value of ``name`` in records of metrics.jsonl; None if there is none."""
    return next((record[name] for record in reversed(records) if record.get(name) is not None), None)


def decimal(value: float | None, digits: int) -> str:
    """``value`` with that many decimals; "unknown" for None."""
    return "unknown" if value is None else f"{value:.{digits}f}"


def console_line(stage: str, steps: int, record: Mapping[str, Any]) -> str:
    """One line of progress from a record of metrics.jsonl."""
    parts = [
        f"{stage} step {record['step']:>{len(str(steps))}}/{steps}",
        f"loss {record['loss']:.4f}",
        f"grad {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_s']:,.0f} tokens/s",
        *([] if record.get("mfu") is None else [f"MFU {record['mfu']:.1%}"]),
        f"data wait {record['data_wait']:.1%}",
        f"ETA {duration(record['eta_s'])}",
    ]
    if record.get("skipped"):
        parts.append(f"skipped updates {record['skipped']}")
    if record.get("bad_samples"):
        reasons = {name.removeprefix("bad/"): count for name, count in record.items() if name.startswith("bad/")}
        most = sorted(reasons.items(), key=lambda item: -item[1])[:3]
        listed = ", ".join(f"{reason} {count:,}" for reason, count in most) + (", ..." if len(reasons) > 3 else "")
        total = record["samples"] + record["bad_samples"]
        parts.append(f"bad samples {record['bad_samples']:,} of {total:,}" + (f" ({listed})" if listed else ""))
    return "  ".join(parts)


class MetricsWriter:
    """Appends records to ``directory/metrics.jsonl`` and to views of it; only process 0 should have one.

    Records of steps after ``start_step`` (from an interrupted run that got further than its last checkpoint) are
    dropped, so that every step is recorded once. Raises CheckpointError if the folder cannot be written at the start.
    """

    def __init__(self, directory: Path, start_step: int = 0, warn: Say = print, views: Sequence[MakeSink] = ()):
        path = directory / "metrics.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            kept = [record for record in read_metrics(path) if record["step"] <= start_step]
            publish.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot write metrics: {error.strerror}") from None
        self._records = Appender(path, "metrics", warn)
        self._views = [view for make in views if (view := make(kept)) is not None]

    def write(self, record: Record) -> None:
        """Writes a record with "step"; non-finite values become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._records.write(json.dumps(clean).encode() + b"\n")
        for view in self._views:
            view.write(clean)

    def close(self) -> None:
        self._records.close()
        for view in self._views:
            view.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, by step; [] if there is none.

    Lines that are not a record (truncated by a kill, or damaged) are skipped, and for a step written twice, the last
    record counts.
    """
    if not path.exists():
        return []
    records: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            step = record.get("step") if isinstance(record, dict) else None
            if isinstance(step, int) and not isinstance(step, bool):
                records[step] = record
    return [records[step] for step in sorted(records)]
