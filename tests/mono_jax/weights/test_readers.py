"""Hugging Face weights in: layouts, dtypes, and folders that cannot be used."""

from __future__ import annotations

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mono_jax import tree
from mono_jax.errors import WeightsError
from mono_jax.weights import hf_config, readers, writers
from tests.mono_jax.weights.hf_folders import WIDTH, assert_same_bytes, write_folder


def test_layout_of_parameters(golden_dir, golden):
    """Against the definition of each layout, written out with indices."""
    _, tensors = golden("mono_tiny")
    config = hf_config.read_config(golden_dir / "mono_tiny")
    params = tree.flatten(readers.load_params(golden_dir / "mono_tiny", config))
    conv = tensors["vision_model.embeddings.patch_embedding.weight"]
    channels, patch = conv.shape[1], conv.shape[2]
    kernel = params["vision/patch_embedding/kernel"]
    for row, column, channel, out in ((0, 0, 0, 0), (1, 2, 0, 5), (13, 0, 2, 31), (7, 13, 1, 9)):
        assert kernel[(row * patch + column) * channels + channel, out] == conv[out, channel, row, column]
    gate = tensors["language_model.model.layers.2.feed_forward_ve.w1.weight"]
    assert params["layers/visual_feed_forward/gate/kernel"][2, 3, 5] == gate[5, 3]
    up = tensors["language_model.model.layers.1.feed_forward.w3.weight"]
    assert params["layers/feed_forward/up/kernel"][1, 3, 5] == up[5, 3]
    down = tensors["language_model.model.layers.0.feed_forward.w2.weight"]
    assert params["layers/feed_forward/down/kernel"][0, 3, 5] == down[5, 3]
    position = tensors["vision_model.embeddings.position_embedding"]
    np.testing.assert_array_equal(params["vision/position_embedding"], position[0])
    np.testing.assert_array_equal(params["lm_head/kernel"], tensors["language_model.output.weight"].T)


def test_dtype_is_cast_only_when_asked_for(golden_dir):
    config = hf_config.read_config(golden_dir / "mono_tiny")
    stored = tree.flatten(readers.load_params(golden_dir / "mono_tiny", config))
    cast = tree.flatten(readers.load_params(golden_dir / "mono_tiny", config, jnp.bfloat16))
    for path, leaf in stored.items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(cast[path], leaf.astype(ml_dtypes.bfloat16))


def test_one_error_lists_everything_that_does_not_fit(golden, tmp_path):
    original, tensors = golden("mono_tiny")
    layer = "language_model.model.layers.1."
    del tensors[layer + "attention.wo.weight"], tensors["mlp1.0.bias"]
    tensors["language_model.model.layers.7.ffn_norm.weight"] = np.zeros(WIDTH, np.float32)
    tensors["extra"] = np.zeros(1, np.float32)
    tensors[layer + "ffn_norm.weight"] = np.zeros(7, np.float32)
    tensors[layer + "feed_forward.w1.weight"] = tensors[layer + "feed_forward.w1.weight"].astype(np.float16)
    tensors["mlp1.1.bias"] = np.zeros(WIDTH, np.int32)
    folder = write_folder(tmp_path / "in", original, tensors)
    with pytest.raises(WeightsError) as caught:
        readers.load_params(folder, hf_config.read_config(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert f"2 missing ({layer}attention.wo.weight, mlp1.0.bias)" in message
    assert "2 unexpected (extra, language_model.model.layers.7.ffn_norm.weight)" in message
    assert "3 misshapen" in message
    assert f"{layer}ffn_norm.weight is [7], the config asks for [48]" in message
    assert f"{layer}feed_forward.w1.weight is F16, layer 0 is F32" in message
    assert "mlp1.1.bias is I32" in message


def test_rope_buffers_of_old_files_are_passed_over(golden, tmp_path):
    original, tensors = golden("mono_tiny")
    buffer = {"language_model.model.layers.0.attention.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    folder = write_folder(tmp_path / "in", original, tensors | buffer)
    config = hf_config.read_config(folder)
    assert_same_bytes(writers.named_tensors(config, readers.load_params(folder, config)), tensors)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused(golden, tmp_path, pickle):
    original, _ = golden("mono_tiny")
    (tmp_path / "config.json").write_text(json.dumps(original))
    (tmp_path / pickle).write_bytes(b"\x80\x04.")
    with pytest.raises(WeightsError, match=rf"{pickle}.*never loaded.*safetensors"):
        readers.load_params(tmp_path, hf_config.read_config(tmp_path))


def test_broken_folders_are_named(golden, tmp_path):
    original, tensors = golden("mono_tiny")
    folder = write_folder(tmp_path / "in", original, tensors, shards=2)
    config = hf_config.read_config(folder)
    shard = folder / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=f"{shard.name}: not a readable safetensors file"):
        readers.load_params(folder, config)
    shard.unlink()
    with pytest.raises(WeightsError, match=f"{shard.name}: no such file"):
        readers.load_params(folder, config)
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        readers.load_params(tmp_path, config)
    with pytest.raises(WeightsError, match="nowhere: no such folder"):
        readers.load_params(tmp_path / "nowhere", config)
