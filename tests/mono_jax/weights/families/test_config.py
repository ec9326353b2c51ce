"""config.json of the families: its values are read, and unsupported features are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mono_jax.errors import ConfigError
from mono_jax.models.architecture import RopeScaling
from mono_jax.models.presets import preset
from mono_jax.weights.families.table import FAMILIES
from mono_jax.weights.hf_config import config_from_hf, config_to_hf


def published(golden_dir: Path, name: str, **changes: Any) -> dict[str, Any]:
    values = json.loads((golden_dir / "families" / name / "config.json").read_text())
    return {key: value for key, value in (values | changes).items() if value != "absent"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "phi3"}, "model_type is 'phi3': use one of 'internvl_chat', 'internlm2', 'llama'"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True: for Llama this project supports False only"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("llama", {"head_dim": 7}, "head_size is 7: it must be even"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale is 0.7"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate is False"),
        ("qwen2", {"attention_bias": True}, "attention_bias is True"),
        ("qwen2", {"head_dim": 16}, "head_dim is 16"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["chunked"]}, "layer_types is ['chunked']"),
        ("mistral", {"attention_bias": True}, "attention_bias is True"),
        ("mistral", {"layer_types": ["full_attention"]}, "layer_types is ['full_attention']"),
        ("qwen3", {"num_experts": 64}, "num_experts is 64"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters must have the keys 'full_attention'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(golden_dir: Path, name: str, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        config_from_hf(published(golden_dir, name, **changes), file="config.json")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.json")


def test_what_the_keys_of_older_releases_say(golden_dir: Path):
    """Gemma 3 as written before transformers 5."""
    changes = {"rope_parameters": "absent", "layer_types": "absent", "rope_theta": 5e3, "rope_local_base_freq": 100.0}
    old = published(golden_dir, "gemma3", **changes)
    config = config_from_hf(published(golden_dir, "gemma3"))
    assert config_from_hf(old) == config and config.sliding_layers == (0, 1)
    assert config_to_hf(config, old) == old
    scaled = config_from_hf(old | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert scaled == config.replace(rope_scaling=RopeScaling("linear", 8.0))


@pytest.mark.parametrize(
    ("name", "changes", "fields"),
    [
        ("mistral", {"sliding_window": None}, {"sliding_window": None, "sliding_layers": ()}),
        ("mistral", {"sliding_window": "absent"}, {"sliding_window": 4096, "sliding_layers": (0, 1)}),
        (
            "qwen2",
            {"layer_types": "absent", "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5},
            {"sliding_window": 5, "sliding_layers": (1,)},
        ),
        ("qwen3", {"head_dim": "absent"}, {"head_size": 128}),
        ("llama", {"head_dim": "absent"}, {"head_size": None}),
        ("llama", {"tie_word_embeddings": "absent"}, {"tie_word_embeddings": False}),
        ("gemma3", {"tie_word_embeddings": "absent"}, {"tie_word_embeddings": True}),
    ],
)
def test_absent_keys_mean_what_they_mean_to_transformers(
    golden_dir: Path, name: str, changes: dict[str, Any], fields: dict[str, Any]
):
    values = published(golden_dir, name, **changes)
    config = config_from_hf(values)
    assert {field: getattr(config, field) for field in fields} == fields
    assert config_from_hf(config_to_hf(config, values)) == config


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "internlm2"])
def test_a_changed_model_is_read_as_what_it_is(golden_dir: Path, name: str):
    values = published(golden_dir, name)
    config = config_from_hf(values)
    assert config_to_hf(config, values) == values
    for changes in (
        {"rope_theta": 7e5},
        {"rope_scaling": None},
        {"rope_scaling": RopeScaling("yarn", 4.0, 32, beta_fast=16.0, attention_factor=1.25)},
        {"rope_scaling": RopeScaling("llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=2.0)},
        {"vocab_size": 70},
    ):
        changed = config.replace(**changes)
        for original in (values, None):
            assert config_from_hf(json.loads(json.dumps(config_to_hf(changed, original)))) == changed
    if config.sliding_layers:
        changed = config.replace(sliding_window=9)
        assert config_from_hf(config_to_hf(changed, values)) == changed


def test_a_family_that_cannot_say_what_a_model_is():
    for changes in ({"qk_norm": True}, {"qkv_bias": True}, {"sliding_window": 4, "sliding_layers": (0,)}):
        with pytest.raises(
            ConfigError, match=f"model.{next(iter(changes))} is .* a config.json of Llama cannot express this"
        ):
            config_to_hf(preset("tiny_lm", family="llama", **changes))
    with pytest.raises(ConfigError, match="head_size"):
        config_to_hf(preset("tiny_lm", head_size=32))
