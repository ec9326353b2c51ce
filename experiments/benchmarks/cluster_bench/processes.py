"""The processes of a run on this machine, and their results."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mono_jax import tree
from mono_jax.errors import MonoJaxError
from mono_jax.training.metrics import read_metrics
from mono_jax.weights.model_folder import open_model

DEVICES = 12  # in all processes together; divisible by 1, 2, 3, 4
LONGEST = 900.0  # seconds
TRAIN = "experiments/train.py"


class BenchmarkError(MonoJaxError):
    """A run did not do what is to be measured."""


class Processes:
    """``count`` connected processes of a command, with ``DEVICES`` simulated devices in total."""

    def __init__(self, command: Sequence[str], count: int, logs: Path):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"localhost:{free.getsockname()[1]}"
        self.logs = [logs.with_name(f"{logs.name}.{number}.log") for number in range(count)]
        self.running = []
        for number, log in enumerate(self.logs):
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                # Compilation is nine tenths of such a run: no optimisations, no MLIR.
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count} "
                "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
                "PYTHONPATH": os.getcwd(),
            }
            if count > 1:
                names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
                environment |= dict(zip(names, (coordinator, str(count), str(number))))
            with log.open("w") as file:
                arguments = [sys.executable, *command]
                self.running.append(subprocess.Popen(arguments, env=environment, stdout=file, stderr=file))

    def said(self, number: int = 0) -> str:
        return self.logs[number].read_text()

    def until_step(self, step: int) -> None:
        """Waits until the first process has reported ``step``."""
        end = time.monotonic() + LONGEST
        while not re.search(rf"step +{step}/", self.said()):
            if self.running[0].poll() is not None or time.monotonic() > end:
                self.kill()
                raise BenchmarkError(f"no step {step}: {self.said().splitlines()[-1:]}")
            time.sleep(0.05)

    def wait(self, code: int = 0) -> None:
        """Waits for all processes; raises BenchmarkError unless all exit with ``code``."""
        codes = [process.wait(LONGEST) for process in self.running]
        if set(codes) != {code}:
            raise BenchmarkError(f"exit codes {codes}, not {code}: {self.said().splitlines()[-1:]}")

    def kill(self) -> None:
        for process in self.running:
            process.kill()


def train(config: Path, workdir: Path, count: int, options: Sequence[str] = ()) -> Processes:
    return Processes([TRAIN, f"--config={config}", f"--workdir={workdir}", *options], count, workdir)


def difference(one: Path, other: Path) -> dict[str, float]:
    """Largest differences between the losses and the weights of two finished runs."""
    losses = [
        {record["step"]: record["loss"] for record in read_metrics(run / "metrics.jsonl")} for run in (one, other)
    ]
    if losses[0].keys() != losses[1].keys():
        raise BenchmarkError(f"{other}: recorded steps differ from those in {one}")
    weights = [tree.flatten(open_model(run / "model")[1]) for run in (one, other)]
    apart = (np.abs(np.asarray(leaf) - np.asarray(weights[1][path])).max() for path, leaf in weights[0].items())
    return {
        "loss_max_abs": max(abs(loss - losses[1][step]) for step, loss in losses[0].items()),
        "weights_max_abs": float(max(apart)),
    }
