"""Hugging Face weights out: bit for bit the same as the input, in shards, under other names."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mono_jax import tree
from mono_jax.errors import WeightsError
from mono_jax.weights import hf_config, readers, writers
from tests.mono_jax.weights.hf_folders import GOLDEN, LAYERS, QKV, VIT, WIDTH, assert_same_bytes, read_all, write_folder


def special_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Random bits: negative zeros, infinities, subnormals and NaNs of every payload among them."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return rng.integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


def biased(config: dict, tensors: dict[str, np.ndarray]) -> None:
    config["llm_config"]["bias"] = True
    for n in range(LAYERS):
        tensors[f"language_model.model.layers.{n}.attention.wqkv.bias"] = np.zeros(QKV, np.float32)
        tensors[f"language_model.model.layers.{n}.attention.wo.bias"] = np.zeros(WIDTH, np.float32)


def with_attention_experts(config: dict, tensors: dict[str, np.ndarray]) -> None:
    for n in range(LAYERS):
        tensors[f"language_model.model.layers.{n}.attention.wqkv_ve.weight"] = np.zeros((QKV, WIDTH), np.float32)


def both(config: dict, tensors: dict[str, np.ndarray]) -> None:
    biased(config, tensors)
    with_attention_experts(config, tensors)
    for n in range(LAYERS):
        tensors[f"language_model.model.layers.{n}.attention.wqkv_ve.bias"] = np.zeros(QKV, np.float32)


def tied(config: dict, tensors: dict[str, np.ndarray]) -> None:
    config["llm_config"]["tie_word_embeddings"] = True
    del tensors["language_model.output.weight"]


def dense(config: dict, tensors: dict[str, np.ndarray]) -> None:
    language = config["llm_config"] | {"architectures": ["InternLM2ForCausalLM"]}
    config.clear()
    config.update(language)
    kept = {
        name.removeprefix("language_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("language_model.") and "_ve." not in name
    }
    tensors.clear()
    tensors.update(kept)


def other_vit(config: dict, tensors: dict[str, np.ndarray]) -> None:
    config["vision_config"] |= {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
    for n in range(2):
        layer = f"vision_model.encoder.layers.{n}."
        for name in ("norm1.bias", "norm2.bias", "attn.qkv.bias"):
            del tensors[layer + name]
        for name in ("q_norm", "k_norm"):
            tensors[f"{layer}attn.{name}.weight"] = np.zeros(VIT, np.float32)


VARIANTS = {
    "as it is": ("mono_tiny", lambda config, tensors: None),
    "biases": ("mono_tiny", biased),
    "attention experts": ("mono_tiny", with_attention_experts),
    "attention experts and biases": ("mono_tiny", both),
    "tied": ("mono_tiny", tied),
    "dense": ("mono_tiny", dense),
    "modular": ("modular_tiny", lambda config, tensors: None),
    "rms norm, qk norm, no qkv bias": ("modular_tiny", other_vit),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_folder_comes_back_bit_for_bit(golden_dir, golden, tmp_path, name):
    original, tensors = golden(name)
    config = hf_config.read_config(golden_dir / name)
    params = readers.load_params(golden_dir / name, config)
    assert writers.save_hf(tmp_path, config, params, original=original) == ["model.safetensors", "config.json"]
    assert_same_bytes(read_all(tmp_path), tensors)
    assert json.loads((tmp_path / "config.json").read_text()) == original
    assert_same_bytes(writers.named_tensors(config, params), tensors)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back_bit_for_bit(golden, tmp_path, variant, dtype):
    name, change = VARIANTS[variant]
    original, tensors = golden(name)
    change(original, tensors)
    rng = np.random.default_rng(0)
    tensors = {name: special_values(rng, tensor.shape, dtype) for name, tensor in tensors.items()}
    folder = write_folder(tmp_path / "in", original, tensors, shards=3)
    config = hf_config.read_config(folder)
    params = readers.load_params(folder, config)
    assert {leaf.dtype for leaf in tree.flatten(params).values()} == {np.dtype(dtype)}
    writers.save_hf(tmp_path / "out", config, params, original=original, shard_size=60_000)
    assert_same_bytes(read_all(tmp_path / "out"), tensors)
    assert hf_config.read_config(tmp_path / "out") == config


def test_shards_keep_to_the_size_and_the_index_names_each_tensor(golden_dir, golden, tmp_path):
    _, tensors = golden("mono_tiny")
    config = hf_config.read_config(golden_dir / "mono_tiny")
    params = readers.load_params(golden_dir / "mono_tiny", config)
    limit = 100_000
    files = writers.save_params(tmp_path, config, params, shard_size=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert sorted({*index["weight_map"].values(), "model.safetensors.index.json"}) == sorted(files)
    for file in set(index["weight_map"].values()):
        content = load_file(tmp_path / file)
        assert sum(tensor.nbytes for tensor in content.values()) <= limit
        assert all(index["weight_map"][name] == file for name in content)


def test_a_tensor_larger_than_a_shard_gets_its_own(golden_dir, golden, tmp_path):
    config = hf_config.read_config(golden_dir / "mono_tiny")
    params = readers.load_params(golden_dir / "mono_tiny", config)
    writers.save_params(tmp_path, config, params, shard_size=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 43
    assert_same_bytes(read_all(tmp_path), golden("mono_tiny")[1])


def test_name_table_changes_the_names_of_attention_experts(golden, tmp_path):
    original, tensors = golden("mono_tiny")
    for n in range(LAYERS):
        tensors[f"language_model.model.layers.{n}.visual_wqkv"] = np.full((QKV, WIDTH), n, np.float32)
    folder = write_folder(tmp_path / "in", original, tensors)
    path = "layers/visual_attention/wqkv/kernel"
    names = {path: "language_model.model.layers.{n}.visual_wqkv"}
    config = hf_config.read_config(folder, names=names)
    assert config.visual_attention_experts
    params = readers.load_params(folder, config, names=names)
    assert tree.flatten(params)[path][:, 0, 0].tolist() == [0, 1, 2]
    writers.save_params(tmp_path / "out", config, params, names=names)
    assert_same_bytes(read_all(tmp_path / "out"), tensors)


def test_parameters_that_do_not_fit_are_not_written(golden_dir, tmp_path):
    config = hf_config.read_config(golden_dir / "mono_tiny")
    flat = tree.flatten(readers.load_params(golden_dir / "mono_tiny", config))
    del flat["final_norm/scale"]
    flat["other/kernel"] = flat["mlp"] = np.zeros(3, np.float32)
    flat["projector/fc1/bias"] = np.zeros(3, np.float32)
    flat["projector/fc2/bias"] = np.zeros(WIDTH, np.int8)
    with pytest.raises(WeightsError) as caught:
        writers.save_params(tmp_path / "out", config, tree.unflatten(flat))
    message = str(caught.value)
    assert "1 missing (final_norm/scale)" in message
    assert "2 unexpected (mlp, other/kernel)" in message
    assert "projector/fc1/bias is [3], the config asks for [48]" in message
    assert "projector/fc2/bias is int8" in message
    assert not (tmp_path / "out").exists()


def test_a_shard_takes_what_just_fits(golden_dir, tmp_path):
    config = hf_config.read_config(golden_dir / "mono_tiny", image_token_id=100)
    params = readers.load_params(golden_dir / "mono_tiny", config, np.float32)
    whole = sum(leaf.nbytes for leaf in tree.flatten(params).values())
    for size, files in ((whole, 1), (whole - 1, 3)):  # two shards and their index
        folder = tmp_path / str(size)
        assert len(writers.save_params(folder, config, params, shard_size=size)) == files
