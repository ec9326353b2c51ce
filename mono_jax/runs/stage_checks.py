"""Checks all stages of a sequence before the first is trained: an error in the last should not show after days."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines import strict
from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError
from mono_jax import tree
from mono_jax.errors import ConfigError, WeightsError
from mono_jax.models.adapters import Adapters
from mono_jax.models.architecture import Architecture
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.runs.architecture import architecture_of
from mono_jax.runs.batches import check_slots
from mono_jax.runs.config import EvipConfig, RunConfig
from mono_jax.runs.evaluating import rows_of
from mono_jax.runs.program import Program
from mono_jax.runs.sets import expected_sets
from mono_jax.runs.stage_configs import StageConfigs
from mono_jax.training.groups import Selection
from mono_jax.training.optim import make_optimizer
from mono_jax.weights.model_folder import model_config


@dataclasses.dataclass(frozen=True)
class _Expected(StageConfigs):
    """The stages on sets that need not exist."""

    config: EvipConfig
    manifest: Mapping[str, Any]

    def vocabulary(self, tokenizer: str) -> int:
        return 256  # any: see ``_with_vocabulary``


def check_stages(config: EvipConfig, base: Architecture | None, on_devices: bool = False) -> None:
    """Raises ConfigError, which names the stage, for whatever a stage of ``config`` would be refused for.

    Only files of sets and tokenizers, and the number of tokens, are left to the stages themselves.

    Args:
      base: architecture of ``config.init``; None = not known yet, so that the groups it has are not checked.
      on_devices: whether the stages run on the devices of this process: then the mesh, and the models that
        ``config.scores`` names, are checked, too.
    """
    stages, here, init = _Expected(config, expected_sets(config)), base, config.init
    for folder in config.stages:
        try:
            if config.stage_name(folder) != "S0":
                here = stages.with_vision(init, here)
            stages.check_replay(folder)
            if on_devices and (model := config.scores.get(folder, folder)) not in config.stages:
                model_config(model)  # a folder with the model that gives the scores
            here = check_run(stages.stage_config(folder, init), here, on_devices)
        except (ConfigError, DataError, WeightsError) as error:
            raise ConfigError(f"stage {folder}: {error}") from None
        init = f"the model of {folder}"


def local_base(init: str) -> Architecture | None:
    """The architecture of the weights in a local folder; None if they are elsewhere, or not there yet."""
    with contextlib.suppress(WeightsError):
        return model_config(init) if init and Path(init).is_dir() else None
    return None


def check_run(run: RunConfig, base: Architecture | None, on_devices: bool = False) -> Architecture | None:
    """The architecture of the run's model, which starts from weights of ``base`` if it has an ``init``; None if that is
    not known. Raises ConfigError for what does not fit the model."""
    if run.init and base is None:
        _check_names(run)
        return None
    config = architecture_of(run, base and _with_vocabulary(base, run))
    check_slots(config, run.execution, run.data)
    if on_devices:
        rows_of(Program.build(run, run.steps or 1, architecture=config))
    else:
        params = _params(config, run.adapters(config))
        make_optimizer(run.resolved_stage(), config, params, run.steps or 1, run.optim)
        DataConfig.from_dict(strict.to_dict(run.data) | dict(run.evaluation.data))
    return config


def _check_names(run: RunConfig) -> None:
    """Raises ConfigError for selections that no model has."""
    for text in run.resolved_stage().trains:
        if text != "*":
            Selection.parse(text, None)
    for text in run.lora.targets or ():
        Selection.parse(text, None, "lora.targets")


def _with_vocabulary(base: Architecture, run: RunConfig) -> Architecture:
    """``base`` with the number of tokens that the run states, since the tokenizer that decides it is not read here."""
    stated = run.model.get("vocab_size")
    if stated is None and isinstance(name := run.model.get("preset"), str):
        stated = preset(name).vocab_size
    return base if stated is None else base.replace(vocab_size=stated)


@functools.lru_cache(maxsize=64)
def _params(config: Architecture, adapters: Adapters | None) -> tree.Tree:
    """Shapes of the parameters, which many stages of a sweep have in common."""
    return Model(config, adapters=adapters).abstract_params()
