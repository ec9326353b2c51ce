"""The sets that a sequence of stages trains on and is evaluated with."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines import strict
from data_pipelines.recipes.demo.sets import HELDOUT, PAINTED, build_demo_sets
from data_pipelines.recipes.demo.sizes import DemoSizes
from data_pipelines.recipes.manifest import MANIFEST, STAGES, load_manifest
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.parallel.agreement import first_process_first
from mono_jax.runs.config import DemoSetsConfig, EvipConfig
from mono_jax.runs.console import say_now
from mono_jax.training.metrics import Say

NO_SETS = {"tokenizer": None, "stages": {}, "heldout": {}}


def prepare_sets(config: EvipConfig, workdir: Path, say: Say = say_now) -> dict[str, Any]:
    """Builds or opens the sets, on the first process before the others.

    Returns their manifest, or an empty one if the config names no sets. Raises ConfigError or DataError.
    """
    if not config.sets:
        return dict(NO_SETS)
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
            workers=_painters(sizes),
            progress=say,
        )


def expected_sets(config: EvipConfig) -> dict[str, Any]:
    """The manifest of the sets as far as it is known before they are built, with placeholders for files and sources.

    Of a folder that has no sets yet it has every stage that the config names, and None as "heldout". Raises ConfigError
    or DataError.
    """
    source, questions = {"name": "sets", "spec": {"kind": "text", "paths": "-"}}, {"path": "-", "image_root": "-"}
    stages, heldout = STAGES, {"text": "-", **dict.fromkeys(HELDOUT, questions)}
    if made_sets(config) is None:
        if not config.sets:
            return dict(NO_SETS)
        if (Path(config.sets["path"]) / MANIFEST).is_file():
            return load_manifest(config.sets["path"])
        stages, heldout = (*config.stages, *itertools.chain(*config.replay.values())), None
    return {"tokenizer": "-", "stages": {name: {"sources": [source]} for name in stages}, "heldout": heldout}


def with_heldout(evaluation: Mapping[str, Any], heldout: Mapping[str, Any] | None) -> dict[str, Any]:
    """``config.evaluation`` of a stage completed from the sets: sources that are None, and tasks that name no file.

    ``heldout``: the entry of the sets' manifest; None = placeholders, if there are no sets yet. Raises ConfigError that
    names the source or task if the sets have no held-out data of that name.
    """

    def entry(key: str, name: str) -> Any:
        if heldout is not None and name not in heldout:
            raise unknown_key(f"held-out set (config.evaluation.{key}.{name})", name, heldout)
        return {"path": "-", "image_root": "-"} if heldout is None else heldout[name]

    sources, tasks = dict(evaluation.get("sources") or {}), dict(evaluation.get("tasks") or {})
    for name in (name for name, spec in sources.items() if spec is None):
        found = entry("sources", name)
        if not isinstance(found, str):  # a file of text, or of records
            found = {"kind": "jsonl", "paths": found["path"], "image_root": found["image_root"]}
        sources[name] = found
    for name, task in tasks.items():
        if not task.get("path") and not task.get("data"):
            found = entry("tasks", name)
            if isinstance(found, str):
                raise ConfigError(f"config.evaluation.tasks.{name}: {found} is plain text, which contains no questions")
            tasks[name] = {**task, "path": found["path"], "image_root": found["image_root"]}
    return {**evaluation, "sources": sources, "tasks": tasks}


def made_sets(config: EvipConfig) -> tuple[DemoSetsConfig, DemoSizes] | None:
    """The settings of sets of kind "demo"; None if the config names existing sets, or none.

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


def _painters(sizes: DemoSizes) -> int:
    """Number of processes that paint: one per core if there is enough work to justify the seconds that they take to
    start."""
    samples = sum(dataclasses.asdict(sizes).values()) - sizes.text_bytes
    return 1 if samples < 10_000 else min(len(PAINTED), os.cpu_count() or 1)
