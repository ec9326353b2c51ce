"""The loop of two real processes, one of which has an error: both end after the same step, in a valid state."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mono_jax

STEPS = 10
# Where process 1 or 0 has an error: batch number n, or a callback after step n.
CASES = {
    **{f"batch {n} of {victim}": ("batch", n, victim) for n in (0, 2, 5, STEPS - 1) for victim in (0, 1)},
    **{f"callback {n} of {victim}": ("callback", n, victim) for n in (1, 5, STEPS - 1, STEPS) for victim in (0, 1)},
    "both at once": ("batch", 5, None),
    "none": ("batch", -1, None),
}
# Batches are read three steps ahead, the first three before any step; callbacks' errors are known three steps later.
DONE = {name: (n if n > 2 else 0) if kind == "batch" else min(n + 3, STEPS) for name, (kind, n, _) in CASES.items()} | {
    "none": STEPS
}

_PROCESS = f"""
import json, sys
import jax, jax.numpy as jnp, numpy as np
from mono_jax.parallel.distributed import Cluster, joined
from mono_jax.parallel.mesh import make_mesh
from mono_jax.training.loop import Callback, run_loop
from mono_jax.training.state import TrainState

rank, port, cases = int(sys.argv[1]), sys.argv[2], {CASES!r}


class Data:
    batch_size = 4

    def __init__(self, bad):
        self.bad = bad

    def iterate(self, start, rows):
        for n in range(start, 100):
            if n == self.bad:
                raise OSError("the disk is away")
            yield n, {{"x": np.full((len(rows), 2), n, np.float32)}}


class Last(Callback):
    def __init__(self, bad):
        self.bad, self.after = bad, []

    def step(self, progress):
        self.after.append(progress.done)
        if progress.done == self.bad:
            raise OSError("the disk is away")

    def finish(self, progress):
        self.end = progress.done, int(progress.state.step), float(progress.state.trainable["sum"])


@jax.jit
def step(state, frozen, batch):
    total = batch["x"].sum()
    state = state.replace(step=state.step + 1, trainable={{"sum": state.trainable["sum"] + total}})
    return state, {{"loss": total}}


with joined(Cluster(f"localhost:{{port}}", 2, rank, "flags")):
    mesh, found = make_mesh(), {{}}
    zero = jax.device_put(jnp.zeros((), jnp.int32), jax.NamedSharding(mesh, jax.P()))
    for name, (kind, number, victim) in cases.items():
        own = number if victim in (rank, None) else -1
        last, error = Last(own if kind == "callback" else -1), None
        state = TrainState(zero, zero, zero, {{"sum": zero.astype(jnp.float32)}}, {{}})
        try:
            run_loop(step, state, {{}}, Data(own if kind == "batch" else -1), mesh, {STEPS}, [last])
        except Exception as caught:
            error = f"{{type(caught).__name__}}: {{caught}}"
        found[name] = [*last.end, error]
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """The result of the cases in each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(Path(mono_jax.__file__).parents[1])}
    command = [sys.executable, "-c", _PROCESS]
    processes = [subprocess.Popen([*command, str(rank), port], env=env, stdout=subprocess.PIPE) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [json.loads(output.decode().splitlines()[-1]) for output in outputs]


@pytest.mark.parametrize("name", CASES)
def test_both_end_after_the_same_step_and_name_the_one(found: list[dict[str, Any]], name: str):
    _, _, victim = CASES[name]
    for rank, values in enumerate(found):
        done, step, total, error = values[name]
        assert done == step == DONE[name]
        assert total == sum(8 * n for n in range(done)), "every step trained on its own batch, whole"
        if name == "none":
            assert error is None
        elif victim in (rank, None):
            assert error == "OSError: the disk is away"
        else:
            assert error.startswith(f"Stopped: process {victim} on host ") and "the disk is away; saved: run" in error
