"""Rows of the global batch on a mesh, and their columns."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mono_jax.parallel.mesh import make_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.parallel.rows import LocalRows, dealt, reordered
from tests.mono_jax.helpers import random_batch

ROWS = np.arange(8 * 6).reshape(8, 6)


def test_rows_are_split_over_data_and_fsdp_and_nothing_else_is():
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    placed = LocalRows(mesh, 8).put({"tokens": ROWS})["tokens"]
    np.testing.assert_array_equal(placed, ROWS)
    for shard in placed.addressable_shards:
        data, fsdp, *_ = (int(at[0]) for at in np.nonzero(mesh.devices == shard.device))
        first = 2 * (2 * data + fsdp)
        np.testing.assert_array_equal(shard.data, ROWS[first : first + 2])


@pytest.mark.parametrize("sizes", [(1, 4, 1, 2), (2, 1, 1, 4), (1, 1, 2, 2), (1, 1, 1, 8)])
def test_devices_along_context_get_an_early_and_a_late_run_of_each_modality(sizes: tuple[int, ...]):
    """For any mesh shape and any devices, the contents of a shard follow from its position on the mesh."""
    count, ways = int(np.prod(sizes)), sizes[3]
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:count][::-1])
    batch = random_batch(8)
    batch["sources"] = batch["tokens"] % 7
    placed = LocalRows(mesh, 8).put(batch)
    for name in ("patches", "patch_cells", "tokens", "targets", "loss_weights", "sources"):
        run = batch[name].shape[1] // (2 * ways)
        for shard in placed[name].addressable_shards:
            data, fsdp, context, _ = (int(at[0]) for at in np.nonzero(mesh.devices == shard.device))
            rows = 8 // (sizes[0] * sizes[1])
            own = batch[name][rows * (data * sizes[1] + fsdp) :][:rows]
            early, late = own[:, run * context :][:, :run], own[:, run * (2 * ways - 1 - context) :][:, :run]
            np.testing.assert_array_equal(shard.data, np.concatenate([early, late], axis=1), err_msg=name)
    for name in ("positions", "segments"):
        np.testing.assert_array_equal(placed[name], batch[name])
    np.testing.assert_array_equal(placed["order"], reordered(batch, ways)["order"])


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_dealt_columns_are_read_in_the_same_order(ways: int):
    batch = random_batch(3)
    of_slots = np.concatenate([batch["patch_cells"] + 1000, batch["tokens"]], axis=1)
    there = np.concatenate([dealt(16, ways), 16 + dealt(16, ways)])
    order = reordered(batch, ways)["order"]
    expected = np.take_along_axis(of_slots, batch["order"], axis=1)
    np.testing.assert_array_equal(np.take_along_axis(of_slots[:, there], order, axis=1), expected)


class Elsewhere:
    """A device of another process, with only the attributes that determine the rows."""

    def __init__(self, device: jax.Device, process: int):
        self.device, self.process_index = device, process


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((4, 1, 1), [([0, 1, 2, 3], 4), ([4, 5, 6, 7], 4)]),
        ((1, 4, 1), [([0, 1, 2, 3], 4), ([4, 5, 6, 7], 4)]),
        ((2, 1, 2), [([0, 1, 2, 3], 4), ([4, 5, 6, 7], 4)]),
        ((1, 1, 4), [(list(range(8)), 8), (list(range(8)), 0)]),
        ((1, 1, 1, 4), [(list(range(8)), 8), (list(range(8)), 0)]),  # each row is in both processes
        ((1, 2, 1, 2), [([0, 1, 2, 3], 4), ([4, 5, 6, 7], 4)]),
    ],
)
def test_each_process_makes_what_its_devices_hold_and_every_row_counts_once(monkeypatch, sizes, expected):
    """Two processes with two devices each, along every axis; ``tensor`` across both makes them share all rows."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:4])
    from mono_jax.parallel import rows as module

    class Sharding:
        def __init__(self, *args: object):
            self._real = jax.sharding.NamedSharding(*args)

        def devices_indices_map(self, shape: tuple[int, ...]) -> dict[Elsewhere, tuple[slice, ...]]:
            order = {device: number for number, device in enumerate(mesh.devices.ravel())}
            return {Elsewhere(d, order[d] // 2): at for d, at in self._real.devices_indices_map(shape).items()}

    monkeypatch.setattr(module, "NamedSharding", Sharding)
    for process, (numbers, counted) in enumerate(expected):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        rows = LocalRows(mesh, 8)
        assert rows.numbers == numbers and rows.counted.sum() == counted
