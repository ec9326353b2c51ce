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
        RopeScaling("yarn", 2.0)


@pytest.mark.parametrize(
    ("name", "pixels"), [("mono_internvl_2b_14px", 14), ("mono_internvl_2b", 28), ("mono_internvl_2b_56px", 56)]
)
def test_patch_size_presets(name: str, pixels: int):
    vision = preset(name).vision
    assert vision.token_pixels == pixels
    assert vision.tile_tokens == (448 // pixels) ** 2
