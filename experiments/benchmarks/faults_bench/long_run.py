"""The goodput of a run that is disturbed repeatedly and restarted at once, as by a launcher.

The rounds, with runs of a few tiny steps, test results; this run measures time. Its steps take about a second, with a
checkpoint every few seconds, and the seconds are read from the run's own files (``mono_jax.training.goodput``).
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.faults_bench.processes import PREEMPTED, after, kill_at, stop_at
from experiments.benchmarks.faults_bench.trainer import Trainer, prepare, small_sets
from mono_jax.training import goodput

FAULTS = ("kill", "term")  # in turn
_CONFIG = {
    "model.hidden_size": 256,
    "model.intermediate_size": 1024,
    "data.batch_size": 32,
    "steps": 10**6,
    "checkpoint_every": 10**6,
    "checkpoint_minutes": 0.25,
}


def run(folder: Path, minutes: float = 60.0, faults: int = 10, seed: int = 0) -> dict[str, Any]:
    """Trains for ``minutes`` with ``faults`` faults, at random moments in equal parts of that time, then stops the run.

    Returns the result of ``goodput.measure`` plus "step_s", "faults": {kind: number}, and "elapsed_s": wall time of
    this process, which includes the time before the first log line and after the last. Raises RuntimeError if the run
    does not end as requested.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prepare()
    trainer = Trainer(folder / "long", small_sets(folder / "sets"), longest=60 * minutes)
    trainer.options = tuple(f"--config.{key}={value}" for key, value in _CONFIG.items())
    rng, began, done = random.Random(seed), time.monotonic(), dict.fromkeys(FAULTS, 0)
    for number in range(faults):
        kind = FAULTS[number % len(FAULTS)]
        moment = began + 60 * minutes * (number + rng.uniform(0.1, 1)) / (faults + 1)
        (kill_at if kind == "kill" else stop_at)(trainer, after(moment - time.monotonic()))
        done[kind] += trainer.struck
        print(f"fault {number + 1} of {faults}: {kind} after {len(trainer.losses())} steps", flush=True)
    code = stop_at(trainer, after(began + 60 * minutes - time.monotonic()))
    elapsed = time.monotonic() - began
    if code != PREEMPTED:
        raise RuntimeError(f"the run ends with {code}: {trainer.last_line()}")
    measured = goodput.measure(trainer.workdir)
    for line in goodput.table(trainer.workdir, measured):
        print(line, flush=True)
    step_s = measured["seconds"]["productive"] / measured["steps"]
    return measured | {"step_s": round(step_s, 3), "faults": done, "elapsed_s": round(elapsed, 1)}
