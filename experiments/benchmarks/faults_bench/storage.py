"""File and disk faults: full, missing, changed, damaged."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from experiments.benchmarks.faults_bench.disk import Disk
from experiments.benchmarks.faults_bench.processes import PREEMPTED, after, any_moment, kill_at, logged, unsaved
from experiments.benchmarks.faults_bench.trainer import STEPS, Process, Trainer, ended, wait_until

_ROOM = 16 * 2**20  # bytes, more than a run needs
_STOPPED = (0, 1, 2)  # exit codes of a run that storage ends with a one-line error

# ------------------------------------------------------------------ the disk of the workdir is full


def disk_small(trainer: Trainer, rng: random.Random) -> str | None:
    """A disk that the run itself fills, during whatever write; then the disk grows."""
    small = trainer.on_disk(4096 * rng.randrange(1, 560))
    code = ended(trainer.start())
    trainer.struck = code != 0
    small.grow(_ROOM)
    return None if code in _STOPPED else f"exit code {code} on a full disk"


def _filled_at_any_moment(trainer: Trainer, rng: random.Random) -> tuple[Disk, Process]:
    """A run on a disk that has just become full."""
    small = trainer.on_disk(_ROOM)
    process = trainer.start()
    trainer.struck = wait_until(any_moment(trainer, rng), process)
    small.fill()
    return small, process


def disk_moment(trainer: Trainer, rng: random.Random) -> str | None:
    """Full at a random moment, for a short time."""
    small, process = _filled_at_any_moment(trainer, rng)
    time.sleep(rng.uniform(0.05, 2))
    small.free()
    code = ended(process)
    return None if code in _STOPPED else f"exit code {code} on a full disk"


def disk_long(trainer: Trainer, rng: random.Random) -> str | None:
    """Full from a random moment until the run ends; the run must still react to SIGTERM."""
    small, process = _filled_at_any_moment(trainer, rng)
    asked = rng.random() < 0.5
    if asked and wait_until(after(rng.uniform(0, 2)), process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
    code = ended(process, 120)
    small.free()
    allowed = (*_STOPPED, PREEMPTED, -signal.SIGTERM) if asked else _STOPPED
    return unsaved(trainer, code) if code in allowed else f"exit code {code} on a full disk"


# ------------------------------------------------------------------ data storage is missing, then restored


def _away(trainer: Trainer, rng: random.Random, harm: Callable[[Path], None]) -> str | None:
    shard = trainer.own_sets()
    data, status = shard.read_bytes(), shard.stat()
    patient = rng.random() < 0.5
    if patient:
        trainer.options = ("--config.data.retries=1", "--config.data.storage_wait_s=60")
    else:
        trainer.options = ("--config.data.retries=0", "--config.data.storage_wait_s=0")
    process = trainer.start()
    trainer.struck = wait_until(logged(trainer, rng.randint(1, STEPS - 3)), process)
    harm(shard)
    if patient:
        time.sleep(rng.uniform(0.1, 2))
    else:
        code = ended(process)
    new = shard.with_name("new")
    new.write_bytes(data)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.rename(shard)
    if patient:
        code = ended(process)
    trainer.options = ()
    if "bad samples" in trainer.output():
        return "storage away makes bad samples"
    return None if code in ((0,) if patient else (0, 1)) else f"exit code {code} while storage is away"


def storage_renamed(trainer: Trainer, rng: random.Random) -> str | None:
    return _away(trainer, rng, lambda shard: shard.rename(shard.with_name("elsewhere")) and None)


def storage_cut(trainer: Trainer, rng: random.Random) -> str | None:
    return _away(trainer, rng, lambda shard: os.truncate(shard, rng.randrange(shard.stat().st_size)))


def storage_overwritten(trainer: Trainer, rng: random.Random) -> str | None:
    """Overwritten by noise, sometimes with the same modification time."""

    def overwrite(shard: Path) -> None:
        status = shard.stat()
        shard.write_bytes(rng.randbytes(status.st_size))
        if rng.random() < 0.5:
            os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))

    return _away(trainer, rng, overwrite)


# ------------------------------------------------------------------ damaged files


def _damage(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    kind = rng.choice(("cut", "flip", "empty", "noise", "missing"))
    if kind == "missing":
        file.unlink()
        return
    if kind == "cut":
        del data[rng.randrange(len(data) + 1) :]
    elif kind == "empty":
        data.clear()
    elif kind == "noise":
        data[:] = rng.randbytes(len(data))
    elif data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _damage_one(trainer: Trainer, rng: random.Random, *folders: Path) -> None:
    """Damages one file: a folder is chosen uniformly from ``folders``, then a file in it."""
    files = [sorted(file for file in folder.rglob("*") if file.is_file()) for folder in folders]
    if files := [found for found in files if found]:
        file = rng.choice(rng.choice(files))
        with trainer.log.open("a") as log:
            log.write(f"damaged: {file}\n")
        _damage(file, rng)
    else:
        trainer.struck = False


def damage_cache(trainer: Trainer, rng: random.Random) -> None:
    """Index, lengths, plan."""
    shard = trainer.own_sets()
    kill_at(trainer, logged(trainer, rng.randint(2, STEPS - 1)))
    index = shard.with_name(shard.name + ".index.npz")
    if rng.random() < 0.3 and index.exists():
        _damage(index, rng)
    else:
        _damage_one(trainer, rng, trainer.workdir / "cache" / "lengths", trainer.workdir / "cache" / "plans")


def damage_checkpoint(trainer: Trainer, rng: random.Random) -> None:
    """A file of the newest of several checkpoints, or of the frozen base."""
    kill_at(trainer, lambda: len(trainer.saved()) >= 2)
    newest = max(trainer.saved(), default=0)
    folder = trainer.workdir / "checkpoints" / str(newest)
    _damage_one(trainer, rng, folder, *([trainer.workdir / "base"] if rng.random() < 0.5 else []))


def damage_small(trainer: Trainer, rng: random.Random) -> None:
    """Events, configs, the lock, the mark of the first checkpoint."""
    kill_at(trainer, logged(trainer, rng.randint(2, STEPS - 1)))
    names = ("tensorboard", "config.json", "config.initial.json", ".lock", ".checkpointed")
    present = [trainer.workdir / name for name in names if (trainer.workdir / name).exists()]
    chosen = rng.choice(present)
    if chosen.is_dir():
        _damage_one(trainer, rng, chosen)
    else:
        _damage(chosen, rng)


def damage_metrics(trainer: Trainer, rng: random.Random) -> None:
    """Damaged records are lost, but nothing else."""
    kill_at(trainer, logged(trainer, rng.randint(2, STEPS - 1)))
    trainer.harmed = True
    _damage(trainer.workdir / "metrics.jsonl", rng)


def damage_model(trainer: Trainer, rng: random.Random) -> None:
    """The damaged result of a finished run must be written again."""
    trainer.struck = trainer.finish() == 0
    _damage_one(trainer, rng, trainer.workdir / "model")
