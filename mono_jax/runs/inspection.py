"""Implements ``inspect_data.py``: the data of a config, with the tiles of the config's model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines import strict
from data_pipelines.batch import DEFAULT_GEOMETRY, TileGeometry
from data_pipelines.config import DataConfig
from data_pipelines.inspection.batches import inspect
from data_pipelines.inspection.plans import suggestions, whole_epoch
from data_pipelines.io import paths
from data_pipelines.loading.packed_data import PackedData
from mono_jax.errors import unknown_key
from mono_jax.models.architecture import Architecture, VisionConfig
from mono_jax.models.presets import preset
from mono_jax.runs.config import EvipConfig
from mono_jax.runs.evip import Evip
from mono_jax.weights.model_folder import model_config


def tile_geometry(values: Mapping[str, Any]) -> TileGeometry:
    """Tile geometry of the model that a config describes with the keys "init", "model" or "vision"; otherwise the
    default.

    Raises ConfigError or WeightsError that names the bad key or folder.
    """
    model = values.get("model") or {}
    vision = None
    if values.get("init"):
        vision = model_config(values["init"]).vision
    elif model.get("preset"):
        vision = preset(model["preset"]).vision
    changes = model.get("vision") or values.get("vision") or {}
    if vision is None and not changes:
        return DEFAULT_GEOMETRY
    fields = {**dataclasses.asdict(vision or VisionConfig()), **changes}
    return Architecture.from_dict({"vision": fields}).vision.geometry


def run(
    values: Mapping[str, Any],
    *,
    start: int = 0,
    steps: int = 4,
    hosts: int = 1,
    html: str | None = None,
    html_rows: int = 8,
    epoch: bool = False,
    suggest_capacity: bool = False,
    slots: int | None = None,
    row_multiple: int | None = None,
    cache_dir: str | None = None,
    stage: str | None = None,
) -> dict[str, Any]:
    """Makes ``steps`` batches of the config's data and, if asked, packs an epoch and suggests row sizes.

    Args:
      values: a config for training, for ``evip.py`` or only for data (``DataConfig``).
      html: file for an HTML page of the rows; the other arguments are as in ``data_pipelines.inspection``.
      stage: which of a config with several stages (default: the first); its sets are built in the cache folder.

    Returns the figures. Raises DataError or MonoJaxError.
    """
    settings, values = data_of(values, cache_dir, stage)
    if settings.pixel_path == "device":
        settings = dataclasses.replace(settings, pixel_path="exact")  # the same bytes, made on the host
    data = PackedData(settings, cache_dir, tile_geometry(values))
    result = {"identity": data.identity}
    result |= inspect(data, start, steps, hosts, Path(html) if html else None, html_rows)
    if epoch:
        result["epoch"] = whole_epoch(data)
    if suggest_capacity:
        result["suggestions"] = suggestions(data, slots, row_multiple)
    return result


def data_of(
    values: Mapping[str, Any], cache_dir: str | None, stage: str | None
) -> tuple[DataConfig, Mapping[str, Any]]:
    """The data of a config (see ``run``), and the values that describe its model. Raises DataError or MonoJaxError."""
    if "stages" in values:
        values = _stage_values(values, Path(cache_dir) if cache_dir else paths.cache_dir(), stage)
    settings = values.get("data", values)
    return settings if isinstance(settings, DataConfig) else DataConfig.from_dict(settings), values


def _stage_values(values: Mapping[str, Any], folder: Path, stage: str | None) -> dict[str, Any]:
    """ "data" of one stage of a sequence and "vision", or "init" of a base with vision; sets are built in
    ``folder``."""
    config = EvipConfig.from_dict(values)
    stage = stage or next(iter(config.stages))
    if stage not in config.stages:
        raise unknown_key("stage of the config", stage, config.stages)
    run = Evip.open(config, folder).stage_config(stage, config.init)
    if config.init and model_config(config.init).vision is not None:
        return {"data": run.data, "init": config.init}
    return {"data": run.data, "vision": strict.to_dict(config.vision)}
