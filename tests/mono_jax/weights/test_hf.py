"""Hugging Face folders in and out. The folders read here are the golden ones or built by hand, never by ``hf``."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mono_jax import tree
from mono_jax.errors import ConfigError, WeightsError
from mono_jax.models.architecture import Architecture, RopeScaling, VisionConfig
from mono_jax.models.presets import PRESETS, preset
from mono_jax.weights import hf

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


def special_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Random bits: negative zeros, infinities, subnormals and NaNs of every payload among them."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return rng.integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


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


@pytest.fixture
def golden(golden_dir):
    """(config.json, tensors) of the golden model ``name``."""

    def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
        folder = golden_dir / name
        return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")

    return load


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
    config = hf.read_config(golden_dir / name)
    params = hf.load_params(golden_dir / name, config)
    assert hf.save_hf(tmp_path, config, params, original=original) == ["model.safetensors", "config.json"]
    assert_same_bytes(read_all(tmp_path), tensors)
    assert json.loads((tmp_path / "config.json").read_text()) == original
    assert_same_bytes(hf.named_tensors(config, params), tensors)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back_bit_for_bit(golden, tmp_path, variant, dtype):
    name, change = VARIANTS[variant]
    original, tensors = golden(name)
    change(original, tensors)
    rng = np.random.default_rng(0)
    tensors = {name: special_values(rng, tensor.shape, dtype) for name, tensor in tensors.items()}
    folder = write_folder(tmp_path / "in", original, tensors, shards=3)
    config = hf.read_config(folder)
    params = hf.load_params(folder, config)
    assert {leaf.dtype for leaf in tree.flatten(params).values()} == {np.dtype(dtype)}
    hf.save_hf(tmp_path / "out", config, params, original=original, shard_size=60_000)
    assert_same_bytes(read_all(tmp_path / "out"), tensors)
    assert hf.read_config(tmp_path / "out") == config


def test_layout_of_parameters(golden_dir, golden):
    """Against the definition of each layout, written out with indices."""
    _, tensors = golden("mono_tiny")
    config = hf.read_config(golden_dir / "mono_tiny")
    params = tree.flatten(hf.load_params(golden_dir / "mono_tiny", config))
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
    config = hf.read_config(golden_dir / "mono_tiny")
    stored = tree.flatten(hf.load_params(golden_dir / "mono_tiny", config))
    cast = tree.flatten(hf.load_params(golden_dir / "mono_tiny", config, jnp.bfloat16))
    for path, leaf in stored.items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(cast[path], leaf.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_unique_names_and_survive_their_config_json(name):
    config = preset(name)
    named = [row.name(n) for row in hf._tensors(config, None) for n in row.slices]
    assert len(named) == len(set(named))
    assert hf.config_from_hf(json.loads(json.dumps(hf.config_to_hf(config)))) == dataclasses.replace(
        config, image_token_id=config.image_token_id if config.vision else Architecture.image_token_id
    )


def test_mono_internvl_2b_has_the_published_size():
    shapes = hf.param_shapes(preset("mono_internvl_2b"))
    experts = sum(math.prod(shape) for path, shape in shapes.items() if "visual_feed_forward" in path)
    assert sum(map(math.prod, shapes.values())) == 3_111_355_392
    assert experts == 1_207_959_552
    assert sum(shape[0] if hf.is_stacked(path) else 1 for path, shape in shapes.items()) == 253


def test_every_row_of_the_name_table_is_used_by_some_model():
    vit = VisionConfig(kind="intern_vit", qk_normalization=True, num_hidden_layers=1)
    full = preset("tiny_mono_1_5", bias=True)
    modular = preset("tiny_lm", vision=vit)
    assert hf.param_shapes(full).keys() | hf.param_shapes(modular).keys() == hf._TABLE.keys()


# ---------------------------------------------------------------------------------------------------- shards


def test_shards_keep_to_the_size_and_the_index_names_each_tensor(golden_dir, golden, tmp_path):
    _, tensors = golden("mono_tiny")
    config = hf.read_config(golden_dir / "mono_tiny")
    params = hf.load_params(golden_dir / "mono_tiny", config)
    limit = 100_000
    files = hf.save_params(tmp_path, config, params, shard_size=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert sorted({*index["weight_map"].values(), "model.safetensors.index.json"}) == sorted(files)
    for file in set(index["weight_map"].values()):
        content = load_file(tmp_path / file)
        assert sum(tensor.nbytes for tensor in content.values()) <= limit
        assert all(index["weight_map"][name] == file for name in content)


def test_a_tensor_larger_than_a_shard_gets_its_own(golden_dir, golden, tmp_path):
    config = hf.read_config(golden_dir / "mono_tiny")
    params = hf.load_params(golden_dir / "mono_tiny", config)
    hf.save_params(tmp_path, config, params, shard_size=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 43
    assert_same_bytes(read_all(tmp_path), golden("mono_tiny")[1])


# ---------------------------------------------------------------------------------------------------- name tables


def test_name_table_changes_the_names_of_attention_experts(golden, tmp_path):
    original, tensors = golden("mono_tiny")
    for n in range(LAYERS):
        tensors[f"language_model.model.layers.{n}.visual_wqkv"] = np.full((QKV, WIDTH), n, np.float32)
    folder = write_folder(tmp_path / "in", original, tensors)
    path = "layers/visual_attention/wqkv/kernel"
    names = {path: "language_model.model.layers.{n}.visual_wqkv"}
    config = hf.read_config(folder, names=names)
    assert config.visual_attention_experts
    params = hf.load_params(folder, config, names=names)
    assert tree.flatten(params)[path][:, 0, 0].tolist() == [0, 1, 2]
    hf.save_params(tmp_path / "out", config, params, names=names)
    assert_same_bytes(read_all(tmp_path / "out"), tensors)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"layers/visual_atention/wqkv/kernel": "x{n}"}, "did you mean 'layers/visual_attention/wqkv/kernel'"),
        ({"layers/ffn_norm/scale": "norm.weight"}, "must have one {n}"),
        ({"final_norm/scale": "norm.{n}"}, "must have no {n}"),
        ({"final_norm/scale": "language_model.model.tok_embeddings.weight"}, "both have the name"),
    ],
)
def test_unusable_name_tables(golden_dir, names, message):
    config = hf.read_config(golden_dir / "mono_tiny")
    with pytest.raises(ConfigError, match=message):
        hf.open_params(golden_dir / "mono_tiny", config, names=names)


# ---------------------------------------------------------------------------------------------------- bad weights


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
        hf.load_params(folder, hf.read_config(folder))
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
    config = hf.read_config(folder)
    assert_same_bytes(hf.named_tensors(config, hf.load_params(folder, config)), tensors)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused(golden, tmp_path, pickle):
    original, _ = golden("mono_tiny")
    (tmp_path / "config.json").write_text(json.dumps(original))
    (tmp_path / pickle).write_bytes(b"\x80\x04.")
    with pytest.raises(WeightsError, match=rf"{pickle}.*never loaded.*safetensors"):
        hf.load_params(tmp_path, hf.read_config(tmp_path))


def test_broken_folders_are_named(golden, tmp_path):
    original, tensors = golden("mono_tiny")
    folder = write_folder(tmp_path / "in", original, tensors, shards=2)
    config = hf.read_config(folder)
    shard = folder / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=f"{shard.name}: not a readable safetensors file"):
        hf.load_params(folder, config)
    shard.unlink()
    with pytest.raises(WeightsError, match=f"{shard.name}: no such file"):
        hf.load_params(folder, config)
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        hf.load_params(tmp_path, config)
    with pytest.raises(WeightsError, match="nowhere: no such folder"):
        hf.load_params(tmp_path / "nowhere", config)


def test_parameters_that_do_not_fit_are_not_written(golden_dir, tmp_path):
    config = hf.read_config(golden_dir / "mono_tiny")
    flat = tree.flatten(hf.load_params(golden_dir / "mono_tiny", config))
    del flat["final_norm/scale"]
    flat["other/kernel"] = flat["mlp"] = np.zeros(3, np.float32)
    flat["projector/fc1/bias"] = np.zeros(3, np.float32)
    flat["projector/fc2/bias"] = np.zeros(WIDTH, np.int8)
    with pytest.raises(WeightsError) as caught:
        hf.save_params(tmp_path / "out", config, tree.unflatten(flat))
    message = str(caught.value)
    assert "1 missing (final_norm/scale)" in message
    assert "2 unexpected (mlp, other/kernel)" in message
    assert "projector/fc1/bias is [3], the config asks for [48]" in message
    assert "projector/fc2/bias is int8" in message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- config.json


def test_config_of_the_golden_models(golden_dir):
    config = hf.read_config(golden_dir / "mono_tiny")
    assert config.visual_ffn_experts and config.is_monolithic and not config.bias
    assert (config.num_attention_heads, config.num_key_value_heads, config.hidden_size) == (HEADS, KV_HEADS, WIDTH)
    assert config.rope_scaling == RopeScaling("dynamic", 2.0)
    assert (config.vision.image_size, config.vision.patch_size, config.vision.tile_size) == (56, 14, None)
    modular = hf.read_config(golden_dir / "modular_tiny")
    assert modular.vision.kind == "intern_vit" and not modular.visual_ffn_experts


def test_absent_keys_take_the_defaults_of_internlm2():
    values = {"model_type": "internlm2", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96}
    values |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.config_from_hf(values)
    assert config.bias is True
    assert config.num_key_value_heads == 4
    assert (config.rms_norm_eps, config.rope_theta, config.max_position_embeddings) == (1e-6, 10000.0, 2048)
    assert config.rope_scaling is None and config.vision is None


def test_tile_size_is_kept_when_it_differs_from_the_positional_grid(golden):
    original, _ = golden("mono_tiny")
    original["force_image_size"] = 84
    config = hf.config_from_hf(original)
    assert (config.vision.image_size, config.vision.tile_size) == (56, 84)
    assert hf.config_to_hf(config, original) == original


def test_unknown_keys_survive(golden):
    original, _ = golden("mono_tiny")
    original |= {"pad2square": False, "auto_map": {"AutoModel": "modeling.Model"}, "torch_dtype": "bfloat16"}
    original["llm_config"]["attn_implementation"] = "eager"
    assert hf.config_to_hf(hf.config_from_hf(original), original) == original
    changed = hf.config_from_hf(original).replace(rope_theta=5e5)
    expected = json.loads(json.dumps(original))
    expected["llm_config"]["rope_theta"] = 5e5
    assert hf.config_to_hf(changed, original) == expected


def test_attention_experts_export_carries_no_published_label(golden):
    original, _ = golden("mono_tiny")
    original |= {"_name_or_path": "OpenGVLab/Mono-InternVL-2B", "auto_map": {"AutoModel": "m.Mono"}}
    original["llm_config"]["_name_or_path"] = "internlm2-chat-1_8b-2B"
    config = hf.config_from_hf(original).replace(visual_attention_experts=True)
    exported = hf.config_to_hf(config, original)
    assert "2B" not in json.dumps(exported)
    assert "auto_map" not in exported
    assert exported["llm_config"]["architectures"] != original["llm_config"]["architectures"]
    assert hf.config_from_hf(exported) == config


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<img>": 602, "<IMG_CONTEXT>": 604}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"604": {"content": "<IMG_CONTEXT>"}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 604, "content": "<IMG_CONTEXT>"}]}),
    ],
)
def test_image_token_is_resolved_by_name(golden, tmp_path, file, content):
    original, _ = golden("mono_tiny")
    (tmp_path / "config.json").write_text(json.dumps(original))
    assert hf.read_config(tmp_path).image_token_id == 92546
    (tmp_path / file).write_text(json.dumps(content))
    assert hf.read_config(tmp_path).image_token_id == 604
    assert hf.read_config(tmp_path, image_token_id_=7).image_token_id == 7
    exported = hf.config_to_hf(hf.read_config(tmp_path), original)
    assert hf.config_from_hf(exported).image_token_id == 604


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("", {"model_type": "llava"}, "model_type is 'llava': use one of 'internvl_chat', 'internlm2'"),
        ("", {"ps_version": "v3"}, "ps_version is 'v3'"),
        ("", {"use_llm_lora": 16}, "use_llm_lora is 16: merge the LoRA"),
        ("", {"vision_config": None}, "vision_config: must be a JSON object"),
        ("", {"llm_config": [1]}, "llm_config: must be a JSON object"),
        ("", {"downsample_ratio": 0.3}, "downsample_ratio is 0.3"),
        ("vision_config", {"model_type": "clip"}, "vision_config: model_type is 'clip'"),
        ("vision_config", {"image_size": 50}, "image_size is 50: it must be a multiple of 28"),
        ("vision_config", {"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ("llm_config", {"architectures": ["LlamaForCausalLM"]}, "architectures is 'LlamaForCausalLM'"),
        ("llm_config", {"architectures": None}, "architectures is 'missing'"),
        ("llm_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llm_config", {"hidden_size": None}, "key 'hidden_size' is missing"),
        ("llm_config", {"hidden_size": "48"}, "hidden_size is '48': it must be of type int"),
        ("llm_config", {"hidden_size": True}, "hidden_size is True: it must be of type int"),
        ("llm_config", {"num_hidden_layers": 0}, "num_hidden_layers is 0: it must be greater than 0"),
        ("llm_config", {"num_key_value_heads": 4}, "not a multiple of num_key_value_heads 4"),
        ("llm_config", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling: type is 'yarn'"),
        ("llm_config", {"rope_scaling": {"type": "linear"}}, "rope_scaling: key 'factor' is missing"),
    ],
)
def test_unusable_configs_name_file_key_and_fix(golden, tmp_path, section, changes, message):
    original, _ = golden("mono_tiny")
    (original[section] if section else original).update(changes)
    (tmp_path / "config.json").write_text(json.dumps(original))
    with pytest.raises(ConfigError) as caught:
        hf.read_config(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\xff"])
def test_config_that_is_no_json_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        hf.read_config(tmp_path)


def test_missing_folder_and_config(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        hf.read_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        hf.read_config(tmp_path)
