"""Event files equal those that tensorboardX, modelled on TensorBoard's own, writes for the same numbers."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from mono_jax.training.sinks.tensorboard import open_events


def expected(event: Event) -> bytes:
    data = event.SerializeToString(deterministic=True)
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


RECORDS: list[dict[str, Any]] = [
    {"step": 1, "time": 1.5, "loss": 0.1},
    {"step": 0, "time": 1.5, "loss": 0.0},
    {"step": 127, "time": 2.0, "loss": -0.0, "loss/Bücher": 1e-45},
    {"step": 128, "time": 2.0, "loss": 1e300, "grad_norm": -1e300},
    {"step": 2**40, "time": 1.8e9, "loss": math.inf, "grad_norm": -math.inf},
    {"step": 3, "time": 3.0},
    {"step": 300, "time": 3.0, "samples": 2**31, **{f"norm/{'x' * n}": n / 7 for n in range(120, 150)}},
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: str(record["step"]))
def test_events_are_what_the_library_writes(tmp_path: Path, record: dict[str, Any]):
    sink = open_events(tmp_path, [record], print)
    assert sink is not None
    sink.write(record)
    sink.close()
    [file] = tmp_path.iterdir()
    data = file.read_bytes()
    first = 12 + int.from_bytes(data[:8], "little") + 4
    version = Event.FromString(data[12 : first - 4])
    assert version.file_version == "brain.Event:2" and data[:first] == expected(version)
    scalars = {name: value for name, value in record.items() if name != "step"}
    event = Event(wall_time=record["time"], step=record["step"])
    event.summary.CopyFrom(Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in scalars.items()]))
    assert data[first:] == 2 * expected(event)
