"""Hugging Face folders for tests: the golden ones, or built by hand, never by the code under test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = ("mono_tiny", "mono_tiny_ntk", "modular_tiny")
HEADS, KV_HEADS, WIDTH, QKV, LAYERS = 6, 2, 48, 80, 3  # of the golden models
VIT = 32


def read_all(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_bytes(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def write_folder(folder: Path, config: dict, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    names = sorted(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_mono(folder: Path, golden_dir: Path) -> Path:
    """A Hugging Face folder with weights, a tokenizer and a pickle that must not be opened."""
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(golden_dir / "mono_tiny" / file, folder)
    for file in ("tokenizer.model", "added_tokens.json"):
        shutil.copy(golden_dir / "chat" / file, folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"\x80\x04.")
    return folder


def write_dense(folder: Path, golden_dir: Path) -> Path:
    """A dense InternLM2 folder: the language model of a golden one, biases in, tokenizer without image tokens."""
    folder.mkdir()
    config = json.loads((golden_dir / "mono_tiny" / "config.json").read_text())["llm_config"]
    config |= {"architectures": ["InternLM2ForCausalLM"], "bias": True, "vocab_size": 602, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    tensors = {}
    for name, tensor in load_file(golden_dir / "mono_tiny" / "model.safetensors").items():
        if name.startswith("language_model.") and "_ve." not in name:
            rows = 602 if "tok_embeddings" in name or "output" in name else tensor.shape[0]
            shape = (rows, *tensor.shape[1:])
            tensors[name.removeprefix("language_model.")] = rng.standard_normal(shape, np.float32) * 0.2
    for n in range(3):
        for name, size in (("wqkv", 80), ("wo", 48)):
            tensors[f"model.layers.{n}.attention.{name}.bias"] = rng.standard_normal(size, np.float32)
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(golden_dir / "chat" / "tokenizer.model", folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 600, "<|im_end|>": 601}))
    return folder
