"""Checkpoints, frozen base and model folders of two processes that share a mesh."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import mono_jax
from tests.devices import simulated

_PROCESS = """
import resource, sys, time
from pathlib import Path
import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from mono_jax import tree
from mono_jax.checkpoints.base import load_base, save_base
from mono_jax.checkpoints.integrity import tree_hash
from mono_jax.checkpoints.manager import Checkpoints
from mono_jax.errors import CheckpointError
from mono_jax.weights.model_folder import load_model, model_config, open_model, save_model
from mono_jax.weights.names import param_shapes
from mono_jax.weights.readers import load_params

rank, port, golden, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
jax.distributed.initialize(f"localhost:{port}", 2, rank)
mesh = jax.make_mesh((4,), ("x",))

def place(array, spec):
    array, sharding = np.asarray(array), jax.NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

def state(k):
    w = np.arange(64, dtype=np.float32).reshape(8, 8) * k
    return {"step": place(np.int32(k), jax.P()), "w": place(w, jax.P("x")), "b": place(w, jax.P())}

reported = []
with Checkpoints(folder / "c", keep=2, report=reported.append) as checkpoints:
    for k in (1, 2, 3):
        checkpoints.save(k, state(k), {"at": k})
    assert checkpoints.steps() == [2, 3]
    sync_global_devices("saved")
    if rank == 0:
        file = max((f for f in (folder / "c/3/state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        file.write_bytes(file.read_bytes()[:-1])
    sync_global_devices("damaged")
    restored, metadata = checkpoints.restore(state(0))
    assert metadata == {"at": 2} and len(reported) == (rank == 0)
    for name, leaf in state(2).items():
        for a, b in zip(restored[name].addressable_shards, leaf.addressable_shards):
            np.testing.assert_array_equal(a.data, b.data)

# A disk that is full for process 1 only: the save fails for both, at once, and the next one is made.
large = {"step": place(np.int32(0), jax.P()), "w": place(np.random.default_rng(0).normal(size=(64, 64, 8)), jax.P("x"))}
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
for where, size in {"before": 64, "while": 8192}.items():
    reported, began = [], time.monotonic()
    with Checkpoints(folder / where, report=reported.append) as checkpoints:
        checkpoints.save(1, large, {"at": 1})
        checkpoints.wait()
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            checkpoints.save(2, large, {"at": 2})
            checkpoints.wait()
            raise SystemExit("saved")
        except CheckpointError as error:
            assert "step 2 was not saved" in str(error) and ("process 1 on" in str(error)) == (rank == 0), error
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert checkpoints.failed == 1 and checkpoints.steps() == [1]
        checkpoints.save(3, large, {"at": 3})
        assert checkpoints.steps() == [1, 3] and checkpoints.failed == 1
    assert time.monotonic() - began < 200  # Orbax itself waits 300 s and more

config = model_config(golden)
shardings = {
    path: jax.NamedSharding(mesh, jax.P(*[None] * (len(shape) - 1), None if shape[-1] % 4 else "x"))
    for path, shape in param_shapes(config).items()
}
shardings = tree.unflatten(shardings)
_, params = load_model(golden, shardings=shardings)
save_model(folder / "model", config, params)
_, again = load_model(folder / "model", shardings=shardings)
base = save_base(folder / "base", params)
assert tree_hash(again) == base == tree_hash(load_params(golden, config))
load_base(folder / "base", base, again)
# The same base, streamed from the files that the weights came from; a model of which some parameters stay there.
_, lazy, _ = open_model(golden)
assert save_base(folder / "streamed", lazy) == base
placed = load_base(folder / "streamed", base, again)
assert tree_hash(placed) == base
save_model(folder / "mixed", config, params | {"layers": lazy["layers"]})
assert tree_hash(load_model(folder / "mixed", shardings=shardings)[1]) == base
print("done")
"""


def test_two_processes_save_and_restore_together(tmp_path, golden_dir):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": simulated(2)}
    env["PYTHONPATH"] = str(Path(mono_jax.__file__).parents[1])
    arguments = [str(port), str(golden_dir / "mono_tiny"), str(tmp_path)]
    processes = [
        subprocess.Popen([sys.executable, "-c", _PROCESS, str(rank), *arguments], env=env, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [output.decode().splitlines()[-1] for output in outputs] == ["done", "done"]
