"""TensorBoard's event file, written here: framed records without a thread, which a full disk does not block."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from data_pipelines.io import publish
from mono_jax.training.appender import Appender, Say
from mono_jax.training.metrics import numbers


class EventFile:
    """Gets a line for each record."""

    def __init__(self, file: Appender):
        self._file = file

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(_event(record))

    def close(self) -> None:
        self._file.close()


def open_events(folder: Path, records: Sequence[Mapping[str, Any]], warn: Say) -> EventFile | None:
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
    return EventFile(Appender(folder / name, "TensorBoard events", warn))


def _event(record: Mapping[str, Any]) -> bytes:
    """The numbers of a record as one event."""
    values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(record).items()]
    wall_time = record.get("time") or time.time()
    event = Event(wall_time=wall_time, step=record["step"], summary=Summary(value=values))
    return _framed(event.SerializeToString())


def _framed(data: bytes) -> bytes:
    """A TFRecord: length, its checksum, the data, its checksum."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
