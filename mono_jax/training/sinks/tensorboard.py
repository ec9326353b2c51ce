"""Writes TensorBoard's event file itself: framed records without a thread, so that a full disk does not block.

The few fields that are used are also encoded here (protocol buffers' wire format, tensorflow/core/util/event.proto):
libraries that do this import PyTorch and cloud clients if they are installed, which costs seconds at every start of a
run.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.io import publish
from data_pipelines.io.digests import masked_crc32c
from mono_jax.training.appender import Appender, Say
from mono_jax.training.metrics import numbers


class EventFile:
    """An event file that gets an event per record."""

    def __init__(self, file: Appender):
        self._file = file

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(_event(record))

    def close(self) -> None:
        self._file.close()


def open_events(folder: Path, records: Sequence[Mapping[str, Any]], warn: Say) -> EventFile | None:
    """A new event file with ``records``, which replaces the old ones; None (reported) if it cannot be written."""
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
    version = _double(1, time.time()) + _bytes(3, b"brain.Event:2")
    try:
        old = list(folder.glob("events.out.tfevents.*")) if folder.is_dir() else []
        data = b"".join([_framed(version), *map(_event, records)])
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
    values = [_bytes(1, name.encode()) + _float(2, value) for name, value in numbers(record).items()]
    wall_time = record.get("time") or time.time()
    summary = b"".join(_bytes(1, value) for value in values)
    return _framed(_double(1, wall_time) + _int(2, record["step"]) + _bytes(5, summary))


# ----------------------------------------------------------- the wire format: number and type of a field, its value


def _varint(value: int) -> bytes:
    """A non-negative number, seven bits per byte, lowest first."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value) if value else b""


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    with np.errstate(over="ignore"):  # values beyond float32 become infinite
        return _varint(field << 3 | 5) + np.float32(value).tobytes()


# ------------------------------------------------------------------ TFRecords


def _framed(data: bytes) -> bytes:
    """A TFRecord: length, checksum of the length, data, checksum of the data."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
