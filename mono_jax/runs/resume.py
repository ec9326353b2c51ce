"""Starts a run, or resumes it from its newest checkpoint: what may have changed meanwhile, and what is restored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipelines import strict
from data_pipelines.io import publish
from data_pipelines.loading.packed_data import PackedData
from mono_jax import tree
from mono_jax.checkpoints.base import load_base, remove_base, save_base
from mono_jax.checkpoints.integrity import tree_hash
from mono_jax.checkpoints.manager import Checkpoints
from mono_jax.checkpoints.metadata import package_versions
from mono_jax.errors import CheckpointError, ConfigError
from mono_jax.runs.batches import record_changes
from mono_jax.runs.config import RunConfig
from mono_jax.runs.program import Program
from mono_jax.runs.workdir import CHECKPOINTED, Workdir
from mono_jax.storage.places import Place
from mono_jax.training.callbacks.evaluating import Best
from mono_jax.training.metrics import Say, read_metrics
from mono_jax.training.state import TrainState


class Start(NamedTuple):
    """Where a run begins: its arrays, the hash of its frozen base, and its best step so far."""

    state: TrainState
    frozen: tree.Tree
    base: str
    best: dict[str, Any] | None = None


def metadata_of(
    program: Program, data: PackedData, step: int, base: str, best: Best | None, workdir: Workdir
) -> dict[str, Any]:
    """What a checkpoint of ``step`` holds besides its arrays; "plan" avoids recounting the rows of blocks.

    Its data keys are those of the next batch, even if other sources are due at a later step.
    """
    here = data.at(step)
    return {
        "step": step,
        "config": workdir.portable(program.run.to_dict() | {"data": strict.to_dict(here.config)}),
        "model": program.model.config.to_dict(),
        "data": here.identity,
        "begin": here.begin and here.begin.to_dict(),
        "plan": here.plan.counts.tolist(),
        "stage": program.stage.name,
        "base": base,
        "best": None if best is None else dataclasses.asdict(best),
        "versions": package_versions(),
    }


def start_or_resume(
    program: Program, data: PackedData, checkpoints: Checkpoints, workdir: Workdir, base_dir: Place, say: Say
) -> Start:
    """Step 0, or the newest sound checkpoint.

    Raises ConfigError for changes that a resumed run may not make, CheckpointError if files are missing or damaged.
    """
    if not checkpoints.steps():
        _refuse_lost_checkpoints(workdir, checkpoints)
        state, frozen = program.fresh_state()
        base = save_base(base_dir, program.frozen_source(frozen)) if frozen else ""
        write_config(program.run, workdir)
        return Start(state, frozen, base)
    metadata = checkpoints.metadata()
    known = [each for each in (data, data.before) if each is not None and each.identity == metadata["data"]]
    changes = check_changes(program.run, bool(known), metadata, workdir, say)
    if (done := metadata["step"]) > program.steps:
        raise ConfigError(
            f"config.{'steps' if program.run.epochs is None else 'epochs'}: the stage would end after {program.steps} "
            f"steps, but {checkpoints.directory} has {done} steps: ask for as many, or remove the later checkpoints"
        )
    write_config(program.run, workdir)
    if data.changes and jax.process_index() == 0:
        record_changes(workdir.files, data, metadata["step"], [c for c in changes if c.key.startswith("data.sources")])
    for each in known:
        each.plan.restore(np.array(metadata.get("plan", ()), np.int64))
    abstract, abstract_frozen = program.abstract_state()
    arrays, metadata = checkpoints.restore(vars(abstract))
    state = TrainState(**arrays)
    frozen = _frozen(program, base_dir, metadata["base"], abstract_frozen, say) if abstract_frozen else {}
    say(f"resuming {program.stage.name} at step {int(state.step)} from {checkpoints.directory}")
    return Start(state, frozen, metadata["base"], metadata.get("best"))


def _refuse_lost_checkpoints(workdir: Workdir, checkpoints: Checkpoints) -> None:
    """Raises CheckpointError if the run had checkpoints and none is left, instead of silently starting over.

    A run that was killed before its first checkpoint was complete does start over.
    """
    if (workdir.place / CHECKPOINTED).is_file():
        records = read_metrics(workdir.files / "metrics.jsonl")
        shown = f", but {workdir.place / 'metrics.jsonl'} shows {records[-1]['step']} steps" if records else ""
        raise CheckpointError(
            f"{checkpoints.directory}: no checkpoint is left{shown}: restore the checkpoints, or remove "
            f"{workdir.place / CHECKPOINTED} to start over"
        )


def _frozen(program: Program, base_dir: Place, content: str, abstract: tree.Tree, say: Say) -> tree.Tree:
    """The frozen base of hash ``content``; a damaged or missing one is rebuilt from the initial weights.

    Raises CheckpointError if these no longer have the hash.
    """
    try:
        return load_base(base_dir, content, abstract)
    except CheckpointError as error:
        say(f"{error}; rebuilding it from the initial weights")
        _, frozen = program.fresh_state()
        source = program.frozen_source(frozen)
        if tree_hash(source) != content:
            raise CheckpointError(f"{error}; the initial weights have changed, too: restore one of them") from None
        remove_base(base_dir, content)
        save_base(base_dir, source)
        return frozen


def write_config(run: RunConfig, workdir: Workdir) -> None:
    """WORKDIR/config.json, the current config; the first one is kept as config.initial.json."""
    if jax.process_index() != 0:
        return
    for name in ("config.json", "config.initial.json"):
        if name == "config.json" or not (workdir.files / name).exists():
            publish.write_json(workdir.files / name, workdir.portable(run.to_dict()))


def check_changes(
    run: RunConfig, same_data: bool, metadata: Mapping[str, Any], workdir: Workdir, say: Say
) -> list[strict.Change]:
    """Prints and returns what changed in the config; raises ConfigError for changes that are not allowed."""
    changes = strict.changes(*map(workdir.portable, (metadata["config"], run.to_dict())), RunConfig)
    for change in changes:
        say(f"config.{change.key} was {change.old!r}, now {change.new!r}")
    of_data = [change.key for change in changes if change.key.startswith("data.")]
    refused = [c.key for c in changes if c.on_resume == "fixed" and c.key not in of_data]
    if not same_data:  # keys of the data that do not change the batches may change
        refused += of_data or ["data (the files changed)"]
    if refused and not run.allow_changes:
        only_sources = all(key.startswith("data.sources") for key in refused)
        at = f"--config.change_data_at={metadata.get('step', 'STEP')} (or a later step), " if only_sources else ""
        raise ConfigError(
            f"{workdir.place}: the checkpoint was made with a different {', '.join(refused)}: restore the old values, "
            f"use another workdir, or pass {at}--config.allow_changes=True"
        )
    return changes
