"""What ``experiments/sweep.py`` does, one function for each of its actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.io import publish
from mono_jax.runs.console import say_now
from mono_jax.runs.sweeping import slurm as slurm_job
from mono_jax.runs.sweeping.chain import Plan, plan, plans
from mono_jax.runs.sweeping.gather import gather as gather_results
from mono_jax.runs.sweeping.running import run_unit
from mono_jax.runs.sweeping.schedule import Scheduler
from mono_jax.runs.sweeping.status import state_of
from mono_jax.runs.sweeping.units import Sweep, Unit, read_sweep
from mono_jax.runs.workdir import locked


def expand(file: Path) -> dict[str, Any]:
    """Checks every unit and prints a table: what it changes, and how many of its stages it trains first."""
    sweep = read_sweep(file)
    planned, trained = plans(sweep), set()
    rows = [["", "unit", "stages", "of its own", "changes"]]
    for number, each in enumerate(planned):
        own = [link for link in each.stages if link not in trained]
        trained |= set(own)
        changes = ", ".join(f"{key}={value}" for key, value in each.unit.changes.items()) or "none"
        rows.append([str(number), each.unit.name, str(len(each.stages)), str(len(own)), changes])
    _print_table(rows)
    stages = sum(len(each.stages) for each in planned)
    say_now(f"{len(planned)} units, {stages} stages, {len(trained)} to train: the others are shared")
    units = [_described(each.unit) | {"stages": [link.name for link in each.stages]} for each in planned]
    return {"title": sweep.title, "units": units, "stages": stages, "to_train": len(trained)}


def run(file: Path, workdir: Path, jobs: int, command: Sequence[str]) -> dict[str, Any]:
    """Runs all units as processes, ``command`` + [name]. Raises CheckpointError if another process does already."""
    sweep = read_sweep(file)
    planned = plans(sweep)
    with locked(workdir):
        _write_manifest(workdir, sweep, planned)
        return Scheduler(workdir, command, jobs, say_now).run(planned)


def run_one(file: Path, workdir: Path, unit: str) -> dict[str, Any]:
    """Runs ``unit`` (a name or a number) in this process, or in all that are joined."""
    return run_unit(plan(read_sweep(file).unit(unit)), workdir)


def slurm(
    file: Path, workdir: Path, jobs: int | None, options: Sequence[str], submit: bool, command: Sequence[str]
) -> dict[str, Any]:
    """Writes the array job, and hands it to sbatch if asked."""
    sweep = read_sweep(file)
    planned = plans(sweep)
    _write_manifest(workdir, sweep, planned)
    script = slurm_job.write_script(workdir, file.stem, len(planned), command, jobs, options)
    say_now(f"{script}: {len(planned)} units")
    if submit:
        say_now(slurm_job.submit(script))
    return {"script": str(script), "units": len(planned), "submitted": submit}


def status(file: Path, workdir: Path) -> dict[str, Any]:
    """Prints how far each unit is."""
    states = [state_of(workdir, each) for each in plans(read_sweep(file))]
    rows = [["unit", "state", "stage", "step", "loss", ""]]
    for state in states:
        step, loss = ("" if value is None else value for value in (state.step, state.loss))
        loss = f"{loss:.4f}" if isinstance(loss, float) else loss
        rows.append([state.name, state.state, state.stage, str(step), loss, state.note])
    _print_table(rows)
    counts: dict[str, int] = {}
    for state in states:
        counts[state.state] = counts.get(state.state, 0) + 1
    say_now(", ".join(f"{count} {name}" for name, count in counts.items()))
    return {"units": {s.name: {"state": s.state, "stage": s.stage, "step": s.step} for s in states}, "counts": counts}


def gather(file: Path, workdir: Path, metrics: Sequence[str]) -> dict[str, Any]:
    """Writes and prints the results."""
    sweep = read_sweep(file)
    return gather_results(sweep, plans(sweep), workdir, metrics, say_now)


def _write_manifest(workdir: Path, sweep: Sweep, planned: Sequence[Plan]) -> None:
    """WORKDIR/sweep.json: what was asked for."""
    units = [_described(each.unit) | {"stages": [link.name for link in each.stages]} for each in planned]
    publish.write_json(workdir / "sweep.json", {"file": str(sweep.file), "title": sweep.title, "units": units})


def _described(unit: Unit) -> dict[str, Any]:
    changes: Mapping[str, Any] = unit.changes
    return {"name": unit.name, "group": unit.group, "seed": unit.seed, "config": unit.config, "changes": dict(changes)}


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        say_now("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
