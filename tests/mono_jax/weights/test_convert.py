"""Conversion: bit-exact both ways, visual experts put into dense models, little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mono_jax
from data_pipelines.batch import BatchSpec
from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax import tree
from mono_jax.checkpoints.integrity import tree_hash
from mono_jax.errors import ConfigError
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.weights.convert import Upcycling, convert
from mono_jax.weights.lazy import LazyArray
from mono_jax.weights.model_folder import Origin, load_model, model_config, open_model, read_origin, save_model
from mono_jax.weights.names import is_stacked, param_shapes
from mono_jax.weights.prompt_format import PromptFormat
from mono_jax.weights.writers import save_hf
from tests.mono_jax.weights.hf_folders import write_dense, write_mono

SPECIAL = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same_folder(found: Path, expected: Path) -> None:
    a, b = tensors_of(found), tensors_of(expected)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        assert a[name].tobytes() == b[name].tobytes()
    assert json.loads((found / "config.json").read_text()) == json.loads((expected / "config.json").read_text())


@pytest.fixture
def source(golden_dir, tmp_path) -> Path:
    return write_mono(tmp_path / "source", golden_dir)


@pytest.fixture
def dense(golden_dir, tmp_path) -> Path:
    return write_dense(tmp_path / "dense", golden_dir)


def upcycling(**options: Any) -> Upcycling:
    return Upcycling(Tokenizer, **({"vision": {"image_size": 56, "hidden_size": 32}} | options))


@pytest.mark.parametrize("name", ["mono_tiny", "mono_tiny_ntk", "modular_tiny"])
def test_golden_models_come_back_bit_for_bit(golden_dir, tmp_path, name):
    convert(golden_dir / name, tmp_path / "orbax", source_kind="hf", target_kind="orbax")
    report = convert(tmp_path / "orbax", tmp_path / "hf", source_kind="orbax", target_kind="hf")
    assert_same_folder(tmp_path / "hf", golden_dir / name)
    assert report["tensors"] == len(tensors_of(golden_dir / name))
    assert report["bytes"] == sum(tensor.nbytes for tensor in tensors_of(golden_dir / name).values())
    assert report["dtypes"] == ["float32"]


def test_companions_travel_and_pickles_do_not(source, tmp_path):
    convert(source, tmp_path / "orbax")
    assert model_config(tmp_path / "orbax").image_token_id == 604
    convert(tmp_path / "orbax", tmp_path / "hf")
    for folder in (tmp_path / "orbax", tmp_path / "hf"):
        for name in ("tokenizer.model", "added_tokens.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()
        assert not (folder / "optimizer.pt").exists()
        assert not (folder / "model.json").exists() or folder.name == "orbax"


def test_sharded_export_and_import(source, tmp_path):
    convert(source, tmp_path / "sharded", target_kind="hf", shard_size=100_000)
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    assert all(file.stat().st_size < 110_000 for file in (tmp_path / "sharded").glob("*.safetensors"))
    convert(tmp_path / "sharded", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf")
    assert tensors_of(tmp_path / "hf").keys() == tensors_of(source).keys()
    for name, tensor in tensors_of(source).items():
        assert tensors_of(tmp_path / "hf")[name].tobytes() == tensor.tobytes()


def test_name_table_is_remembered(source, tmp_path):
    """Weights of 1.5 under names of another release: imported with a table, exported under the same names."""
    tensors = load_file(source / "model.safetensors")
    for n in range(3):
        tensors[f"language_model.model.layers.{n}.attention.visual.weight"] = np.full((80, 48), n, np.float32)
    save_file(tensors, source / "model.safetensors")
    names = tmp_path / "names.json"
    pattern = "language_model.model.layers.{n}.attention.visual.weight"
    names.write_text(json.dumps({"layers/visual_attention/wqkv/kernel": pattern}))
    convert(source, tmp_path / "orbax", names_file=names)
    config, _ = load_model(tmp_path / "orbax")
    assert config.visual_attention_experts
    convert(tmp_path / "orbax", tmp_path / "hf")
    assert tensors_of(tmp_path / "hf").keys() == tensors.keys()


def test_weights_are_cast_when_asked_for(source, tmp_path):
    report = convert(source, tmp_path / "bf16", target_kind="hf", dtype="bfloat16")
    assert report["dtypes"] == ["bfloat16"]
    before, after = tensors_of(source), tensors_of(tmp_path / "bf16")
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor.astype(jnp.bfloat16), strict=True)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("target", ["orbax", "hf"])
@pytest.mark.parametrize("attention", [False, True])
def test_embedded_experts_are_copies_of_the_text_experts(dense, tmp_path, attention, target):
    options = upcycling(attention_experts=attention)
    report = convert(dense, tmp_path / "mono", target_kind=target, upcycling=options)
    assert report["model"] == "Mono-InternVL" + ("-1.5" if attention else "")
    assert report["vocabulary_rows_added"] == 9
    old_config, old = load_model(dense)
    config, new = load_model(tmp_path / "mono")
    assert config.visual_ffn_experts and config.visual_attention_experts is attention
    assert (config.vision.image_size, config.vision.hidden_size, config.vision.patch_size) == (56, 32, 14)
    assert (config.vocab_size, old_config.vocab_size) == (611, 602)
    old, new = tree.flatten(old), tree.flatten(new)
    for path, leaf in old.items():
        found = new[path][:602] if path == "embed/embedding" else new[path][:, :602] if "lm_head" in path else new[path]
        np.testing.assert_array_equal(found, leaf, strict=True)
    for name in ("gate", "up", "down"):
        text = old[f"layers/feed_forward/{name}/kernel"]
        np.testing.assert_array_equal(new[f"layers/visual_feed_forward/{name}/kernel"], text)
    for name in ("kernel", "bias"):
        path = f"layers/visual_attention/wqkv/{name}"
        assert (path in new) is attention
        if attention:
            np.testing.assert_array_equal(new[path], old[f"layers/attention/wqkv/{name}"])
    mean = np.asarray(old["embed/embedding"], np.float64).mean(0)
    np.testing.assert_allclose(new["embed/embedding"][602:], np.tile(mean, (9, 1)), rtol=1e-6, atol=1e-7)
    mean = np.asarray(old["lm_head/kernel"], np.float64).mean(1)
    np.testing.assert_allclose(new["lm_head/kernel"][:, 602:], np.tile(mean[:, None], 9), rtol=1e-6, atol=1e-7)
    assert np.std(new["vision/patch_embedding/kernel"]) > 0 and np.std(new["projector/fc1/kernel"]) > 0


def test_embedded_model_reads_text_as_before(dense, tmp_path):
    convert(dense, tmp_path / "mono", upcycling=upcycling())
    batch = BatchSpec(0, 16).empty(1)
    batch["tokens"][:] = np.arange(16) * 7 % 128
    batch["positions"][:], batch["segments"][:] = np.arange(16), 1
    logits = []
    for folder in (dense, tmp_path / "mono"):
        config, params = load_model(folder)
        model = Model(config)
        logits.append(np.asarray(model.logits(params, model(params, batch, jnp.float32).hidden)))
    np.testing.assert_array_equal(logits[1][..., :602], logits[0])


def test_added_tokens_of_the_embedded_model(dense, tmp_path):
    convert(dense, tmp_path / "mono", upcycling=upcycling())
    tokenizer = Tokenizer(tmp_path / "mono")
    assert [tokenizer.id(token) for token in SPECIAL] == [600, 601, 602, 603, 604]
    config = model_config(tmp_path / "mono")
    assert config.vocab_size == tokenizer.vocab_size == 611
    assert config.image_token_id == 604
    values = json.loads((tmp_path / "mono" / "config.json").read_text())
    assert values["model_type"] == "internvl_chat" and values["template"] == "internlm2-chat"
    assert values["llm_config"]["architectures"] == ["InternLM2VEForCausalLM"]
    assert values["torch_dtype"] == "float32"
    assert values["llm_config"]["bos_token_id"] == 1  # a key of the base that this project does not know


def test_attention_experts_can_be_added_to_a_mono_model(source, tmp_path):
    options = Upcycling(Tokenizer, attention_experts=True)
    convert(source, tmp_path / "new", target_kind="hf", image_token_id=100, upcycling=options)
    before, after = tensors_of(source), tensors_of(tmp_path / "new")
    for name, tensor in before.items():
        if "tok_embeddings" in name or "output" in name:
            np.testing.assert_array_equal(after[name][: len(tensor)], tensor)
        else:
            assert after[name].tobytes() == tensor.tobytes()
    for n in range(3):
        attention = f"language_model.model.layers.{n}.attention."
        np.testing.assert_array_equal(after[attention + "wqkv_ve.weight"], before[attention + "wqkv.weight"])


def test_the_vocabulary_of_a_mono_model_grows(source, tmp_path):
    report = convert(source, tmp_path / "grown", grow_vocabulary=160)
    assert (report["to"], report["vocabulary_rows_added"]) == ("hf", 32)
    before, after = tensors_of(source), tensors_of(tmp_path / "grown")
    for name, tensor in before.items():
        if "tok_embeddings" in name or "output" in name:
            assert after[name].shape == (160, 48) and after[name][:128].tobytes() == tensor.tobytes()
            np.testing.assert_allclose(after[name][128:], np.tile(tensor.mean(0), (32, 1)), atol=1e-6)
        else:
            assert after[name].tobytes() == tensor.tobytes()
    assert model_config(tmp_path / "grown") == model_config(source).replace(vocab_size=160)
    with pytest.raises(ConfigError, match="cannot shrink from 128 to 100"):
        convert(source, tmp_path / "shrunk", grow_vocabulary=100)
    with pytest.raises(ConfigError, match="give one of the two"):
        convert(source, tmp_path / "both", grow_vocabulary=700, upcycling=Upcycling(Tokenizer, {}, True))


def test_the_prompt_and_companions_go_both_ways(source, tmp_path):
    """The contents of a run's model.json are in the config.json of the export and are restored from there."""
    config, params, _ = open_model(source)
    values = json.loads((source / "config.json").read_text()) | {"dtype": "float32", "torch_dtype": "float32"}
    prompt = PromptFormat("internlm2-chat", "Look.", 1, 2, False)
    save_model(tmp_path / "run" / "model", config, params, origin=Origin(values, prompt, "float32"))
    names = ("preprocessor_config.json", "generation_config.json", "chat_template.jinja", "modeling_mono.py")
    for name in names:
        (tmp_path / "run" / "model" / name).write_text("{}")
    convert(tmp_path / "run", tmp_path / "hf", dtype="bfloat16")  # from a workdir
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (exported["max_dynamic_patch"], exported["use_thumbnail"]) == (2, False)
    assert (exported["torch_dtype"], exported["dtype"]) == ("bfloat16", "bfloat16")
    assert all((tmp_path / "hf" / name).is_file() for name in names)
    convert(tmp_path / "hf", tmp_path / "again")
    assert read_origin(tmp_path / "again").prompt == prompt


