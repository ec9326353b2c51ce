"""Lazy arrays read only the requested slices and cast them while reading."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mono_jax.weights.lazy import LazyArray
from mono_jax.weights.model_folder import place


def test_slices_are_read_when_asked_for():
    array, reads = np.arange(12, dtype=np.float32).reshape(3, 4), []

    def read(n: int | None) -> np.ndarray:
        reads.append(n)
        return array if n is None else array[n]

    stacked = LazyArray(array.shape, array.dtype, True, read)
    np.testing.assert_array_equal(stacked[1], array[1], strict=True)
    assert reads == [1]
    np.testing.assert_array_equal(np.asarray(stacked.astype(np.float16)), array.astype(np.float16), strict=True)
    assert reads == [1, 0, 1, 2]
    whole = LazyArray(array.shape, array.dtype, False, read)
    np.testing.assert_array_equal(np.asarray(whole), array, strict=True)
    np.testing.assert_array_equal(whole[2], array[2], strict=True)
    assert reads[4:] == [None, None]


@pytest.mark.parametrize("stacked", [True, False])
def test_parts_are_made_while_each_slice_is_read_once(stacked: bool):
    """Slices of a stacked array that are not needed are not read at all."""
    array, reads = np.arange(60, dtype=np.float32).reshape(5, 4, 3), []

    def read(n: int | None) -> np.ndarray:
        reads.append(n)
        return array if n is None else array[n]

    lazy = LazyArray(array.shape, array.dtype, stacked, read)
    bounds = [((1, 3), (0, 4), (0, 3)), ((2, 4), (1, 3), (2, 3)), ((1, 3), (2, 4), (0, 1))]
    for part, wanted in zip(lazy.parts(bounds, np.float16), bounds, strict=True):
        expected = array[tuple(slice(*pair) for pair in wanted)].astype(np.float16)
        np.testing.assert_array_equal(part, expected, strict=True)
    assert reads == ([1, 2, 3] if stacked else [None])
    assert lazy.parts([]) == [] and len(reads) == (3 if stacked else 1)


def test_parts_are_read_by_themselves_where_that_pays():
    """Also after a cast; a range of layers is read by slices again."""
    array, asked = np.arange(60, dtype=np.float32).reshape(5, 4, 3), []

    def region(index: tuple[slice, ...]) -> np.ndarray:
        asked.append(index)
        return array[index]

    lazy = LazyArray(array.shape, array.dtype, True, lambda n: array[n], region)
    bounds = [((1, 3), (0, 4), (0, 3)), ((2, 4), (1, 3), (2, 3))]
    for one, dtype in ((lazy, np.float32), (lazy.astype(np.float16), np.float16), (lazy[1:4], np.float32)):
        shift = 1 if one.shape[0] < 5 else 0
        inside = [((a - shift, b - shift), *rest) for (a, b), *rest in bounds]
        for part, wanted in zip(one.parts(inside), bounds, strict=True):
            expected = array[tuple(slice(*pair) for pair in wanted)].astype(dtype)
            np.testing.assert_array_equal(part, expected, strict=True)
    assert asked == [tuple(slice(*pair) for pair in part) for part in bounds] * 2


def test_a_lazy_array_on_a_mesh_is_the_whole_one_on_a_mesh():
    """Split along every axis, layers included, over eight devices of which some share a part."""
    array = np.arange(64, dtype=np.float32).reshape(4, 4, 4)
    lazy = LazyArray(array.shape, array.dtype, True, lambda n: array[n])
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    for spec in (PartitionSpec("a", None, "b"), PartitionSpec(None, "b"), PartitionSpec()):
        sharding = NamedSharding(mesh, spec)
        placed = place(lazy, jnp.bfloat16, sharding)
        assert placed.sharding == sharding and placed.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(placed, np.float32), array)
