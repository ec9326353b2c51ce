"""Runs the units of sweeps as separate processes, several at once if requested."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from mono_jax.runs.sweeping.chain import Plan
from mono_jax.runs.sweeping.places import FAILED, LOG, is_trained, unit_folder
from mono_jax.runs.sweeping.running import write_failure
from mono_jax.runs.sweeping.status import FINISHED, state_of
from mono_jax.runs.workdir import in_use
from mono_jax.training.callbacks.signals import OnSignals
from mono_jax.training.callbacks.stopping import PREEMPTED, Preempted

Say = Callable[[str], None]

# If one of these is set, the user has chosen how much of a GPU's memory a process takes.
MEMORY_CHOICES = {"XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"}


@dataclasses.dataclass(frozen=True)
class Task:
    """A unit, run as ``command`` in its sweep's ``workdir``; ``name`` is its name in messages."""

    name: str
    plan: Plan
    workdir: Path
    command: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return unit_folder(self.workdir, self.plan.unit.name)

    @property
    def is_finished(self) -> bool:
        return state_of(self.workdir, self.plan).state == FINISHED


@dataclasses.dataclass
class _Job:
    task: Task
    process: subprocess.Popen[bytes]
    slot: int


class Scheduler(OnSignals):
    """Keeps up to ``jobs`` tasks running, each with its output in its unit's log.txt.

    A unit whose next stage is being trained by another one starts once that stage is finished; sweeps whose units run
    together have a common folder of shared stages. Jobs share the GPUs, see ``share_of_gpus``.

    Nothing is started while another process runs one of the units, for example one that a killed scheduler left: it may
    have the GPU of a job.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, jobs: int, say: Say):
        self._jobs, self._say = jobs, say
        self._active: list[_Job] = []
        self._stop = False
        self._others: list[str] = []  # units that other processes run

    def run(self, tasks: Sequence[Task]) -> dict[str, list[str]]:
        """Runs the unfinished tasks; returns {"finished": names, "failed": names}. Raises Preempted after a signal."""
        waiting = [task for task in tasks if not task.is_finished]
        outcome: dict[str, list[str]] = {"finished": [], "failed": []}
        outcome["finished"] = [task.name for task in tasks if task not in waiting]
        if outcome["finished"]:
            self._say(f"{len(outcome['finished'])} of {len(tasks)} units are finished")
        with self:
            try:
                while self._active or (waiting and not self._stop):
                    self._start(waiting, outcome["finished"])
                    self._collect(outcome)
                    time.sleep(0.2)
            finally:
                self._end()
        if self._stop:
            raise Preempted(
                f"stopped with {len(outcome['finished'])} of {len(tasks)} units finished: run again to continue"
            )
        return outcome

    def _start(self, waiting: list[Task], finished: list[str]) -> None:
        while len(self._active) < self._jobs and (task := next(filter(self._is_ready, waiting), None)):
            if self._stop or self._has_others(waiting):
                return
            waiting.remove(task)
            if task.is_finished:  # by another process
                finished.append(task.name)
                continue
            slot = min(set(range(self._jobs)) - {job.slot for job in self._active})
            task.folder.mkdir(parents=True, exist_ok=True)
            with (task.folder / LOG).open("ab") as log:
                process = subprocess.Popen(
                    task.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | share_of_gpus(os.environ, slot, self._jobs),
                    start_new_session=True,  # Ctrl-C reaches this process, which passes it on once
                )
            self._active.append(_Job(task, process, slot))
            if self._stop:  # a signal that came while it was started
                process.terminate()
            self._say(f"{task.name}: started ({task.folder / LOG})")

    def _has_others(self, waiting: Sequence[Task]) -> bool:
        """Whether another process runs one of these units; prints which."""
        before, self._others = self._others, [task.name for task in waiting if in_use(task.folder)]
        if self._others and self._others != before:
            self._say(f"waiting for {', '.join(self._others)}, which another process runs ...")
        return bool(self._others)

    def _is_ready(self, task: Task) -> bool:
        """Whether the first stage that this unit lacks is not part of any running unit."""
        lacks = next((link for link in task.plan.stages if not is_trained(task.workdir, link)), None)
        return all(lacks not in job.task.plan.stages for job in self._active)

    def _collect(self, outcome: dict[str, list[str]]) -> None:
        for job in list(self._active):
            code = job.process.poll()
            if code is None:
                continue
            self._active.remove(job)
            name, folder = job.task.name, job.task.folder
            if code == 0:
                outcome["finished"].append(name)
                self._say(f"{name}: finished")
            elif not (self._stop and (code == PREEMPTED or code < 0)):  # negative: ended by the signal itself
                if not (folder / FAILED).is_file():
                    write_failure(folder, last_line(folder / LOG), code)
                outcome["failed"].append(name)
                self._say(f"{name}: failed: {last_line(folder / LOG)}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._stop = True
        self._end()

    def _end(self) -> None:
        for job in self._active:
            job.process.terminate()


def share_of_gpus(environment: Mapping[str, str], slot: int, jobs: int) -> dict[str, str]:
    """The share of job ``slot`` of ``jobs`` in the GPUs that CUDA_VISIBLE_DEVICES names, as environment variables.

    With at least as many GPUs as jobs, each job gets its own GPUs. With fewer, several jobs share a GPU, and each gets
    the same part of its memory, since otherwise the first would take nearly all of it; XLA_PYTHON_CLIENT_MEM_FRACTION
    or XLA_PYTHON_CLIENT_PREALLOCATE, if set, are left unchanged.
    """
    names = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    each = len(names) // jobs
    if each:
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[slot * each : (slot + 1) * each])}
    share = {"CUDA_VISIBLE_DEVICES": names[slot % len(names)]} if names else {}
    if jobs > 1 and not MEMORY_CHOICES & environment.keys():
        on_one = math.ceil(jobs / len(names)) if names else jobs
        share["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.75 / on_one:.4f}"  # 0.75: what JAX takes for one process
    return share


def last_line(log: Path) -> str:
    """The last non-empty line of ``log``; "" if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
