"""Implements ``experiments/sweep.py``, with one function for each of its actions."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.io import publish
from mono_jax import cli
from mono_jax.errors import ConfigError
from mono_jax.runs.console import say_now
from mono_jax.runs.sweeping import slurm as slurm_job
from mono_jax.runs.sweeping.chain import Plan, idle, plan, plans, repeated
from mono_jax.runs.sweeping.gather import gather
from mono_jax.runs.sweeping.places import share
from mono_jax.runs.sweeping.running import run_unit
from mono_jax.runs.sweeping.schedule import Scheduler, Task
from mono_jax.runs.sweeping.status import state_of
from mono_jax.runs.sweeping.units import Sweep, read_sweep
from mono_jax.runs.workdir import locked
from mono_jax.training.callbacks.stopping import PREEMPTED, Preempted, StopAtOnce


@dataclasses.dataclass(frozen=True)
class Asked:
    """A sweep, its output folder, and the command that runs one of its units once the unit's name is appended."""

    sweep: Sweep
    workdir: Path | None
    command: tuple[str, ...]


def act(args: argparse.Namespace, program: str) -> tuple[int, dict[str, Any] | None]:
    """Does what the arguments of ``program`` ask for; returns the exit code and, in the first process, the result.

    For several sweeps, the result is {name of the file: result}, except for "run", which has a single one. Raises
    MonoJaxError or DataError.
    """
    asked = _asked(args, program)
    if args.action == "run":
        return _run(args, asked)
    cli.alone(f"sweep.py {args.action}", args)
    results = {}
    for each in asked:
        if len(asked) > 1:
            say_now(f"{each.sweep.file}:")
        results[each.sweep.file.stem] = _act(args, each)
    return 0, results if len(asked) > 1 else next(iter(results.values()))


def _act(args: argparse.Namespace, asked: Asked) -> dict[str, Any]:
    sweep, workdir = asked.sweep, asked.workdir
    if args.action == "expand":
        return expand(sweep)
    if args.action == "status":
        return status(sweep, workdir)
    if args.action == "gather":
        return gather(sweep, plans(sweep), workdir, args.metrics, say_now)
    return slurm(sweep, workdir, args.jobs, args.sbatch, args.submit, [*asked.command, "--index"])


def _run(args: argparse.Namespace, asked: Sequence[Asked]) -> tuple[int, dict[str, Any] | None]:
    if args.unit is None:
        cli.alone("sweep.py run without --unit", args)
    joined = contextlib.nullcontext(True) if args.unit is None else cli.joined(args)
    with StopAtOnce(), joined as first:
        try:
            if args.unit is not None:
                result = run_unit(plan(asked[0].sweep.unit(args.unit)), asked[0].workdir)
            else:
                result = run(asked, args.jobs or 1)
        except Preempted as stop:
            if first:
                print(stop, file=sys.stderr)
            return PREEMPTED, None
    return int(bool(result.get("failed"))), result if first else None


def _asked(args: argparse.Namespace, program: str) -> list[Asked]:
    """One for each file; several files get folders by their names in the workdir, and one common folder of shared
    stages."""
    stems = [file.stem for file in args.files]
    if len(set(stems)) < len(stems):
        raise ConfigError(
            f"{', '.join(map(str, args.files))}: two files with the same name would use the same folder: rename one"
        )
    found = []
    for file in args.files:
        sweep, workdir, shared = read_sweep(file, args.config), args.workdir, args.shared
        if workdir is not None and len(stems) > 1:
            workdir, shared = workdir / file.stem, shared or workdir / "shared"
        if shared is not None and args.action in ("run", "slurm"):
            share(workdir, shared)
        command = [sys.executable, program, "run", str(file), f"--workdir={workdir}"]
        command += [] if args.config is None else [f"--config={args.config}"]
        found.append(Asked(sweep, workdir, tuple(command)))
    return found


