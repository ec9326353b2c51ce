from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mono_jax.errors import ConfigError
from mono_jax.hlo.collectives import Collective
from mono_jax.runs.planning.targets import Target, collective_seconds, target
from mono_jax.training.chips import CHIPS
from pallas_kernels import absent


def torus(name: str, kind: str, *sizes: int) -> Target:
    places = np.stack(np.meshgrid(*(np.arange(size) for size in sizes), indexing="ij"), -1).reshape(-1, len(sizes))
    devices = [SimpleNamespace(coords=tuple(place), platform="tpu") for place in places.tolist()]
    return Target(name, tuple(devices), CHIPS[kind])


def seconds(hardware: Target, kind: str, group: list[int], size: int = 45_000_000_000) -> float:
    mesh = SimpleNamespace(devices=np.array(hardware.devices))
    return collective_seconds(hardware, mesh, Collective(kind, (("bf16", size),), (tuple(group),), len(group), False))


FLAT = torus("v5e:16x16", "TPU v5e", 16, 16)  # 45 GB/s one way: an array of 45 GB takes a second over a link
SMALL = torus("v5e:4x4", "TPU v5e", 4, 4)
CUBE = torus("v5p:4x4x4", "TPU v5p", 4, 4, 4)  # 90 GB/s
GPUS = Target(
    "h100:1x4x8", tuple(SimpleNamespace(platform="gpu", process_index=i // 8) for i in range(32)), CHIPS["H100"]
)


@pytest.mark.parametrize(
    ("hardware", "kind", "group", "expected"),
    [
        (FLAT, "all-gather", list(range(16)), 15 / 2),  # a ring: both directions
        (FLAT, "all-gather", list(range(0, 256, 16)), 15 / 2),  # along the other axis
        (FLAT, "all-gather", list(range(4)), 3.0),  # part of a ring is a line
        (FLAT, "all-reduce", list(range(256)), 2 * 255 / 256 / 4),  # two rings
        (SMALL, "reduce-scatter", list(range(16)), 15 / 16 / 2),  # two lines
        (SMALL, "collective-permute", list(range(16)), 1.0),  # to a neighbour, over one link
        (FLAT, "all-to-all", list(range(16)), 15 / 16 / 2 * 4),  # a quarter of the ring on average
        (CUBE, "all-gather", list(range(64)), 63 / 2 / 6),  # three rings
        (GPUS, "all-gather", list(range(8)), 7 / 10),  # within a machine: 450 GB/s
        (GPUS, "all-gather", list(range(32)), 31 / 10),  # each machine's eight GPUs share the network bandwidth
        (GPUS, "all-gather", list(range(0, 32, 8)), 3 * 45 / 50),  # network cards: 50 GB/s each
        (SMALL, "all-reduce", [3], 0.0),
    ],
)
def test_the_least_time_of_a_collective(hardware: Target, kind: str, group: list[int], expected: float):
    assert seconds(hardware, kind, group) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "machines"),
    [("1x8x1", "1x1x8"), ("1x2x1", "1x1x2"), ("1x16x1", "1x2x8"), ("1x32x8", "1x32x8"), ("1x1x1", "1x1x1")],
)
def test_gpus_are_machines_of_up_to_eight(shape: str, machines: str, monkeypatch: pytest.MonkeyPatch):
    """XLA reads 1 x 8 x 1 as 8 machines, over which a mesh of 2 x 4 could not be laid out."""
    asked = []
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(absent, "gpus", lambda kind, topology: asked.append((kind, topology)) or [gpu])
    assert target(f"h200:{shape}").name == f"h200:{shape}"
    assert asked == [("h200", machines)]


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:two", "h200:", "", "cpu:2x2", "cpu:0", "cpu:99999", "v5e:3x5"])
def test_a_target_that_is_none(name: str):
    with pytest.raises(ConfigError, match="--target"):
        target(name)
