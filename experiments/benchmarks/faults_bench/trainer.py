"""A training run in a process of its own, on small sets, that can be disturbed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mono_jax import tree
from mono_jax.training.metrics import read_metrics
from mono_jax.weights.model_folder import load_model

STEPS = 12
LONGEST = 300.0  # seconds of one command; more is a hang

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
            "workers": 1,
        },
        "mesh": {"data": 1, "fsdp": -1},
        "dtype": "float32",
        "frozen_dtype": "float32",
        "log_every": 1,
        "checkpoint_every": 2,
    }


@dataclasses.dataclass
class Trainer:
    """Runs of one config in one workdir."""

    config: Path
    workdir: Path

    def start(self, devices: int = 1) -> subprocess.Popen[bytes]:
        """The command, in a session of its own; its output goes to WORKDIR.log."""
        command = [sys.executable, "experiments/train.py", f"--config={self.config}", f"--workdir={self.workdir}"]
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        with self.workdir.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def finish(self, devices: int = 1, tries: int = 4) -> tuple[int, bool]:
        """Runs the command until it is done; returns its last exit code and whether it hung."""
        code = 1
        for _ in range(tries):
            process = self.start(devices)
            try:
                code = process.wait(LONGEST)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return -9, True
            if code == 0:
                break
        return code, False

    def losses(self) -> list[tuple[int, float]]:
        return [(record["step"], record["loss"]) for record in read_metrics(self.workdir / "metrics.jsonl")]

    def weights(self) -> dict[str, np.ndarray]:
        _, params = load_model(self.workdir / "model")
        return {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}

    def last_line(self) -> str:
        log = self.workdir.with_suffix(".log")
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return lines[-1] if lines else ""


def write_config(folder: Path, manifest: dict[str, Any]) -> Path:
    file = folder / "config.py"
    file.write_text(CONFIG.format(values=json.dumps(config_values(manifest))))
    return file


def wait_until(condition: Any, process: subprocess.Popen[bytes], seconds: float = LONGEST) -> bool:
    """Whether ``condition()`` came true before the process ended or the time was over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return True
        time.sleep(0.005)
    return False


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``, theirs included."""
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
