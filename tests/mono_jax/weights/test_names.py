"""The table of names: complete, unique, and open to the names of other releases."""

from __future__ import annotations

import math

import pytest

from mono_jax.errors import ConfigError
from mono_jax.models.architecture import VisionConfig
from mono_jax.models.presets import PRESETS, preset
from mono_jax.weights import hf_config, readers
from mono_jax.weights.families.table import FAMILIES
from mono_jax.weights.names import VISION, is_stacked, param_shapes, tensors


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_unique_names(name):
    named = [name for row in tensors(preset(name)) for n in row.slices for name in row.names(n)]
    assert len(named) == len(set(named))


def test_mono_internvl_2b_has_the_published_size():
    shapes = param_shapes(preset("mono_internvl_2b"))
    experts = sum(math.prod(shape) for path, shape in shapes.items() if "visual_feed_forward" in path)
    assert sum(map(math.prod, shapes.values())) == 3_111_355_392
    assert experts == 1_207_959_552
    assert sum(shape[0] if is_stacked(path) else 1 for path, shape in shapes.items()) == 253


@pytest.mark.parametrize("name", FAMILIES)
def test_every_name_of_a_family_is_used_by_some_model(name):
    family = FAMILIES[name]
    vit = VisionConfig(kind="intern_vit", qk_normalization=True, num_hidden_layers=1)
    bias = {"bias": "bias" in family.keys}
    full = preset("tiny_mono_1_5", family=name, **family.parts, **bias)
    modular = preset("tiny_lm", family=name, vision=vit, **family.parts, **bias)
    assert param_shapes(full).keys() | param_shapes(modular).keys() == family.tensors.keys() | VISION.keys()
    for config in (full, modular):
        assert {row.path for row in tensors(config)} == param_shapes(config).keys()


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
    config = hf_config.read_config(golden_dir / "mono_tiny")
    with pytest.raises(ConfigError, match=message):
        readers.open_params(golden_dir / "mono_tiny", config, names=names)
