"""The batches of a run, opened as in its checkpoint, or with other sources from some step on."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import strict
from data_pipelines.batch import TileGeometry
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.io import publish
from data_pipelines.loading.changing import change_sources
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.packing.standing import Begin
from data_pipelines.special_tokens import IMAGE_CONTEXT
from mono_jax.checkpoints.manager import Checkpoints
from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture
from mono_jax.models.execution import Execution
from mono_jax.parallel.agreement import first_process_first
from mono_jax.runs.config import RunConfig
from mono_jax.runs.workdir import Workdir
from mono_jax.training.metrics import Say


@dataclasses.dataclass(frozen=True)
class SkippingSteps:
    """The batches of ``data``, with zero loss weights in ``ranges`` of steps (first and last, as printed)."""

    data: PackedData
    ranges: tuple[tuple[int, int], ...]

    @property
    def batch_size(self) -> int:
        return self.data.batch_size

    def iterate(
        self, start_step: int = 0, rows: Sequence[int] | None = None
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for number, batch in self.data.iterate(start_step, rows):
            if any(first <= number + 1 <= last for first, last in self.ranges):
                batch = {**batch, "loss_weights": np.zeros_like(batch["loss_weights"])}
            yield number, batch


def open_data(run: RunConfig, config: Architecture, workdir: Workdir, checkpoints: Checkpoints, say: Say) -> PackedData:
    """The batches of ``run``, whose sources may have changed since the newest checkpoint (``change_data_at``).

    Raises DataError or ConfigError if there are none, if the model cannot read them, or if the change is not possible.
    """
    stored = checkpoints.metadata() if checkpoints.steps() else None
    if stored is not None:
        stored.setdefault("step", checkpoints.steps()[-1])  # of a checkpoint before 0.3
        stored["config"] = workdir.found(stored["config"])
    begun = (workdir.files / "config.json").is_file()  # its batches stay the same, whatever the storage contains now
    with first_process_first():  # it counts what the others then find in the cache
        data = opened(run, config.geometry, run.cache_dir or workdir.cache, stored, begun)
    for line in data.changes:
        say(f"from step {data.plan.begin.step} on: {line}")
    data.report.window = run.bad_share_window
    check_data_fits(config, run.execution, data)
    return data


def opened(
    run: RunConfig, geometry: TileGeometry, cache: Path | str, stored: Mapping[str, Any] | None, begun: bool
) -> PackedData:
    """``stored``: metadata of the checkpoint that the run resumes from; ``begun``: whether the run was started
    before."""
    begin = Begin.from_dict(stored["begin"]) if stored is not None and stored.get("begin") else None
    at = run.change_data_at
    if at is not None and stored is None:
        raise ConfigError(f"config.change_data_at is {at}, but there is no checkpoint whose sources could change")
    past = run.data.sources if stored is None or at is None else _sources_of(stored)
    if past == run.data.sources:
        return PackedData(run.data, cache, geometry, ask_again=not begun, begin=begin)
    assert at is not None and stored is not None
    if at < stored["step"]:
        raise ConfigError(
            f"config.change_data_at is {at}, but {stored['step']} steps are done: give that step or a later one"
        )
    if run.epochs is not None:
        raise ConfigError("config.epochs has no meaning once the sources change: give config.steps")
    names = [[source.name for source in sources] for sources in (past, run.data.sources)]
    if run.data.source_ids and at > stored["step"] and names[0] != names[1]:
        raise ConfigError(
            f"config.change_data_at is {at}: with data.source_ids, other sources can only begin at the checkpoint, "
            f"step {stored['step']}: give that step, or leave out source_ids until then"
        )
    old = PackedData(dataclasses.replace(run.data, sources=past), cache, geometry, ask_again=False, begin=begin)
    if old.identity != stored["data"]:
        raise ConfigError(
            "config.change_data_at: the checkpoint's sources have changed on storage, or other keys of data have: "
            "keep the old files until the change takes effect, and name the new ones in data.sources"
        )
    old.plan.restore(np.array(stored["plan"], np.int64))
    return change_sources(old, run.data, at)


def _sources_of(stored: Mapping[str, Any]) -> tuple[SourceConfig, ...]:
    """The sources that the checkpoint was made with."""
    return DataConfig.from_dict(stored["config"]["data"]).sources


def record_changes(workdir: Path, data: PackedData, resumed_at: int, changes: Sequence[strict.Change]) -> None:
    """Adds a line to WORKDIR/data_changes.jsonl that says what changed at which step, unless the file already says
    so."""
    file = workdir / "data_changes.jsonl"
    entry = {
        "at_step": data.plan.begin.step,
        "sources": data.changes,
        "config": [{"key": change.key, "old": change.old, "new": change.new} for change in changes],
    }
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    if lines and {name: value for name, value in json.loads(lines[-1]).items() if name in entry} == entry:
        return
    lines.append(json.dumps({"resumed_at": resumed_at, "time": round(time.time()), **entry}))
    publish.write_text(file, "".join(line + "\n" for line in lines))


def with_image_token(run: RunConfig, config: Architecture, data: PackedData) -> Architecture:
    """``config`` with the id of <IMG_CONTEXT> in the tokenizer that makes the batches, if it has one.

    Raises ConfigError if ``config.model`` says otherwise.
    """
    found, given = data.tokenizer.added.get(IMAGE_CONTEXT), run.model.get("image_token_id")
    if None not in (found, given) and found != given:
        raise ConfigError(
            f"config.model.image_token_id is {given}, but {IMAGE_CONTEXT} is {found} in {run.data.tokenizer}: "
            "leave the key out"
        )
    return config if found is None else config.replace(image_token_id=found)


def steps_of(run: RunConfig, data: PackedData) -> int:
    """Number of steps in ``run.epochs``; an epoch's last step may also belong to the next one."""
    if data.begin is not None:
        raise ConfigError("config.epochs has no meaning once the sources changed: give config.steps")
    return max(1, min(round(run.epochs * data.steps_per_epoch()), data.total_steps() or sys.maxsize))