def test_same_seed_same_patch_embedding(dense, tmp_path):
    hashes = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(dense, tmp_path / name, upcycling=upcycling(seed=seed))
        hashes.append(tree_hash(load_model(tmp_path / name)[1]))
    assert hashes[0] == hashes[1] != hashes[2]


_MEASURE = """
import sys, threading, time
from pathlib import Path
from mono_jax.weights.convert import convert
from mono_jax.weights.model_folder import model_config
from mono_jax.weights.names import param_shapes

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

param_shapes(model_config(sys.argv[1]))  # what JAX itself needs is there before measuring
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
convert(*map(Path, sys.argv[1:]))
done.set()
thread.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_stays_near_the_largest_slice(tmp_path):
    """A model of 500 MB, 67 MB in its largest stack of layers, converts in well under one such stack and a half."""
    config = preset(
        "mono_internvl_2b",
        num_hidden_layers=8,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8000,
    )
    shapes = param_shapes(config)
    rng = np.random.default_rng(0)

    def lazy(path: str, shape: tuple[int, ...]) -> LazyArray:
        stacked = is_stacked(path)
        one = shape[1:] if stacked else shape
        return LazyArray(
            shape, np.dtype(jnp.bfloat16), stacked, lambda n: rng.random(one, np.float32).astype(jnp.bfloat16)
        )

    save_hf(tmp_path / "hf", config, tree.unflatten({path: lazy(path, shape) for path, shape in shapes.items()}))
    stack = max(2 * int(np.prod(shape)) for shape in shapes.values())
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    root = Path(mono_jax.__file__).parents[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    for source, target in (("hf", "orbax"), ("orbax", "back")):
        command = [sys.executable, "-c", _MEASURE, str(tmp_path / source), str(tmp_path / target)]
        output = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        grown = int(output.splitlines()[-1])
        assert grown < 1.5 * stack + (50 << 20) < 0.4 * total
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "hf" / "model.safetensors"
    ).read_bytes()
