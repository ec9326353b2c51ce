"""Rounds: one fault each, then the run to its end, then the comparison."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.recipes.demo.sets import build_demo_sets
from data_pipelines.recipes.demo.sizes import DemoSizes
from experiments.benchmarks.faults_bench.trainer import STEPS, Trainer, children, wait_until, write_config
from mono_jax.errors import unknown_key

Fault = Callable[[Trainer, random.Random], str | None]


def run(rounds: int, names: Sequence[str] | None, seed: int, folder: Path | None) -> dict[str, Any]:
    """Runs ``rounds`` rounds and returns what ``--json`` prints; raises ConfigError for an unknown fault."""
    for name in names or ():
        if name not in FAULTS:
            raise unknown_key("fault", name, FAULTS)
    with tempfile.TemporaryDirectory() as temporary:
        return _rounds(rounds, list(names or FAULTS), random.Random(seed), folder or Path(temporary))


def _rounds(rounds: int, names: list[str], rng: random.Random, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = dict.fromkeys(("s1_1", "s1_2", "s1_3", "s2", "heldout_captions", "heldout_questions"), 60)
    manifest = build_demo_sets(folder / "sets", sizes=DemoSizes(text_bytes=150_000, **sizes))
    config = write_config(folder, manifest)
    whole = Trainer(config, folder / "whole")
    whole.finish()
    result: dict[str, Any] = {"rounds": 0, "identical": 0, "lost_steps_max": 0, "lost_records": 0, "hangs": 0}
    result["by_fault"] = {name: {"rounds": 0, "identical": 0, "failures": []} for name in names}
    for number in range(rounds):
        name = names[number % len(names)]
        trainer = Trainer(config, folder / f"round{number}")
        shutil.rmtree(trainer.workdir, ignore_errors=True)
        problem, facts = _round(trainer, whole, FAULTS[name], rng)
        entry = result["by_fault"][name]
        result["rounds"] += 1
        entry["rounds"] += 1
        result["identical"] += problem is None
        entry["identical"] += problem is None
        result["hangs"] += facts["hung"]
        result["lost_steps_max"] = max(result["lost_steps_max"], facts["lost_steps"])
        result["lost_records"] += facts["lost_records"]
        if problem is None:
            shutil.rmtree(trainer.workdir)
        else:
            entry["failures"].append(f"round {number}: {problem}; {trainer.last_line()[:200]}")
        print(f"round {number} {name}: {problem or 'identical'}", flush=True)
    return result


def _round(trainer: Trainer, whole: Trainer, fault: Fault, rng: random.Random) -> tuple[str | None, dict[str, Any]]:
    """What is wrong after one fault (None = nothing), and the figures of the round."""
    problem = fault(trainer, rng)
    reached = max((step for step, _ in trainer.losses()), default=0)
    saved = trainer.workdir / "checkpoints"
    steps = [int(entry.name) for entry in saved.iterdir() if entry.name.isdigit()] if saved.is_dir() else []
    facts = {"lost_steps": max(0, reached - max(steps, default=0)), "lost_records": 0, "hung": False}
    code, facts["hung"] = trainer.finish()
    if facts["hung"]:
        return "hangs", facts
    if code:
        return problem or f"ends with {code}", facts
    found, wanted = dict(trainer.losses()), dict(whole.losses())
    facts["lost_records"] = len(set(wanted) - set(found))
    exact = fault is not devices
    close = [abs(found.get(step, np.inf) - loss) <= (0 if exact else 1e-5) for step, loss in wanted.items()]
    if found.keys() != wanted.keys() or not all(close):
        return problem or "other losses", facts
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-5}
    ours, theirs = trainer.weights(), whole.weights()
    if not all(np.allclose(ours[path], theirs[path], **tolerance) for path in theirs):
        return problem or "other weights", facts
    return problem, facts


# ------------------------------------------------------------------ the faults


def _kill_when(trainer: Trainer, condition: Callable[[], bool], number: int = signal.SIGKILL) -> None:
    process = trainer.start()
    wait_until(condition, process)
    os.killpg(process.pid, number)
    process.wait(120)


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def _logged(trainer: Trainer, steps: int) -> Callable[[], bool]:
    return lambda: len(trainer.losses()) >= steps


def kill(trainer: Trainer, rng: random.Random) -> None:
    if rng.random() < 0.3:
        _kill_when(trainer, _after(rng.uniform(0, 12)))  # start, compilation
    else:
        _kill_when(trainer, _logged(trainer, rng.randint(1, STEPS - 1)))


def kill_commit(trainer: Trainer, rng: random.Random) -> None:
    wanted, saved = 2 * rng.randint(1, STEPS // 2 - 1), trainer.workdir / "checkpoints"

    def committing() -> bool:
        return any(saved.glob(f"{wanted}*")) and not (saved / str(wanted) / "checksums.json").exists()

    _kill_when(trainer, committing)


def kill_cache(trainer: Trainer, rng: random.Random) -> None:
    cache = trainer.workdir / "cache"
    _kill_when(trainer, lambda: cache.is_dir() and sum(1 for _ in cache.rglob("*")) >= rng.randint(1, 6))


def kill_parent(trainer: Trainer, rng: random.Random) -> str | None:
    process = trainer.start()
    wait_until(_logged(trainer, rng.randint(1, STEPS - 1)), process)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(120)
    end = time.monotonic() + 10
    while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.05)
    left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return f"{len(left)} workers outlive their parent" if left else None


def kill_worker(trainer: Trainer, rng: random.Random) -> None:
    process = trainer.start()
    wait_until(_logged(trainer, rng.randint(1, STEPS - 2)), process)
    if workers := children(process.pid):
        os.kill(rng.choice(workers), signal.SIGKILL)
    process.wait(300)


def term(trainer: Trainer, rng: random.Random) -> str | None:
    process = trainer.start()
    moment = _after(rng.uniform(5, 15)) if rng.random() < 0.3 else _logged(trainer, rng.randint(1, STEPS - 1))
    wait_until(moment, process)
    process.terminate()
    try:
        code = process.wait(120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "deaf to SIGTERM"
    return None if code in (0, 75, -signal.SIGTERM) else f"SIGTERM: exit code {code}"


def term_twice(trainer: Trainer, rng: random.Random) -> str | None:
    process = trainer.start()
    wait_until(_logged(trainer, rng.randint(1, STEPS - 1)), process)
    process.terminate()
    time.sleep(rng.uniform(0, 0.3))
    process.terminate()
    code = process.wait(120)
    return None if code in (0, 75) else f"two SIGTERMs: exit code {code}"


def damage(trainer: Trainer, rng: random.Random) -> None:
    _kill_when(trainer, _logged(trainer, rng.randint(4, STEPS - 1)))
    newest = max((int(p.name) for p in (trainer.workdir / "checkpoints").glob("[0-9]*") if p.name.isdigit()), default=0)
    folders = [trainer.workdir / "cache", trainer.workdir / "base", trainer.workdir / "checkpoints" / str(newest)]
    files = sorted(f for folder in folders if folder.is_dir() for f in folder.rglob("*") if f.is_file())
    if not files:
        return
    file = rng.choice(files)
    data = bytearray(file.read_bytes())
    kind = rng.choice(("cut", "flip", "empty"))
    if kind == "cut":
        del data[len(data) // 2 :]
    elif kind == "empty":
        data.clear()
    elif data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def devices(trainer: Trainer, rng: random.Random) -> None:
    for count in (8, 2, 8):
        process = trainer.start(count)
        reached = len(trainer.losses())
        wait_until(_logged(trainer, min(reached + rng.randint(2, 3), STEPS - 1)), process)
        process.terminate()
        process.wait(120)


FAULTS: dict[str, Fault] = {
    "kill": kill,
    "kill_commit": kill_commit,
    "kill_cache": kill_cache,
    "kill_parent": kill_parent,
    "kill_worker": kill_worker,
    "term": term,
    "term_twice": term_twice,
    "damage": damage,
    "devices": devices,
}
