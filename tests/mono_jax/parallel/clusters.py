"""Runs of several real processes on this machine, for tests that need them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from mono_jax import tree
from mono_jax.weights.model_folder import open_model
from tests.devices import simulated
from tests.mono_jax.parallel.hosts import Hosts
from tests.mono_jax.runs.test_stage import settings

ROOT = Path(__file__).parents[3]
DEVICES = 4  # of all processes together, by default
CONFIG = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({!r})\n"


class Cluster:
    """``processes`` processes of a command on this machine, with ``devices`` simulated devices in total.

    ``config``: None = the command takes ``options`` only, and ``workdir`` names its logs. ``variables``: of the
    environment of single processes, by number. ``hosts``: one for each process. ``flags``: whether they say who is who;
    else the variables do.
    """

    def __init__(
        self,
        config: Path | None,
        workdir: Path,
        processes: int,
        options: Sequence[str] = (),
        command: str = "train.py",
        variables: Mapping[int, Mapping[str, str]] = MappingProxyType({}),
        hosts: Hosts | None = None,
        devices: int = DEVICES,
        flags: bool = True,
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"{hosts.addresses[0] if hosts else 'localhost'}:{free.getsockname()[1]}"
        trained = [f"--config={config}", f"--workdir={workdir}"] if config else []
        line = [sys.executable, f"experiments/{command}", *trained, *options]
        env = os.environ | {"XLA_FLAGS": simulated(devices // processes)}
        env |= {"PYTHONPATH": str(ROOT)}
        self.outputs = [workdir.parent / f"{workdir.name}.{number}.log" for number in range(processes)]
        self.processes = []
        for number, file in enumerate(self.outputs):
            named = [f"--coordinator={coordinator}", f"--processes={processes}", f"--process={number}"]
            with file.open("w") as output:
                arguments, own = [*line, *(named if processes > 1 and flags else [])], env | variables.get(number, {})
                arguments = [*(hosts.command(number) if hosts else []), *arguments]
                self.processes.append(subprocess.Popen(arguments, env=own, cwd=ROOT, stdout=output, stderr=output))

    def wait(self) -> list[int]:
        return [process.wait(timeout=500) for process in self.processes]

    def said(self, number: int) -> str:
        return self.outputs[number].read_text()

    def errors(self, number: int) -> list[str]:
        """The lines that tell why a process ended."""
        return [line for line in self.said(number).splitlines() if line.startswith("error:")]

    def wait_for_step(self, step: int) -> None:
        """Waits until the first process has reported ``step``."""
        for _ in range(3000):
            if re.search(rf"step +{step}/", self.said(0)):
                return
            assert self.processes[0].poll() is None, self.said(0)
            time.sleep(0.1)
        raise TimeoutError(self.said(0))


def write_config(file: Path, values: Mapping[str, Any], extra: str = "") -> Path:
    """A config file with ``values`` that runs ``extra`` in each process that reads it."""
    file.write_text(CONFIG.format(dict(values)) + extra)
    return file


@pytest.fixture
def config(sets: dict[str, Any], tmp_path: Path) -> Path:
    """Rows for four devices, loaded by workers."""
    return write_config(tmp_path / "config.py", settings(sets, data={"batch_size": 8, "workers": 1}, mesh={}))


@pytest.fixture
def clusters() -> Iterator[list[Cluster]]:
    started: list[Cluster] = []
    yield started
    for cluster in started:
        for process in cluster.processes:
            process.kill()


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_losses(one: Path, other: Path) -> None:
    for a, b in zip(records(one), records(other), strict=True):
        assert a["step"] == b["step"] and a["weight"] == b["weight"]
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
        np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-4)


def assert_same_run(one: Path, other: Path, atol: float = 1e-5) -> None:
    """``atol`` applies to the weights."""
    assert_same_losses(one, other)
    assert_same_weights(one / "model", other / "model", atol)


def assert_same_weights(one: Path, other: Path, atol: float = 1e-5) -> None:
    weights = [tree.flatten(open_model(model)[1]) for model in (one, other)]
    for path, leaf in weights[0].items():
        np.testing.assert_allclose(np.asarray(weights[1][path]), np.asarray(leaf), atol=atol, err_msg=path)
