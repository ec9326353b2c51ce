"""The models that a run writes: WORKDIR/model, from the last step, and WORKDIR/best, from the best step if that is
kept.

``step.json`` next to a model says which step it is from. It is written last, and a model that it names is not
rewritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mono_jax import tree
from mono_jax.checkpoints.manager import Checkpoints
from mono_jax.errors import CheckpointError, ConfigError, PeerError
from mono_jax.files import Damaged, read_json, reason, verify_checksums
from mono_jax.parallel.agreement import from_first, gathered, together
from mono_jax.runs.program import Program
from mono_jax.runs.result import write_model
from mono_jax.storage.places import Place, remove_tree, write_json
from mono_jax.training.callbacks.evaluating import Best
from mono_jax.training.metrics import Say
from mono_jax.training.state import TrainState
from mono_jax.weights.model_folder import BEST_FOLDER, MODEL_FOLDER, PARAMS_FOLDER

STEP_FILE = "step.json"


@dataclasses.dataclass(frozen=True)
class Models:
    """The models in ``workdir``. ``frozen``, ``base``: the run's frozen parameters, and the folder where they are
    stored."""

    workdir: Place
    program: Program
    frozen: tree.Tree
    base: Place

    @property
    def last(self) -> Place:
        """The folder of the last step's model."""
        return self.workdir / MODEL_FOLDER

    @property
    def best(self) -> Place:
        """The folder of the best step's model."""
        return self.workdir / BEST_FOLDER

    def write_last(self, state: TrainState) -> None:
        """Writes the model of the last step, unless it exists."""
        facts = {"step": int(state.step)}
        if not _is_there(self.last, facts):
            self._write(self.last, facts, state.trainable)

    def write_best(self, best: Best, last: TrainState, checkpoints: Checkpoints, say: Say) -> str | None:
        """Writes the model of the best step, unless it exists; call it after ``write_last``. ``last``: the last step's
        state.

        The best step's parameters take over its memory. Returns the folder, or None if that step's checkpoint is lost.
        """
        facts, shown = dataclasses.asdict(best), f"step {best.step}, {best.metric} {best.value:.4f}"
        if best.step == int(last.step):
            shown += ", the last one"
            if not _is_there(self.best, facts):
                self._write_again(facts, last)
        elif not _is_there(self.best, facts):
            trainable = _restored(best.step, self.program, last, checkpoints)
            if isinstance(trainable, str):
                say(f"the best model ({shown}) is not written to {self.best}: {trainable}")
                return None
            self._write(self.best, facts, trainable)
        say(f"the best model ({shown}): {self.best}")
        return str(self.best)

    def _write(self, target: Place, facts: Mapping[str, Any], trainable: tree.Tree) -> None:
        with together():
            if jax.process_index() == 0:
                (target / STEP_FILE).unlink(missing_ok=True)
        write_model(target, self.program, trainable, self.frozen, self.base)
        with together():
            if jax.process_index() == 0:
                write_json(target / STEP_FILE, facts)

    def _write_again(self, facts: Mapping[str, Any], state: TrainState) -> None:
        """Uses the last model as the best one: on disk both share the weight files; a bucket has no links."""
        if not isinstance(self.last, Path):
            self._write(self.best, facts, state.trainable)
            return
        try:
            with together():
                if jax.process_index() == 0:
                    _link_model(self.last, self.best, facts)
        except (OSError, PeerError) as error:
            raise CheckpointError(f"{self.best}: the model was not saved: {reason(error)}") from None


def _is_there(target: Place, facts: Mapping[str, Any]) -> bool:
    """Whether a model is the one described by ``facts``, and its files are intact."""
    found = False
    with together(), contextlib.suppress(ConfigError, Damaged):
        if jax.process_index() == 0:
            stated = read_json(target / STEP_FILE)
            found = facts.items() <= stated.items() and verify_checksums(target / PARAMS_FOLDER)
    return from_first(found)


def _link_model(model: Path, target: Path, facts: Mapping[str, Any]) -> None:
    """Makes ``target`` a copy of ``model`` with other ``facts``, atomically."""
    partial = target.with_name(f"{target.name}.partial")
    remove_tree(partial)
    shutil.copytree(model, partial, ignore=shutil.ignore_patterns(PARAMS_FOLDER))
    shutil.copytree(model / PARAMS_FOLDER, partial / PARAMS_FOLDER, copy_function=_link)
    write_json(partial / STEP_FILE, facts)
    remove_tree(target)
    partial.rename(target)


def _link(source: str, target: str) -> None:
    """Makes a hard link, since weight files are replaced, never modified; a copy if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _restored(step: int, program: Program, last: TrainState, checkpoints: Checkpoints) -> tree.Tree | str:
    """The trainable parameters of ``step``, in the memory of ``last``; or why there are none, the same on all
    processes."""
    jax.tree.map(lambda leaf: leaf.delete(), last)
    arrays, problem = {}, None
    try:
        wanted = {"trainable": program.abstract_state()[0].trainable}
        arrays, _ = checkpoints.restore(wanted, step, part=True)
    except CheckpointError as error:
        problem = str(error)
    return next(filter(None, gathered(problem)), None) or arrays["trainable"]
