from __future__ import annotations

import pytest

from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture, RopeScaling, VisionConfig
from mono_jax.models.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_dict(name: str):
    config = preset(name)
    assert Architecture.from_dict(config.to_dict()) == config


def test_misspelt_keys_name_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'hidden_size'"):
        preset("tiny_mono", hiden_size=3)
    with pytest.raises(ConfigError, match="did you mean 'mono_internvl_2b'"):
        preset("mono_internvl_2")
    with pytest.raises(ConfigError, match="did you mean 'patch_size'"):
        Architecture.from_dict({"vision": {"patchsize": 14}})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vision": None}, "patch_embed"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict, what: str):
    with pytest.raises(ConfigError, match=what):
        preset("tiny_mono", **changes)


def test_vision_and_rope_values_are_checked():
    with pytest.raises(ConfigError, match="image_size"):
        VisionConfig(image_size=450)
    with pytest.raises(ConfigError, match="downsample_ratio"):
        VisionConfig(downsample_ratio=0.3)
    with pytest.raises(ConfigError, match="factor"):
        RopeScaling("linear", 0)
    with pytest.raises(ConfigError, match="type"):
        RopeScaling("longrope", 2.0)
    with pytest.raises(ConfigError, match="original_max_position_embeddings is missing: type 'yarn' needs it"):
        RopeScaling("yarn", 2.0)
    with pytest.raises(ConfigError, match="low_freq_factor is missing"):
        RopeScaling("llama3", 2.0, 8)
    with pytest.raises(ConfigError, match="beta_fast belongs to another type than 'linear'"):
        RopeScaling("linear", 2.0, beta_fast=3.0)


def test_windows_and_heads_are_checked():
    with pytest.raises(ConfigError, match="sliding_window and sliding_layers need each other"):
        Architecture(sliding_window=8)
    for layers in ((24,), (3, 1), (1, 1)):
        with pytest.raises(ConfigError, match=r"sliding_layers is .*: numbers of layers, ascending, below 24"):
            Architecture(sliding_window=8, sliding_layers=layers)
    with pytest.raises(ConfigError, match="head_size is 7: it must be even"):
        Architecture(head_size=7)
    assert (Architecture(head_size=96).query_dim, Architecture().query_dim) == (1536, 2048)


def test_what_other_families_have_is_left_out_where_unset():
    """A model folder of InternLM2 can be read by versions that support no other family."""
    assert not {"family", "qk_norm", "sliding_window", "head_size"} & Architecture().to_dict().keys()
    assert Architecture(rope_scaling=RopeScaling("dynamic", 2.0)).to_dict()["rope_scaling"] == {
        "type": "dynamic",
        "factor": 2.0,
    }
    other = Architecture(family="gemma3", qk_norm=True, sliding_window=4, sliding_layers=(0, 2))
    assert Architecture.from_dict(other.to_dict()) == other


@pytest.mark.parametrize(
    ("name", "pixels"), [("mono_internvl_2b_14px", 14), ("mono_internvl_2b", 28), ("mono_internvl_2b_56px", 56)]
)
def test_patch_size_presets(name: str, pixels: int):
    vision = preset(name).vision
    assert vision.token_pixels == pixels
    assert vision.tile_tokens == (448 // pixels) ** 2
