"""Rounds: each injects one fault, finishes the run, then compares the results."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.faults_bench import disk, processes, storage
from experiments.benchmarks.faults_bench.trainer import Hangs, Trainer, prepare, small_sets
from mono_jax.errors import unknown_key

Fault = Callable[[Trainer, random.Random], str | None]

FAULTS: dict[str, Fault] = {
    "kill": processes.kill,
    "kill_commit": processes.kill_commit,
    "kill_cache": processes.kill_cache,
    "kill_write": processes.kill_write,
    "kill_resume": processes.kill_resume,
    "kill_parent": processes.kill_parent,
    "kill_worker": processes.kill_worker,
    "term_start": processes.term_start,
    "term_compile": processes.term_compile,
    "term": processes.term,
    "term_twice": processes.term_twice,
    "interrupt": processes.interrupt,
    "second": processes.second,
    "devices": processes.devices,
    "disk_small": storage.disk_small,
    "disk_moment": storage.disk_moment,
    "disk_long": storage.disk_long,
    "storage_renamed": storage.storage_renamed,
    "storage_cut": storage.storage_cut,
    "storage_overwritten": storage.storage_overwritten,
    "damage_cache": storage.damage_cache,
    "damage_checkpoint": storage.damage_checkpoint,
    "damage_small": storage.damage_small,
    "damage_metrics": storage.damage_metrics,
    "damage_model": storage.damage_model,
}


def run(rounds: int, names: Sequence[str] | None, seed: int, folder: Path | None) -> dict[str, Any]:
    """Runs ``rounds`` rounds and returns what ``--json`` prints; raises ConfigError for an unknown fault."""
    for name in names or ():
        if name not in FAULTS:
            raise unknown_key("fault", name, FAULTS)
    with tempfile.TemporaryDirectory() as temporary:
        return _rounds(rounds, list(names or FAULTS), seed, folder or Path(temporary))


def _rounds(rounds: int, names: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """Skips the rounds that are already in ``folder``/rounds.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare()
    manifest = small_sets(folder / "sets")
    shutil.rmtree(folder / "whole", ignore_errors=True)
    whole = Trainer(folder / "whole", manifest)
    if code := whole.finish():
        raise RuntimeError(f"the undisturbed run ends with {code}: {whole.last_line()}")
    wanted = dict(whole.losses()), whole.weights()
    done = folder / "rounds.jsonl"
    records = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    runnable = names if disk.can_mount() else [name for name in names if not name.startswith("disk_")]
    for number in range(len(records), rounds):
        name = runnable[number % len(runnable)]
        place = folder / f"round{number}"
        shutil.rmtree(place, ignore_errors=True)
        records.append(_round(number, name, Trainer(place, manifest), wanted, random.Random(f"{seed} {number}")))
        with done.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
        print(f"round {number} {name}: {records[-1]['problem'] or 'identical'}", flush=True)
    return _summed(records[:rounds], {name: "no disk can be mounted here" for name in names if name not in runnable})


def _summed(records: list[dict[str, Any]], skipped: dict[str, str]) -> dict[str, Any]:
    by_fault = {}
    for name in dict.fromkeys(record["fault"] for record in records):
        rounds = [record for record in records if record["fault"] == name]
        by_fault[name] = {
            "rounds": len(rounds),
            "struck": sum(record["struck"] for record in rounds),
            "identical": sum(record["problem"] is None for record in rounds),
            "failures": [f"round {r['round']}: {r['problem']}; {r['line']}" for r in rounds if r["problem"]],
        }
    total = Counter(hangs=0, lost_records=0)
    for record in records:
        total.update(hangs=record["hung"], lost_records=record["lost_records"])
    return {
        "rounds": len(records),
        "identical": sum(record["problem"] is None for record in records),
        "lost_steps_max": max((record["lost_steps"] for record in records), default=0),
        "lost_records": total["lost_records"],
        "hangs": total["hangs"],
        "by_fault": by_fault,
        "skipped": skipped,
    }


Wanted = tuple[dict[int, float], dict[str, np.ndarray]]  # losses by step, weights by path


def _round(number: int, name: str, trainer: Trainer, wanted: Wanted, rng: random.Random) -> dict[str, Any]:
    """The record of one round; its folder is kept if there is a problem."""
    start, facts = time.monotonic(), {"hung": False, "lost_steps": 0, "lost_records": 0}
    try:
        problem = FAULTS[name](trainer, rng)
        facts["lost_steps"] = max(0, max(dict(trainer.losses()), default=0) - max(trainer.saved(), default=0))
        code = trainer.finish()
        problem = problem or (f"ends with {code}" if code else None)
        facts["lost_records"] = 0 if trainer.harmed else len(wanted[0].keys() - dict(trainer.losses()).keys())
        problem = problem or _difference(trainer, wanted, exact=trainer.devices == 1)
    except Hangs:
        problem, facts["hung"] = "hangs", True
    if _tracebacks(trainer.output()):
        problem = problem or "a traceback"
    if trainer.disk is not None:
        if problem and trainer.workdir.exists():
            shutil.copytree(trainer.workdir, trainer.folder / "run")
        trainer.disk.remove()
    if problem is None:
        shutil.rmtree(trainer.folder)
    record = {"round": number, "fault": name, "problem": problem, "struck": trainer.struck, **facts}
    return record | {"seconds": round(time.monotonic() - start, 1), "line": problem and trainer.last_line()[:300]}


def _tracebacks(output: str) -> int:
    """Number of tracebacks in ``output``, except those of TensorStore.

    It prints one for each write that ends after another write has failed (on a full disk), because Orbax's event loop
    is closed by then; no Python hook can suppress it.
    """
    return output.count("Traceback (most recent call last)") - output.count("RuntimeError: Event loop is closed")


def _difference(trainer: Trainer, wanted: Wanted, exact: bool) -> str | None:
    """How the finished run differs from the undisturbed run."""
    found, losses = dict(trainer.losses()), wanted[0]
    if found.keys() != losses.keys() and not (trainer.harmed and found.keys() < losses.keys()):
        return f"records of steps {sorted(found)}"
    if any(abs(loss - losses[step]) > (0 if exact else 1e-5) for step, loss in found.items()):
        return "other losses"
    tolerance = {"rtol": 0, "atol": 0 if exact else 1e-5}
    ours = trainer.weights()
    if not all(np.allclose(ours[path], value, **tolerance) for path, value in wanted[1].items()):
        return "other weights"
    return None
