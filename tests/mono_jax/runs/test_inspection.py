from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipelines.batch import DEFAULT_GEOMETRY, TileGeometry
from mono_jax.errors import ConfigError, WeightsError
from mono_jax.models.presets import preset
from mono_jax.runs import inspection
from mono_jax.runs.inspection import tile_geometry


@pytest.mark.parametrize(
    ("values", "geometry"),
    [
        ({}, DEFAULT_GEOMETRY),
        ({"model": {"preset": "internlm2_1_8b"}}, DEFAULT_GEOMETRY),
        ({"model": {"preset": "mono_internvl_2b_56px"}}, TileGeometry(448, 56)),
        ({"model": {"preset": "tiny_mono"}}, TileGeometry(32, 8)),
        (
            {"model": {"preset": "tiny_mono", "vision": {"tile_size": 64, "ps_version": "v1"}}},
            TileGeometry(64, 8, "v1"),
        ),
        ({"vision": {"patch_size": 16, "image_size": 64}}, TileGeometry(64, 32)),
    ],
)
def test_tiles_are_those_of_the_model(values: dict[str, Any], geometry: TileGeometry):
    assert tile_geometry(values) == geometry


def test_a_model_says_its_geometry():
    vision = preset("tiny_mono").vision
    assert vision.geometry.tokens_per_tile == vision.tile_tokens


@pytest.mark.parametrize(("base", "geometry"), [("tiny_mono", TileGeometry(32, 8)), ("tiny_lm", TileGeometry(64, 32))])
def test_tiles_of_a_sequence_are_those_of_a_base_that_sees(
    base: str, geometry: TileGeometry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """``vision`` is what a base without vision gets."""
    monkeypatch.setattr(inspection, "model_config", lambda folder: preset(base))
    data = {"tokenizer": "tokenizer", "sources": [{"spec": {"kind": "tar", "paths": "shards/*.tar"}}]}
    values = {"init": "models/base", "vision": {"patch_size": 16, "image_size": 64}, "data": data}
    values["stages"] = {"s1_1": {"stage": "S1.1", "steps": 1}}
    assert tile_geometry(inspection._stage_values(values, tmp_path, None)) == geometry


def test_bad_models_are_named():
    with pytest.raises(ConfigError, match="tiny_mono"):
        tile_geometry({"model": {"preset": "tiny_mon"}})
    with pytest.raises(ConfigError, match="patch_size"):
        tile_geometry({"vision": {"patchsize": 16}})
    with pytest.raises(WeightsError, match="no such folder"):
        tile_geometry({"init": "absent"})