def expand(sweep: Sweep) -> dict[str, Any]:
    """Checks every unit and prints a table: what it changes, and how many of its stages it is the first to train."""
    planned, trained = plans(sweep), set()
    rows = [["", "unit", "stages", "to train", "changes"]]
    for number, each in enumerate(planned):
        own = [link for link in each.stages if link not in trained]
        trained |= set(own)
        changes = ", ".join(f"{key}={value}" for key, value in each.unit.changes.items()) or "none"
        rows.append([str(number), each.unit.name, str(len(each.stages)), str(len(own)), changes])
    _print_table(rows)
    _say_without_effect(planned)
    stages = sum(len(each.stages) for each in planned)
    say_now(f"{len(planned)} units, {stages} stages, {len(trained)} to train; the others are shared")
    return {"title": sweep.title, "units": _described(planned), "stages": stages, "to_train": len(trained)}


def run(asked: Sequence[Asked], jobs: int) -> dict[str, Any]:
    """Runs all units as processes; with several sweeps, the first seeds of all sweeps run first, then the second ones.

    Raises CheckpointError if another process is already running them.
    """
    tasks: list[Task] = []
    with contextlib.ExitStack() as stack:
        for each in asked:
            planned = plans(each.sweep)
            _say_without_effect(planned)
            stack.enter_context(locked(each.workdir))
            _write_manifest(each.workdir, each.sweep, planned)
            prefix = f"{each.sweep.file.stem}/" if len(asked) > 1 else ""
            tasks += [
                Task(prefix + plan.unit.name, plan, each.workdir, (*each.command, "--unit", plan.unit.name))
                for plan in planned
            ]
        if len(asked) > 1:
            tasks.sort(key=lambda task: task.plan.unit.seed or 0)
        return Scheduler(jobs, say_now).run(tasks)


def slurm(
    sweep: Sweep, workdir: Path, jobs: int | None, options: Sequence[str], submit: bool, command: Sequence[str]
) -> dict[str, Any]:
    """Writes the array job, and submits it with sbatch if asked."""
    planned = plans(sweep)
    _write_manifest(workdir, sweep, planned)
    script = slurm_job.write_script(workdir, sweep.file.stem, len(planned), command, jobs, options)
    say_now(f"{script}: {len(planned)} units")
    if submit:
        say_now(slurm_job.submit(script))
    return {"script": str(script), "units": len(planned), "submitted": submit}


def status(sweep: Sweep, workdir: Path) -> dict[str, Any]:
    """Prints the progress of each unit."""
    states = [state_of(workdir, each) for each in plans(sweep)]
    rows = [["unit", "state", "stage", "step", "loss", ""]]
    for state in states:
        step, loss = ("" if value is None else value for value in (state.step, state.loss))
        loss = f"{loss:.4f}" if isinstance(loss, float) else loss
        rows.append([state.name, state.state, state.stage, str(step), loss, state.note])
    _print_table(rows)
    counts = dict(collections.Counter(state.state for state in states))
    say_now(", ".join(f"{count} {name}" for name, count in counts.items()))
    return {"units": {s.name: {"state": s.state, "stage": s.stage, "step": s.step} for s in states}, "counts": counts}


def _write_manifest(workdir: Path, sweep: Sweep, planned: Sequence[Plan]) -> None:
    """Writes WORKDIR/sweep.json, which says what was requested."""
    asked = {"file": str(sweep.file), "title": sweep.title, "units": _described(planned)}
    publish.write_json(workdir / "sweep.json", asked)


def _say_without_effect(planned: Sequence[Plan]) -> None:
    """Names the keys that are changed in vain, once for each group, and the units that equal another one."""
    groups = {each.unit.group: each for each in planned}
    for group, each in groups.items():
        for key, why in idle(each).items():
            say_now(f"NOTE: {group}: {key} has no effect, since {why}")
    for name, other in repeated(planned).items():
        say_now(f"NOTE: {name} is the same as {other}: what it changes has no effect")


def _described(planned: Sequence[Plan]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(each.unit) | {"stages": [link.name for link in each.stages]} for each in planned]


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        say_now("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
