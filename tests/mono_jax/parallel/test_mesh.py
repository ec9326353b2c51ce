"""Meshes by their axes, and batches on them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from mono_jax.errors import ConfigError
from mono_jax.parallel.layout import arranged, fsdp_for
from mono_jax.parallel.mesh import make_mesh, on_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.training.compiler_options import compiler_options
from pallas_kernels import absent
from pallas_kernels.errors import Unavailable


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ((-1, 1, 1), 8, (8, 1, 1, 1)),
        ((-1, 2, 2), 8, (2, 2, 2, 1)),
        ((2, -1, 2), 8, (2, 2, 2, 1)),
        ((1, 4, -1), 8, (1, 4, 2, 1)),
        ((1, 1, -1), 1, (1, 1, 1, 1)),
        ((2, 2, 2), 8, (2, 2, 2, 1)),
        ((-1, 1, 1, 4), 8, (2, 1, 1, 4)),
        ((1, 2, 1, -1), 8, (1, 2, 1, 4)),
    ],
)
def test_one_axis_takes_what_remains(sizes: tuple[int, ...], devices: int, shape: tuple[int, ...]):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:devices])
    assert mesh.axis_names == ("data", "fsdp", "context", "tensor")
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor", "context")) == shape
    assert mesh.devices.ravel().tolist() == jax.devices()[:devices]


@pytest.mark.parametrize(("sizes", "devices"), [((3, 1, 1), 8), ((-1, 3, 1), 8), ((2, 2, 1), 8), ((-1, 2, 2), 2)])
def test_a_mesh_that_does_not_fit_is_refused(sizes: tuple[int, int, int], devices: int):
    with pytest.raises(ConfigError, match=f"does not fit {devices} devices: change config.mesh"):
        make_mesh(MeshConfig(*sizes), jax.devices()[:devices])


@pytest.mark.parametrize(("sizes", "message"), [((0, 1, 1), "mesh.data is 0"), ((-1, -1, 1), "only one axis")])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int], message: str):
    with pytest.raises(ConfigError, match=message):
        MeshConfig(*sizes)


def test_functions_are_traced_for_the_mesh():
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    seen = on_mesh(lambda add: {**jax.sharding.get_abstract_mesh().shape, "add": add}, mesh)(add=5)
    assert seen == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2, "add": 5}
    assert jax.sharding.get_abstract_mesh().empty


GIB = 1 << 30


@pytest.mark.parametrize(
    ("state", "devices", "memory", "shards"),
    [
        (26e9, 256, 15.75 * GIB, 16),  # the 2B model in S1.1 on v5e
        (56e9, 256, 15.75 * GIB, 32),  # and in S2
        (56e9, 256, 60 * GIB, 8),  # on H100
        (56e9, 4, 15.75 * GIB, 4),  # all of them
        (56e9, 24, 15.75 * GIB, 8),  # no larger power of two divides 24
        (1e6, 8, 15.75 * GIB, 1),
        (56e9, 8, None, 1),
    ],
)
def test_shards_follow_from_the_state_s_bytes(state: float, devices: int, memory: float | None, shards: int):
    assert fsdp_for(state, devices, memory) == shards


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (2, 4, 1, 1)),
        (MeshConfig(tensor=2), (1, 4, 1, 2)),
        (MeshConfig(data=4), (4, 2, 1, 1)),
        (MeshConfig(data=1, tensor=4), (1, 2, 1, 4)),
        (MeshConfig(fsdp=8), (1, 8, 1, 1)),
        (MeshConfig(context=2), (2, 2, 2, 1)),  # which shares the parameters too
        (MeshConfig(data=1, context=-1, fsdp=2), (1, 2, 4, 1)),
    ],
)
def test_what_the_config_leaves_open_is_filled_in(config: MeshConfig, shape: tuple[int, ...]):
    """With a state that needs four devices."""
    assert make_mesh(config, jax.devices()[:8], state_bytes=4.0, memory=8).devices.shape == shape


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "fake"


@pytest.mark.parametrize(
    ("sizes", "machines"),
    [
        ((2, 4, 1), [[0, 1, 2, 3], [4, 5, 6, 7]]),  # `data` spans the machines
        ((1, 4, 2), [[0, 1, 2, 3], [4, 5, 6, 7]]),  # `fsdp` does, `tensor` stays within one
    ],
)
def test_machines_are_spanned_by_an_outer_axis(sizes: tuple[int, int, int], machines: list[list[int]]):
    """Whatever the order in which devices are listed."""
    devices = [FakeDevice(n, n // 4, 0) for n in (5, 0, 7, 2, 1, 4, 3, 6)]
    found = arranged(sizes, devices)
    assert found.shape == sizes
    assert [sorted(device.id for device in part.ravel()) for part in np.split(found.reshape(2, -1), 2)] == machines


def test_machines_that_no_axis_spans_are_shared_by_several():
    """Eight machines of two under 4 x 4: four of `data`, and two of `fsdp` within each of these."""
    found = arranged((4, 4, 1), [FakeDevice(n, n // 2, 0) for n in (*range(8, 16), *range(8))])
    machines = np.vectorize(lambda device: device.process_index)(found).reshape(4, 2, 2)
    assert (machines[..., 0] == machines[..., 1]).all()
    assert sorted(machines[..., 0].ravel()) == list(range(8))


def test_machines_that_no_axis_can_span_are_refused():
    with pytest.raises(ConfigError, match="3 machines: the size of one axis must be a multiple"):
        arranged((2, 2, 1), [FakeDevice(n, min(n, 2), 0) for n in range(4)])


def test_axes_follow_the_torus_and_slices():
    """For absent v5e chips: neighbours on inner axes, slices on the outermost axis that they divide."""
    topologies = pytest.importorskip("jax.experimental.topologies")
    try:
        chips = absent.tpus("v5e:4x4")
        slices = topologies.get_topology_desc("v5e:4x4", platform="tpu", num_slices=2).devices
    except Unavailable as error:
        pytest.skip(str(error))
    for ring in arranged((4, 4, 1), chips).reshape(4, 4):  # each of the four is a row or a column
        assert 1 in {len({chip.coords[axis] for chip in ring}) for axis in (0, 1)}
    assert [chip.slice_index for chip in arranged((2, 16, 1), slices).ravel()] == [0] * 16 + [1] * 16
    assert [chip.slice_index for chip in arranged((1, 16, 2), slices).ravel()] == [0] * 16 + [1] * 16


def test_options_of_the_compiler_follow_from_the_chip():
    try:
        tpu = make_mesh(MeshConfig(fsdp=4), absent.tpus("v5e:2x2"))
    except Unavailable as error:
        pytest.skip(str(error))
    name = "xla_tpu_enable_windowed_einsum_for_all_gather"
    assert compiler_options(tpu) == {name: False}
    assert compiler_options(tpu, {name: None, "xla_x": 3}) == {"xla_x": 3}
    assert compiler_options(make_mesh()) == {}
