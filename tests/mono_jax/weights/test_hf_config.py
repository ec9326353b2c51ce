"""config.json in and out: nothing is lost, and every error names the file, the key and the fix."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture, RopeScaling
from mono_jax.models.presets import PRESETS, preset
from mono_jax.weights import hf_config
from tests.mono_jax.weights.hf_folders import HEADS, KV_HEADS, WIDTH


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_their_config_json(name):
    config = preset(name)
    assert hf_config.config_from_hf(json.loads(json.dumps(hf_config.config_to_hf(config)))) == dataclasses.replace(
        config, image_token_id=config.image_token_id if config.vision else Architecture.image_token_id
    )


def test_config_of_the_golden_models(golden_dir):
    config = hf_config.read_config(golden_dir / "mono_tiny")
    assert config.visual_ffn_experts and config.is_monolithic and not config.bias
    assert (config.num_attention_heads, config.num_key_value_heads, config.hidden_size) == (HEADS, KV_HEADS, WIDTH)
    assert config.rope_scaling == RopeScaling("dynamic", 2.0)
    assert (config.vision.image_size, config.vision.patch_size, config.vision.tile_size) == (56, 14, None)
    modular = hf_config.read_config(golden_dir / "modular_tiny")
    assert modular.vision.kind == "intern_vit" and not modular.visual_ffn_experts


def test_absent_keys_take_the_defaults_of_internlm2():
    values = {"model_type": "internlm2", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96}
    values |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf_config.config_from_hf(values)
    assert config.bias is True
    assert config.num_key_value_heads == 4
    assert (config.rms_norm_eps, config.rope_theta, config.max_position_embeddings) == (1e-6, 10000.0, 2048)
    assert config.rope_scaling is None and config.vision is None


def test_tile_size_is_kept_when_it_differs_from_the_positional_grid(golden):
    original, _ = golden("mono_tiny")
    original["force_image_size"] = 84
    config = hf_config.config_from_hf(original)
    assert (config.vision.image_size, config.vision.tile_size) == (56, 84)
    assert hf_config.config_to_hf(config, original) == original


def test_unknown_keys_survive(golden):
    original, _ = golden("mono_tiny")
    original |= {"pad2square": False, "auto_map": {"AutoModel": "modeling.Model"}, "torch_dtype": "bfloat16"}
    original["llm_config"]["attn_implementation"] = "eager"
    assert hf_config.config_to_hf(hf_config.config_from_hf(original), original) == original
    changed = hf_config.config_from_hf(original).replace(rope_theta=5e5)
    expected = json.loads(json.dumps(original))
    expected["llm_config"]["rope_theta"] = 5e5
    assert hf_config.config_to_hf(changed, original) == expected


def test_attention_experts_export_carries_no_published_label(golden):
    original, _ = golden("mono_tiny")
    original |= {"_name_or_path": "OpenGVLab/Mono-InternVL-2B", "auto_map": {"AutoModel": "m.Mono"}}
    original["llm_config"]["_name_or_path"] = "internlm2-chat-1_8b-2B"
    config = hf_config.config_from_hf(original).replace(visual_attention_experts=True)
    exported = hf_config.config_to_hf(config, original)
    assert "2B" not in json.dumps(exported)
    assert "auto_map" not in exported
    assert exported["llm_config"]["architectures"] != original["llm_config"]["architectures"]
    assert hf_config.config_from_hf(exported) == config


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
    assert hf_config.read_config(tmp_path).image_token_id == 92546
    (tmp_path / file).write_text(json.dumps(content))
    assert hf_config.read_config(tmp_path).image_token_id == 604
    assert hf_config.read_config(tmp_path, image_token_id=7).image_token_id == 7
    exported = hf_config.config_to_hf(hf_config.read_config(tmp_path), original)
    assert hf_config.config_from_hf(exported).image_token_id == 604


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
        ("llm_config", {"num_key_value_heads": 4}, "must be a multiple of model.num_key_value_heads (4)"),
        ("llm_config", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling: type is 'yarn'"),
        ("llm_config", {"rope_scaling": {"type": "linear"}}, "rope_scaling: key 'factor' is missing"),
    ],
)
def test_unusable_configs_name_file_key_and_fix(golden, tmp_path, section, changes, message):
    original, _ = golden("mono_tiny")
    (original[section] if section else original).update(changes)
    (tmp_path / "config.json").write_text(json.dumps(original))
    with pytest.raises(ConfigError) as caught:
        hf_config.read_config(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\xff"])
def test_config_that_is_no_json_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        hf_config.read_config(tmp_path)


def test_missing_folder_and_config(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        hf_config.read_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        hf_config.read_config(tmp_path)
