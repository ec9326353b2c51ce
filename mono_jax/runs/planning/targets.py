"""The hardware that a plan is made for: devices that need not be present, and their capabilities."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
from jax.sharding import Mesh

from mono_jax.errors import ConfigError
from mono_jax.hlo.collectives import Collective
from mono_jax.training.chips import Chip, chip_of
from pallas_kernels import absent
from pallas_kernels.devices import lowering_platform
from pallas_kernels.errors import Unavailable

TPUS = ("v5e", "v5p", "v6e", "tpu7x")
GPUS = ("h200", "h100")
MOST_CPUS = 512  # simulated devices in one process: each takes memory and threads
FORMS = "v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1, h200:1x8x1, h100:1x32x8 or cpu:8"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of one kind; ``chip`` is None if there is no data sheet (CPUs), and then there are no times."""

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None

    @functools.cached_property
    def extents(self) -> tuple[int, ...]:
        """Of a TPU slice: devices along each axis of the torus."""
        return tuple(len(set(places)) for places in zip(*(device.coords for device in self.devices)))

    @property
    def platform(self) -> str:
        """As ``lower`` expects it."""
        return lowering_platform(self.devices[0])


def target(name: str) -> Target:
    """The target of a name like "v5e:4x4"; raises ConfigError for an unknown name or if its compiler is missing."""
    family, _, shape = name.partition(":")
    form = r"\d+" if family == "cpu" else r"\d+(x\d+)+"
    if family not in (*TPUS, *GPUS, "cpu") or not re.fullmatch(form, shape):
        raise ConfigError(f"--target={name}: use for example {FORMS}")
    if family == "cpu" and not 1 <= int(shape) <= MOST_CPUS:
        raise ConfigError(f"--target={name}: between 1 and {MOST_CPUS} simulated devices")
    try:
        devices = _devices(family, shape, name)
    except Unavailable as error:
        raise ConfigError(f"--target={name}: {error}") from None
    return Target(name, tuple(devices), chip_of(devices[0].device_kind))


def _devices(family: str, shape: str, name: str) -> list[jax.Device]:
    _leave_accelerators_alone(int(shape) if family == "cpu" else None)
    if family in TPUS:
        return absent.tpus(name)
    if family in GPUS:
        return absent.gpus(family, _machines(shape))
    found = jax.devices("cpu")
    if len(found) < int(shape):
        raise ConfigError(f"--target={name}: this process has {len(found)} CPU devices; start a new one")
    return found[: int(shape)]


def _machines(shape: str) -> str:
    """Partitions x machines x GPUs per machine, as XLA reads it; 1 x N x 1 means machines with up to 8 GPUs."""
    sizes = [int(size) for size in shape.split("x")]
    if len(sizes) == 3 and sizes[2] == 1:
        gpus = math.gcd(sizes[1], 8)
        sizes[1:] = sizes[1] // gpus, gpus
    return "x".join(map(str, sizes))


def _leave_accelerators_alone(cpus: int | None) -> None:
    """A plan needs no device; without this, JAX would take those of this machine. Calling it too late does no harm."""
    try:
        jax.config.update("jax_platforms", "cpu")
        if cpus is not None:
            jax.config.update("jax_num_cpu_devices", cpus)
    except RuntimeError:
        pass


# ======================================================================================================================
# Links
# ======================================================================================================================


def collective_seconds(target: Target, mesh: Mesh, collective: Collective) -> float:
    """The minimum time of a collective on the links of ``target``; the program's devices are those of ``mesh``.

    Rings use both directions of every torus axis that a group spans, lines (no wrap-around) only one.
    """
    devices = list(mesh.devices.flat)
    group = [devices[place] for place in collective.groups[0]] if collective.groups else devices
    size = sum(collective.wire_bytes.values())
    if len(group) < 2 or not size or target.chip is None or target.chip.link_bandwidth is None:
        return 0.0
    if target.platform == "tpu":
        return _on_torus(target, group, collective.kind, size)
    return _on_switches(target, group, size)


def _on_torus(target: Target, group: list[jax.Device], kind: str, size: float) -> float:
    link = target.chip.link_bandwidth
    if kind == "collective-permute":
        return size / link  # to a neighbour
    ways, longest = 0, 1
    for axis in range(len(group[0].coords)):
        places = {device.coords[axis] for device in group}
        if len(places) > 1:
            ways += 2 if len(places) == target.extents[axis] and _wraps(target, len(places)) else 1
            longest = max(longest, len(places))
    ways = max(ways, 1)  # the devices of one chip
    hops = max(longest / 4, 1.0) if kind in ("all-to-all", "ragged-all-to-all") else 1.0
    return size * hops / (ways * link)


def _wraps(target: Target, extent: int) -> bool:
    """Whether an axis of the slice is a ring: on v5e and v6e only a full axis of 16, on v5p and tpu7x whole cubes of
    4."""
    flat = target.name.startswith(("v5e", "v6e"))
    return extent == 16 if flat else extent % 4 == 0


def _on_switches(target: Target, group: list[jax.Device], size: float) -> float:
    """Within a machine by NVLink; between machines, each GPU has its own network card."""
    machines = len({device.process_index for device in group})
    within = size / target.chip.link_bandwidth
    if machines < 2:
        return within
    each = len(group) / machines
    n = len(group)
    outside = size * (n / (n - 1)) * ((machines - 1) / machines) / each / target.chip.network_bandwidth
    return max(within, outside)
