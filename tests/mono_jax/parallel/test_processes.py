"""Runs of several real processes: equal to one process on every mesh, stopped together, ended when one is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mono_jax import tree
from mono_jax.parallel.watch import PEER_LOST
from mono_jax.training.callbacks.stopping import PREEMPTED
from mono_jax.weights.model_folder import open_model
from tests.mono_jax.runs.test_stage import settings

ROOT = Path(__file__).parents[3]
DEVICES = 4  # of all processes together
CONFIG = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({!r})\n"


class Cluster:
    """``processes`` processes of train.py on this machine, with ``DEVICES`` simulated devices in all."""

    def __init__(self, config: Path, workdir: Path, processes: int, options: Sequence[str] = ()):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"localhost:{free.getsockname()[1]}"
        command = [sys.executable, "experiments/train.py", f"--config={config}", f"--workdir={workdir}", *options]
        env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}"}
        env |= {"PYTHONPATH": str(ROOT)}
        self.outputs = [workdir.parent / f"{workdir.name}.{number}.log" for number in range(processes)]
        self.processes = []
        for number, file in enumerate(self.outputs):
            named = [f"--coordinator={coordinator}", f"--processes={processes}", f"--process={number}"]
            with file.open("w") as output:
                arguments = [*command, *(named if processes > 1 else [])]
                self.processes.append(subprocess.Popen(arguments, env=env, cwd=ROOT, stdout=output, stderr=output))

    def wait(self) -> list[int]:
        return [process.wait(timeout=500) for process in self.processes]

    def said(self, number: int) -> str:
        return self.outputs[number].read_text()

    def wait_for_step(self, step: int) -> None:
        """Until the first process has reported ``step``."""
        for _ in range(3000):
            if f"step {step}/" in self.said(0).replace("step  ", "step ").replace("step  ", "step "):
                return
            assert self.processes[0].poll() is None, self.said(0)
            time.sleep(0.1)
        raise TimeoutError(self.said(0))


@pytest.fixture
def config(sets: dict[str, Any], tmp_path: Path) -> Path:
    """A config file: rows for four devices, loaded by workers."""
    values = settings(sets, data={"batch_size": 8, "workers": 1}, mesh={})
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(values))
    return file


@pytest.fixture
def clusters() -> Iterator[list[Cluster]]:
    started: list[Cluster] = []
    yield started
    for cluster in started:
        for process in cluster.processes:
            process.kill()


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    for a, b in zip(records(one), records(other), strict=True):
        assert a["step"] == b["step"] and a["weight"] == b["weight"]
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
        np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-4)
    weights = [tree.flatten(open_model(workdir / "model")[1]) for workdir in (one, other)]
    for path, leaf in weights[0].items():
        np.testing.assert_allclose(np.asarray(weights[1][path]), np.asarray(leaf), atol=1e-5, err_msg=path)


MESHES = {"data": (4, 1, 1), "fsdp": (1, 4, 1), "tensor": (1, 1, 4), "fsdp_tensor": (1, 2, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("mesh", MESHES)
def test_any_number_of_processes_trains_alike_on_any_mesh(config, tmp_path, clusters, mesh, processes):
    axes = [f"--config.mesh.{a}={size}" for a, size in zip(("data", "fsdp", "tensor"), MESHES[mesh])]
    for name, count in (("one", 1), ("several", processes)):
        clusters.append(Cluster(config, tmp_path / name, count, axes))
        assert clusters[-1].wait() == [0] * count, clusters[-1].said(0)
    assert_same_run(tmp_path / "one", tmp_path / "several")
    assert clusters[-1].said(0).count("done: step") == 1 and "step 1/" not in clusters[-1].said(1)
    assert (tmp_path / "several/logs/process-1.log").is_file()


@pytest.mark.slow
def test_all_stop_when_one_is_asked_and_any_number_resumes(config, tmp_path, clusters):
    """SIGTERM reaches one process of two; then one resumes, then four finish."""
    long = ["--config.steps=40"]
    clusters.append(Cluster(config, tmp_path / "whole", 1, long))
    assert clusters[-1].wait() == [0]
    for count, ends in ((2, 8), (1, 16), (4, None)):
        clusters.append(Cluster(config, tmp_path / "parts", count, long))
        if ends:
            clusters[-1].wait_for_step(ends)
            clusters[-1].processes[-1].send_signal(signal.SIGTERM)
        codes = clusters[-1].wait()
        assert codes == [PREEMPTED if ends else 0] * count, clusters[-1].said(0)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_when_one_is_lost_the_others_say_which_and_end(config, tmp_path, clusters, victim: int, how: int):
    clusters.append(Cluster(config, tmp_path / "run", 2, ["--config.steps=100000"]))
    cluster, other = clusters[-1], 1 - victim
    cluster.wait_for_step(8)
    cluster.processes[victim].send_signal(how)
    lost = time.monotonic()
    assert cluster.processes[other].wait(timeout=100) == PEER_LOST, cluster.said(other)
    assert time.monotonic() - lost < 90  # 60 on a machine that does nothing else
    assert f"process {victim} on" in cluster.said(other).splitlines()[-1]
