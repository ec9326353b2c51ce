"""Meshes by their axes, and batches on them."""

from __future__ import annotations

import jax
import pytest

from mono_jax.errors import ConfigError
from mono_jax.parallel.mesh import make_mesh, on_mesh
from mono_jax.parallel.mesh_config import MeshConfig


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((-1, 2, 2), 8, (2, 2, 2)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((1, 4, -1), 8, (1, 4, 2)),
        ((1, 1, -1), 1, (1, 1, 1)),
        ((2, 2, 2), 8, (2, 2, 2)),
    ],
)
def test_one_axis_takes_what_remains(sizes: tuple[int, int, int], devices: int, shape: tuple[int, int, int]):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:devices])
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape
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
    assert seen == {"data": 2, "fsdp": 2, "tensor": 2, "add": 5}
    assert jax.sharding.get_abstract_mesh().empty
