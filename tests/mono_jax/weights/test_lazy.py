"""Lazy arrays read the slices that are asked for, and cast them on the way."""

from __future__ import annotations

import numpy as np

from mono_jax.weights.lazy import LazyArray


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