def check_data_fits(config: Architecture, execution: Execution, data: PackedData) -> None:
    """Raises ConfigError if the model cannot read these batches."""
    settings, tokenizer = data.config, data.tokenizer
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{settings.tokenizer}: {tokenizer.vocab_size} tokens, but the model's vocabulary has {config.vocab_size}: "
            "use the tokenizer that belongs to the model, or a model with a larger vocab_size"
        )
    check_slots(config, execution, settings)


def check_slots(config: Architecture, execution: Execution, settings: DataConfig) -> None:
    """Raises ConfigError if the model cannot read rows of these slots."""
    if settings.visual_tokens == 0:
        return
    vision = config.vision
    if vision is None:
        raise ConfigError(
            "data.visual_tokens is above 0, but the model has no vision: use a Mono-InternVL or modular model"
        )
    if settings.boundary_block and (config.visual_ffn_experts or config.visual_attention_experts):
        _check_boundaries(settings.boundary_block, execution)
    if vision.kind == "intern_vit" and settings.visual_tokens % vision.tile_tokens:
        raise ConfigError(
            f"data.visual_tokens is {settings.visual_tokens}: a modular model needs whole tiles, a multiple of "
            f"{vision.tile_tokens}"
        )


def _check_boundaries(block: int, execution: Execution) -> None:
    """Raises ConfigError if the experts cannot serve ragged boundaries at multiples of ``block``."""
    if execution.experts == "static":
        raise ConfigError(
            "data.boundary_block gives each row its own boundary: set config.execution.experts='grouped' and "
            f"config.execution.experts_block={block}"
        )
    if execution.experts == "grouped" and block % execution.experts_block:
        raise ConfigError(
            f"data.boundary_block is {block}: it must be a multiple of execution.experts_block "
            f"({execution.experts_block})"
        )


def sample_counts(data: PackedData) -> dict[str, int]:
    """Samples read so far, and the bad ones among them in total and by reason."""
    skipped = data.report.skipped
    counts = {"samples": data.report.samples, "bad_samples": sum(skipped.values())}
    return counts | {f"bad/{reason}": count for reason, count in sorted(skipped.items())}
