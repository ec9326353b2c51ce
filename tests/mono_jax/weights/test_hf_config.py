"""config.json in and out: nothing is lost, and every error names the file, the key and the fix."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from data_pipelines.config import DataConfig
from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture, RopeScaling
from mono_jax.models.presets import PRESETS, preset
from mono_jax.weights import hf_config
from mono_jax.weights.prompt_format import PromptFormat, prompt_from_hf
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


V5 = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}


def with_rope(values: dict, **keys) -> dict:
    """``values`` with only these keys for the rotary embeddings."""
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        values["llm_config"].pop(key, None)
    values["llm_config"].update(keys)
    return values


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({"rope_parameters": V5}, 1e6, RopeScaling("dynamic", 2.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {"type": "linear", "factor": 4}, "rope_theta": 1e6}, 1e6, RopeScaling("linear", 4.0)),
        ({"rope_theta": 1e6, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 1e6, RopeScaling("dynamic", 2)),
        ({"rope_theta": 1e6, "rope_scaling": {"rope_type": "default"}}, 1e6, None),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": V5},
            1e6,
            RopeScaling("dynamic", 2.0),
        ),
        ({}, 1e4, None),
    ],
)
def test_every_spelling_of_rotary_embeddings_is_read_and_kept(golden, keys, theta, scaling):
    original = with_rope(golden("mono_tiny")[0], **keys)
    config = hf_config.config_from_hf(original)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    exported = hf_config.config_to_hf(config, original)
    if keys:
        assert exported == original
    # A changed model is written in the same spelling and is read correctly.
    for changes in ({"rope_theta": 7e5}, {"rope_scaling": RopeScaling("linear", 8.0)}, {"rope_scaling": None}):
        changed = config.replace(**changes)
        exported = hf_config.config_to_hf(changed, original)
        assert hf_config.config_from_hf(exported) == changed
        assert ("rope_parameters" in exported["llm_config"]) == ("rope_parameters" in keys)


def test_rotary_embeddings_of_a_dense_transformers_5_config(golden):
    values = with_rope(golden("mono_tiny")[0], rope_parameters=V5)["llm_config"]
    values |= {"architectures": ["InternLM2ForCausalLM"], "dtype": "bfloat16"}
    config = hf_config.config_from_hf(values)
    assert (config.rope_theta, config.rope_scaling) == (1e6, RopeScaling("dynamic", 2.0))
    assert hf_config.config_to_hf(config, values, "bfloat16") == values


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_parameters": V5 | {"rope_type": "yarn"}}, "rope_parameters: rope_type is 'yarn'"),
        ({"rope_parameters": V5 | {"rope_type": "llama3"}}, "rope_parameters: rope_type is 'llama3'"),
        ({"rope_parameters": V5 | {"beta_fast": 32}}, "rope_parameters: beta_fast is 32"),
        ({"rope_parameters": {"full_attention": V5}}, "rope_parameters: full_attention is"),
        ({"rope_parameters": V5, "rope_theta": 1e4}, "rope_parameters.rope_theta and rope_theta differ"),
        (
            {"rope_parameters": V5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling and rope_parameters differ",
        ),
        ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "rope_type and type differ"),
        ({"rope_parameters": {"factor": 2.0}}, "key 'rope_type' is missing"),
        ({"rope_parameters": V5 | {"factor": None}}, "key 'factor' is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"head_dim": 16}, "head_dim is 16"),
    ],
)
def test_rotary_embeddings_that_are_not_known_are_refused_by_name(golden, keys, message):
    with pytest.raises(ConfigError) as caught:
        hf_config.config_from_hf(with_rope(golden("mono_tiny")[0], **keys))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rotary_embeddings_where_nothing_reads_them(golden):
    values = with_rope(golden("mono_tiny")[0]) | {"rope_parameters": V5}
    with pytest.raises(ConfigError, match="rope_parameters is next to llm_config"):
        hf_config.config_from_hf(values)


def test_dtype_in_all_spellings_and_sections(golden):
    original = golden("mono_tiny")[0] | {"torch_dtype": "float32", "dtype": "float32"}
    original["llm_config"]["dtype"] = "float32"
    original["vision_config"]["torch_dtype"] = "float16"
    values = hf_config.with_dtype(original, "bfloat16")
    assert (values["torch_dtype"], values["dtype"], values["llm_config"]["dtype"]) == ("bfloat16",) * 3
    assert values["vision_config"]["torch_dtype"] == "bfloat16"
    assert hf_config.with_dtype(values, "float32") | {"vision_config": 0} == original | {"vision_config": 0}


def test_the_prompt_of_a_run_replaces_that_of_the_original(golden):
    original = golden("mono_tiny")[0] | {"dynamic_image_size": False, "max_dynamic_patch": 12, "template": "other"}
    config = hf_config.config_from_hf(original)
    prompt = PromptFormat("internlm2-chat", "You see.", 1, 2, False)
    values = hf_config.config_to_hf(config, original, prompt=prompt)
    expected = {"template": "internlm2-chat", "min_dynamic_patch": 1, "max_dynamic_patch": 2, "use_thumbnail": False}
    assert values == original | expected | {"dynamic_image_size": True, "system_message": "You see."}
    assert prompt_from_hf(values, Path("config.json")) == prompt
    own = prompt_from_hf(original, Path("config.json"))
    assert hf_config.config_to_hf(config, original, prompt=own) == original
    without = dataclasses.replace(prompt, system_message=None)
    assert prompt_from_hf(hf_config.config_to_hf(config, values, prompt=without), Path("f")) == without


def test_a_stale_image_token_is_replaced(golden):
    original = golden("mono_tiny")[0] | {"image_token_id": 7}
    config = hf_config.config_from_hf(original).replace(image_token_id=Architecture.image_token_id)
    assert hf_config.config_from_hf(hf_config.config_to_hf(config, original)) == config


def test_prompt_formats_default_to_those_of_training():
    names = [field.name for field in dataclasses.fields(PromptFormat)]
    defaults = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    assert PromptFormat() == PromptFormat(**{name: defaults[name] for name in names})


def test_the_prompt_of_a_dense_base_moves_to_the_top():
    """A trained language model records its prompt format; with visual experts added, the whole model does."""
    prompt = PromptFormat("internlm2-chat", "", 1, 2, True)
    dense = hf_config.config_to_hf(preset("tiny_lm"), None, "float32", prompt=prompt)
    values = hf_config.config_to_hf(preset("tiny_mono"), dense, "float32")
    assert prompt_from_hf(values, Path("config.json")) == prompt
    assert not set(values["llm_config"]) & {"template", "max_dynamic_patch", "system_message"}
