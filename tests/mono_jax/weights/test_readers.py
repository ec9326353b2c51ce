"""Hugging Face weights in: layouts, dtypes, and folders that cannot be used."""

from __future__ import annotations

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mono_jax import tree
from mono_jax.errors import ConfigError, WeightsError
from mono_jax.weights import hf_config, readers, writers
from mono_jax.weights.model_folder import open_model
from tests.mono_jax.weights.hf_folders import WIDTH, assert_same_bytes, write_folder


def test_layout_of_parameters(golden_dir, golden):
    """Compared with the definition of each layout, written out with indices."""
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


def refused(folder) -> str:
    """The one-line error for ``folder``."""
    with pytest.raises(WeightsError) as caught:
        open_model(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def test_git_lfs_pointers_are_named_with_the_fix(golden, tmp_path):
    folder = write_folder(tmp_path / "in", *golden("mono_tiny"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"
    (folder / "model.safetensors").write_text(pointer)
    assert f"{folder / 'model.safetensors'}: a Git LFS pointer" in refused(folder)
    assert "run 'git lfs pull'" in refused(folder)
    (folder / "config.json").write_text(pointer)
    with pytest.raises(ConfigError, match=r"config\.json: a Git LFS pointer"):
        open_model(folder)


def test_an_adapter_alone_is_no_model(golden, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "an adapter (PEFT, LoRA) only: merge it into org/base" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(golden("mono_tiny")[0]))
    assert "merge it into org/base" in refused(tmp_path)


def test_shards_without_their_index(golden, tmp_path):
    original, tensors = golden("mono_tiny")
    folder = write_folder(tmp_path / "in", original, tensors, shards=3)
    (folder / "model.safetensors.index.json").unlink()
    config = hf_config.read_config(folder)
    assert_same_bytes(writers.named_tensors(config, readers.load_params(folder, config)), tensors)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "shards 00002 of 3 are missing" in refused(folder)


def test_weights_under_another_file_name(golden, tmp_path):
    folder = write_folder(tmp_path / "in", *golden("mono_tiny"))
    (folder / "model.safetensors").rename(folder / "final.safetensors")
    assert "only final.safetensors: rename" in refused(folder)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: name.replace("attention.wqkv", "self_attn.q_proj"), "Llama, Qwen or Phi"),
        (lambda name: f"module.{name}", "wrapped PyTorch model"),
        (lambda name: f"base_model.model.{name}", "PEFT adapter's"),
        (lambda name: name.replace("vision_model.", "model.vision_tower."), "LLaVA"),
    ],
)
def test_foreign_names_say_whose_they_are(golden, tmp_path, rename, message):
    original, tensors = golden("mono_tiny")
    folder = write_folder(tmp_path / "in", original, {rename(name): tensor for name, tensor in tensors.items()})
    assert message in refused(folder)


def test_long_lists_are_cut(golden, tmp_path):
    original, tensors = golden("mono_tiny")
    tensors |= {f"extra.{n}": np.zeros(1, np.float32) for n in range(700)}
    message = refused(write_folder(tmp_path / "in", original, tensors))
    assert "700 unexpected (extra.0, extra.1, extra.10, extra.100, extra.101 and 695 more)" in message


def test_a_tied_head_that_is_stored_must_equal_the_embedding(golden, tmp_path):
    original, tensors = golden("mono_tiny")
    original["llm_config"]["tie_word_embeddings"] = True
    head, embedding = "language_model.output.weight", "language_model.model.tok_embeddings.weight"
    assert f"{head} differs from {embedding}" in refused(write_folder(tmp_path / "a", original, tensors))
    tied = tensors | {head: tensors[embedding]}
    config, params, _ = open_model(write_folder(tmp_path / "b", original, tied))
    assert config.tie_word_embeddings and "lm_head" not in params
    del tied[head]
    assert_same_bytes(writers.named_tensors(config, readers.load_params(tmp_path / "b", config)), tied)
