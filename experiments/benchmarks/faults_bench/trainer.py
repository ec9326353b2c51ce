"""A training run in its own process, on small sets, that can be disturbed.

Processes are forked from a server (``multiprocessing``'s own) that has imported what training needs, and share a
compilation cache, so that a run costs its work but not its start. ``Trainer.start(command=True)`` runs the real
command.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.recipes.demo.sets import build_demo_sets
from data_pipelines.recipes.demo.sizes import DemoSizes
from data_pipelines.recipes.manifest import load_manifest
from experiments.benchmarks.faults_bench.disk import Disk
from mono_jax import tree
from mono_jax.training.metrics import read_metrics
from mono_jax.weights.model_folder import load_model

STEPS = 8
SAVE_EVERY = 2
LONGEST = 240.0  # seconds of one run; a longer run counts as a hang
_SCRIPT = Path("experiments/train.py")
_IMPORTED = [
    "mono_jax.runs.config_file",
    "mono_jax.runs.reference",
    "mono_jax.runs.evip",
    "mono_jax.runs.stage",
    "grain",
    "tensorstore",
]

CONFIG = """
import json
from ml_collections import ConfigDict
def get_config():
    return ConfigDict(json.loads({values!r}))
"""


def config_values(manifest: dict[str, Any]) -> dict[str, Any]:
    """A tiny stage with frequent checkpoints, in float32."""
    vision = {"hidden_size": 16, "patch_size": 8, "image_size": 64}
    return {
        "stage": "S1.1",
        "steps": STEPS,
        "seed": 3,
        "model": {"preset": "tiny_mono", "vocab_size": 1035, "vision": vision, "hidden_size": 32},
        "data": {
            "sources": manifest["stages"]["s1_1"]["sources"],
            "tokenizer": manifest["tokenizer"],
            "system_message": "",
            "batch_size": 8,
            "visual_tokens": 32,
            "text_tokens": 96,
            "block_samples": 64,
        },
        "mesh": {"data": 1, "fsdp": -1},
        "dtype": "float32",
        "frozen_dtype": "float32",
        "log_every": 1,
        "checkpoint_every": SAVE_EVERY,
    }


def small_sets(folder: Path) -> dict[str, Any]:
    """The manifest of the sets in ``folder``, which are made if they are missing."""
    if not folder.exists():
        sizes = dict.fromkeys(("s1_1", "s1_2", "s1_3", "s2", "heldout_captions", "heldout_questions"), 60)
        build_demo_sets(folder, sizes=DemoSizes(text_bytes=150_000, **sizes))
    return load_manifest(folder)


def write_config(file: Path, values: dict[str, Any]) -> Path:
    file.write_text(CONFIG.format(values=json.dumps(values)))
    return file


def prepare() -> None:
    """Makes processes cache all compiled programs, however small; call it before the first process."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    multiprocessing.set_forkserver_preload(_IMPORTED)


def _train(arguments: Sequence[str], log: Path, environment: dict[str, str]) -> None:
    """Runs the command in a forked process."""
    os.setsid()
    os.environ |= environment  # before JAX reads it
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(_SCRIPT), *arguments]
    runpy.run_path(str(_SCRIPT), run_name="__main__")


class _Forked:
    """A forked process with the methods of ``subprocess.Popen`` that are needed here."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: dict[str, str]):
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_train, args=(arguments, log, environment)
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(_SCRIPT), timeout)
        return self._process.exitcode


Process = _Forked | subprocess.Popen[bytes]


class Hangs(Exception):
    """A process did not end in time and was killed."""


@dataclasses.dataclass
class Trainer:
    """Runs in FOLDER/run.

    Attributes:
      manifest: of the sets, which all rounds share; see ``own_sets``.
      devices: number of simulated devices. options: further arguments of the command.
      struck: whether the fault hit at the intended moment.
      harmed: whether records themselves were damaged.
      disk: the disk of the workdir, if it has its own.
      longest: maximum seconds of the run; a longer run counts as a hang.
    """

    folder: Path
    manifest: dict[str, Any]
    devices: int = 1
    options: tuple[str, ...] = ()
    struck: bool = True
    harmed: bool = False
    disk: Disk | None = None
    longest: float = LONGEST

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.workdir, self.log = self.folder / "run", self.folder / "log"
        self._config = write_config(self.folder / "config.py", self._values())

    def _values(self) -> dict[str, Any]:
        """Values of the config; runs next to this one share its compiled programs."""
        return config_values(self.manifest) | {"compilation_cache": str(self.folder.parent / "programs")}

    def own_sets(self) -> Path:
        """Gives this trainer its own copy of a shard, which has no index yet; returns it."""
        [source] = self.manifest["stages"]["s1_1"]["sources"]
        [pattern] = source["spec"]["paths"]
        shard = Path(pattern.replace("*", "00000"))
        copy = self.folder / "shards" / shard.name
        copy.parent.mkdir()
        shutil.copyfile(shard, copy)
        values = self._values()
        values["data"]["sources"] = [{**source, "spec": {**source["spec"], "paths": str(copy)}}]
        write_config(self._config, values)
        return copy

    def on_disk(self, size: int) -> Disk:
        """Moves the workdir to a disk of ``size`` bytes."""
        self.disk = Disk(self.folder / "disk", size)
        self.workdir = self.disk.folder / "run"
        return self.disk

    def start(self, command: bool = False, **environment: str) -> Process:
        """Starts the run in a new session, with output to ``log``; with ``command``, also in a new interpreter."""
        arguments = [f"--config={self._config}", f"--workdir={self.workdir}", *self.options]
        environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={self.devices}", **environment}
        if not command:
            return _Forked(arguments, self.log, environment)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(_SCRIPT), *arguments],
                stdout=log,
                stderr=log,
                env=os.environ | environment,
                start_new_session=True,
            )

    def finish(self) -> int:
        """Runs the command, which must finish this time, and returns its exit code. Raises Hangs."""
        return ended(self.start(), self.longest)

    def losses(self) -> list[tuple[int, float]]:
        return [(record["step"], record["loss"]) for record in read_metrics(self.workdir / "metrics.jsonl")]

    def saved(self) -> list[int]:
        """Steps whose checkpoints are complete, with their checksum list."""
        return sorted(int(file.parent.name) for file in (self.workdir / "checkpoints").glob("*/checksums.json"))

    def weights(self) -> dict[str, np.ndarray]:
        _, params = load_model(self.workdir / "model")
        return {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def last_line(self) -> str:
        return self.output().strip().rpartition("\n")[2]


def ended(process: Process, seconds: float = LONGEST) -> int:
    """The exit code; raises Hangs if the process has not ended after ``seconds``."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        raise Hangs from None


def wait_until(condition: Callable[[], bool], process: Process, seconds: float = LONGEST) -> bool:
    """Whether ``condition()`` became true before the process ended or the time was up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return True
        time.sleep(0.01)
    return False


def children(pid: int) -> list[int]:
    """The descendants of process ``pid``."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent == pid:
            child = int(status.parent.name)
            found += [child, *children(child)]
    return found
