"""Streamed arrays: every bit pattern survives, and large ones are cut into chunks."""

from __future__ import annotations

import numpy as np

from mono_jax import tree
from mono_jax.weights import slices
from mono_jax.weights.lazy import LazyArray
from mono_jax.weights.model_folder import load_model, save_model
from mono_jax.weights.names import is_stacked
from tests.mono_jax.stored import assert_equal


def test_negative_zeros_and_nans_survive(tmp_path, model):
    config, params, _ = model
    flat = tree.flatten(params)
    wqkv = flat["layers/attention/wqkv/kernel"]
    wqkv[0], wqkv[1], wqkv[2] = -0.0, 0.0, np.uint32(0x7FC01234).view(np.float32)

    def lazy(path: str) -> LazyArray:
        array, stacked = flat[path], is_stacked(path)
        return LazyArray(array.shape, array.dtype, stacked, lambda n: array if n is None else array[n])

    save_model(tmp_path, config, tree.unflatten({path: lazy(path) for path in flat}))
    assert_equal(load_model(tmp_path)[1], params)


def test_large_arrays_without_layers_are_cut_into_chunks(tmp_path, model, monkeypatch):
    config, params, lazy = model
    monkeypatch.setattr(slices, "CHUNK", 10_000)
    save_model(tmp_path, config, lazy)
    assert len(list((tmp_path / "params" / "embed.embedding").glob("[0-9]*"))) == 3  # 128 rows of 192 bytes by 52
    assert_equal(load_model(tmp_path)[1], params)
