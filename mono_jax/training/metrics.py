"""What a run reports: the console line, metrics.jsonl, TensorBoard.

metrics.jsonl is the record: one object per logged step, each step once. TensorBoard's event file is made from it when
a run starts, so that what an interrupted run did not write is filled in. Neither ends a run: what cannot be written
is kept and tried again with the next record.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from data_pipelines.io import publish
from mono_jax.errors import CheckpointError

Say = Callable[[str], None]


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


class Appender:
    """Appends whole entries to a file; what cannot be written waits for the next ``write``."""

    def __init__(self, path: Path, what: str, warn: Say):
        self.path, self._what, self._warn = path, what, warn
        self._size = path.stat().st_size if path.exists() else 0
        self._waiting: list[bytes] = []
        self._warned = False

    def write(self, entry: bytes) -> None:
        """Raises nothing: the first failure in a row is reported, and the file is cut back to its whole entries."""
        self._waiting.append(entry)
        try:
            self._append(b"".join(self._waiting))
            self._waiting, self._warned = [], False
        except OSError as error:
            if not self._warned:
                self._warn(
                    f"{self.path}: {self._what} cannot be written ({error.strerror or error}): kept, tried again"
                )
            self._warned = True

    def _append(self, data: bytes) -> None:
        # Opened anew each time: the file may have been replaced, or its disk mounted again.
        with self.path.open("ab", buffering=0) as file:
            try:
                file.truncate(self._size)
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(self._size)
                raise
        self._size += len(data)

    def close(self) -> None:
        """A last try; reports what is lost."""
        if self._waiting:
            waiting, self._warned = len(self._waiting), True
            self.write(b"")
            if self._waiting:
                self._warn(f"{self.path}: {waiting} entries of {self._what} are not written")


class MetricsWriter:
    """Appends records to ``directory/metrics.jsonl`` and TensorBoard; only process 0 should have one.

    Records of steps after ``start_step`` (an interrupted run got further than its last checkpoint) are
    dropped, so that every step is recorded once. Raises CheckpointError if the folder cannot be written at the start.
    """

    def __init__(self, directory: Path, start_step: int = 0, warn: Say = print):
        path = directory / "metrics.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            kept = [record for record in read_metrics(path) if record["step"] <= start_step]
            publish.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot write metrics: {error.strerror}") from None
        self._records = Appender(path, "metrics", warn)
        self._events = _open_events(directory / "tensorboard", kept, warn)

    def write(self, record: Mapping[str, Any]) -> None:
        """One record with "step"; numbers also go to TensorBoard. A value that is not finite becomes null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._records.write(json.dumps(clean).encode() + b"\n")
        if self._events is not None:
            self._events.write(_event(clean))

    def close(self) -> None:
        self._records.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, by step; [] if there is none.

    Lines that are no record (cut off by a kill, damaged) are left out, and of a step written twice the last counts.
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


# ------------------------------------------------------------------ TensorBoard's event files


def _open_events(folder: Path, records: list[dict[str, Any]], warn: Say) -> Appender | None:
    """A new event file with ``records`` in it, in place of the old ones; None (reported) if it cannot be written."""
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
    version = Event(wall_time=time.time(), file_version="brain.Event:2")
    try:
        old = list(folder.glob("events.out.tfevents.*")) if folder.is_dir() else []
        data = b"".join([_framed(version.SerializeToString()), *map(_event, records)])
        publish.write_bytes(folder / name, data)
        for file in old:
            if file.name != name:
                file.unlink(missing_ok=True)
    except OSError as error:
        warn(f"{folder}: no TensorBoard events in this run: {error.strerror or error}")
        return None
    return Appender(folder / name, "TensorBoard events", warn)


def _event(record: Mapping[str, Any]) -> bytes:
    """The numbers of a record as one event."""
    values = [
        Summary.Value(tag=name, simple_value=value)
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    wall_time = record.get("time") or time.time()
    event = Event(wall_time=wall_time, step=record["step"], summary=Summary(value=values))
    return _framed(event.SerializeToString())


def _framed(data: bytes) -> bytes:
    """A TFRecord: length, its checksum, the data, its checksum."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
