"""A run in native resolution, from its first step to an answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.batch import of_native_cells
from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError
from data_pipelines.loading.packed_data import PackedData
from experiments import generate
from mono_jax.errors import ConfigError
from mono_jax.hf_export.layout import write_files
from mono_jax.weights.convert import convert
from mono_jax.weights.hf_config import read_config
from mono_jax.weights.model_folder import model_config
from tests.mono_jax.runs.test_result import hf_folder, run, settings

pytestmark = pytest.mark.usefixtures("one_device")


def test_it_trains_answers_and_is_exported_as_what_it_is(sets: dict[str, Any], tmp_path: Path, capsys: Any):
    init = hf_folder(tmp_path / "init", sets, "float32")
    values = settings(sets, init, model={"vision": {"native": True}})
    model = run(values, tmp_path / "run")
    config = model_config(str(model))
    assert config.vision.native and config.geometry.native

    data = PackedData(DataConfig.from_dict(values["data"]), tmp_path / "cache", config.geometry)
    batch = data.batch(0)  # raises if the plan, made from headers, has other numbers of tokens
    _, _, rows, columns = of_native_cells(batch["patch_cells"][0, :1])
    assert rows * columns <= 2 * config.vision.tile_tokens and not data.report.bad
    geometry = config.replace(vision=dataclasses.replace(config.vision, native=False)).geometry
    assert PackedData(DataConfig.from_dict(values["data"]), tmp_path / "cache", geometry).identity != data.identity

    on_device = DataConfig.from_dict(values["data"] | {"pixel_path": "device"})
    with pytest.raises(DataError, match=r"vision\.native has none"):
        PackedData(on_device, tmp_path / "cache", config.geometry)

    picture = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 130, 3), np.uint8)).save(picture)
    generate.main([f"--model={model}", f"--image={picture}", "--prompt=what is this", "--max_new_tokens=2", "--json"])
    [turn] = json.loads(capsys.readouterr().out.splitlines()[-1])["turns"]
    assert turn["visual_tokens"] == 8 * 3  # of 16 pixels
    with pytest.raises(ConfigError, match=r"vision\.native has no published layout"):
        convert(str(model), tmp_path / "published", target_kind="hf", layout="published", own_layout=write_files)
    convert(str(model), tmp_path / "own", target_kind="hf", own_layout=write_files)
    assert (
        json.loads((tmp_path / "own/processor_config.json").read_text())["native"]
        and read_config(tmp_path / "own") == config
    )
