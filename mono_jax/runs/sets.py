"""The sets that a sequence of stages trains on and is measured with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from data_pipelines import strict
from data_pipelines.recipes.demo.sets import build_demo_sets
from data_pipelines.recipes.demo.sizes import DemoSizes
from data_pipelines.recipes.manifest import load_manifest
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.parallel.agreement import first_process_first
from mono_jax.runs.config import DemoSetsConfig, EvipConfig
from mono_jax.runs.console import say_now
from mono_jax.training.metrics import Say


def prepare_sets(config: EvipConfig, workdir: Path, say: Say = say_now) -> dict[str, Any]:
    """Builds or opens the sets, the first process before the others.

    Returns their manifest, an empty one where the config names none. Raises ConfigError or DataError.
    """
    if not config.sets:
        return {"tokenizer": None, "stages": {}, "heldout": {}}
    with first_process_first():
        if (made := made_sets(config)) is None:
            return load_manifest(config.sets["path"])
        own, sizes = made
        return build_demo_sets(
            (workdir / "data").resolve(),
            seed=own.seed,
            sizes=sizes,
            edge=own.edge or config.vision.tile,
            mismatched=own.mismatched,
            token_pixels=config.vision.token_pixels,
            vocabulary=own.vocabulary,
            progress=say,
        )


def made_sets(config: EvipConfig) -> tuple[DemoSetsConfig, DemoSizes] | None:
    """What sets of kind "demo" are made of; None where the config names sets that are there, or none.

    Raises ConfigError that names the key.
    """
    options = dict(config.sets)
    kind = options.pop("kind", None)
    if not config.sets or kind == "folder":
        if config.sets and not isinstance(options.get("path"), str):
            raise ConfigError("config.sets.path is missing: the folder that real_sets or demo_sets made")
        return None
    if kind != "demo":
        raise unknown_key("config.sets.kind", str(kind), ("demo", "folder"))
    own = {field.name: options.pop(field.name) for field in dataclasses.fields(DemoSetsConfig) if field.name in options}
    made = strict.build(DemoSetsConfig, own, "config.sets", ConfigError)
    return made, strict.build(DemoSizes, options, "config.sets", ConfigError)
