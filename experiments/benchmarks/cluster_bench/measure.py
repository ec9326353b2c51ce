"""The parts of the cluster benchmark; see ``experiments/benchmarks/cluster.py``."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.cluster_bench.processes import (
    DEVICES,
    LONGEST,
    BenchmarkError,
    Processes,
    difference,
    train,
)
from experiments.benchmarks.faults_bench.trainer import config_values, small_sets, write_config
from mono_jax.parallel.watch import PEER_LOST
from mono_jax.training import goodput
from mono_jax.training.callbacks.stopping import PREEMPTED

MESHES = {
    "data 12": {"data": 12, "fsdp": 1, "tensor": 1},
    "fsdp 12": {"data": 1, "fsdp": 12, "tensor": 1},
    "fsdp 3 x tensor 4": {"data": 1, "fsdp": 3, "tensor": 4},
    "data 3 x fsdp 2 x tensor 2": {"data": 3, "fsdp": 2, "tensor": 2},
    "fsdp 3 x context 4": {"data": 1, "fsdp": 3, "context": 4},
}
STEPS = 8
LONG = 30  # steps of the run that is stopped and resumed
STOPS = ((4, 8), (3, 16), (2, 22))  # (processes, the step after which they are asked to stop); 4 processes finish


def measure(parts: Sequence[str], counts: Sequence[int], folder: Path | None) -> dict[str, Any]:
    """The JSON object of the command."""
    with contextlib.ExitStack() as stack:
        where = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        where.mkdir(parents=True, exist_ok=True)
        values = config_values(small_sets(where / "sets"))
        values["data"]["batch_size"] = 12
        values |= {"steps": STEPS, "checkpoint_every": 4, "compilation_cache": str(where / "programs")}
        config = write_config(where / "config.py", values)
        result: dict[str, Any] = {
            "device": f"{DEVICES} simulated devices on {os.cpu_count()} CPU cores, {platform.machine()}",
            "jax": importlib.metadata.version("jax"),
            "date": time.strftime("%Y-%m-%d"),
            "load_before": os.getloadavg()[0],
        }
        if "meshes" in parts:
            result["meshes"] = {mesh: _meshes(config, where, mesh, counts) for mesh in MESHES}
        if "agreed" in parts:
            result["agreed"] = {str(count): _agreed(where, count) for count in counts}
        if "lost" in parts:
            result["lost"] = {str(count): _lost(config, where, count) for count in counts}
        if "resume" in parts:
            result |= _resumed(config, where)
        return result


def _meshes(config: Path, where: Path, mesh: str, counts: Sequence[int]) -> dict[str, Any]:
    options = [f"--config.mesh.{axis}={size}" for axis, size in MESHES[mesh].items()]
    one = where / f"{mesh} 1".replace(" ", "_")
    train(config, one, 1, options).wait()
    found = {}
    for count in counts:
        several = where / f"{mesh} {count}".replace(" ", "_")
        train(config, several, count, options).wait()
        found[str(count)] = difference(one, several)
    return found


def _agreed(where: Path, count: int) -> dict[str, float]:
    program = "from experiments.benchmarks.cluster_bench.agreed import run; run()"
    processes = Processes(["-c", program], count, where / f"agreed_{count}")
    processes.wait()
    return json.loads(processes.said().splitlines()[-1])


def _lost(config: Path, where: Path, count: int) -> dict[str, float]:
    """Seconds until the other processes end after the last or the first is killed, or the last is stopped."""
    found = {}
    cases = {"killed": (-1, signal.SIGKILL), "first_killed": (0, signal.SIGKILL), "silent": (-1, signal.SIGSTOP)}
    for name, (victim, how) in cases.items():
        processes = train(config, where / f"{name}_{count}", count, ["--config.steps=1000000"])
        try:
            processes.until_step(STEPS)
            others = [process for process in processes.running if process is not processes.running[victim]]
            processes.running[victim].send_signal(how)
            began = time.monotonic()
            codes = [process.wait(LONGEST) for process in others]
            found[f"{name}_s"] = round(time.monotonic() - began, 1)
            if set(codes) != {PEER_LOST}:
                raise BenchmarkError(f"{name}: exit codes {codes}, not {PEER_LOST}")
        finally:
            processes.kill()
    return found


def _resumed(config: Path, where: Path) -> dict[str, Any]:
    options, run = [f"--config.steps={LONG}"], where / "resumed"
    train(config, where / "whole", 1, options).wait()
    for count, step in STOPS:
        processes = train(config, run, count, options)
        processes.until_step(step)
        processes.running[-1].send_signal(signal.SIGTERM)
        processes.wait(PREEMPTED)
    train(config, run, 4, options).wait()
    processes = [count for count, _ in STOPS] + [4]
    return {"resume": {"processes": processes} | difference(where / "whole", run), "goodput": goodput.measure(run)}
