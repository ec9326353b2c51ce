"""Units as processes: how many run at once, which may start, failures, signals; the array job."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.io.publish import write_json
from mono_jax.errors import ClusterError, ConfigError
from mono_jax.runs.sweeping import commands, slurm
from mono_jax.runs.sweeping.chain import Plan, plans
from mono_jax.runs.sweeping.places import alone_with, share, unit_folder
from mono_jax.runs.sweeping.schedule import Scheduler, Task, last_line, share_of_gpus
from mono_jax.runs.sweeping.status import state_of
from mono_jax.runs.sweeping.units import read_sweep
from mono_jax.runs.workdir import locked
from mono_jax.training.callbacks.stopping import PREEMPTED, Preempted

ROOT = Path(__file__).parents[4]

# Stands in for sweep.py run: makes the unit's stages one after another, following its plan in plans.json.
WORKER = """
import json, os, signal, sys, time
workdir, name = sys.argv[1], sys.argv[2]
plan = json.load(open(workdir + "/plans.json"))[name]
def note(event):
    with open(workdir + "/events.txt", "a") as file:
        file.write(f"{event} {name} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
if plan["on_term"] is not None:
    signal.signal(signal.SIGTERM, lambda *_: exec(plan["on_term"]))
note("start")
if name == plan["fails"]:
    print("some line", flush=True); print("ValueError: no luck", file=sys.stderr); sys.exit(1)
for folder, digest in plan["stages"].items():
    done = f"{workdir}/shared/{folder}-{digest}/summary.json"
    if not os.path.exists(done):
        time.sleep(plan["seconds"])
        os.makedirs(os.path.dirname(done), exist_ok=True)
        open(done + ".part", "w").write("{}")
        os.rename(done + ".part", done)
        note("made-" + folder)
json.dump({**plan["decides"], "metrics": {}}, open(f"{workdir}/units/{name}/result.json", "w"))
note("end")
"""


@pytest.fixture
def planned(sweep_file: Path) -> list[Plan]:
    return plans(read_sweep(sweep_file))


def run(workdir: Path, planned: list[Plan], jobs: int, **how: Any) -> dict[str, list[str]]:
    return Scheduler(jobs, print).run(tasks(workdir, planned, **how))


def tasks(
    workdir: Path, planned: list[Plan], seconds: float = 0.05, fails: str = "", on_term: str | None = None
) -> list[Task]:
    workdir.mkdir(exist_ok=True, parents=True)
    how = {"seconds": seconds, "fails": fails, "on_term": on_term}
    described = {plan.unit.name: {"stages": plan.decides["stages"], "decides": plan.decides, **how} for plan in planned}
    (workdir / "plans.json").write_text(json.dumps(described))
    command = (sys.executable, "-c", WORKER, str(workdir))
    return [Task(plan.unit.name, plan, workdir, (*command, plan.unit.name)) for plan in planned]


def events(workdir: Path) -> list[list[str]]:
    return [line.split() for line in (workdir / "events.txt").read_text().splitlines()]


def test_several_at_once_and_nothing_twice(planned: list[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    workdir = tmp_path / "work"
    outcome = run(workdir, planned, jobs=2)
    assert sorted(outcome["finished"]) == sorted(plan.unit.name for plan in planned) and outcome["failed"] == []
    active, most, made = set(), 0, []
    for event, name, gpus in events(workdir):
        assert gpus in ("4,5", "6,7")
        (active.add if event == "start" else active.discard if event == "end" else made.append)(name)
        most = max(most, len(active))
    stages = {link for plan in planned for link in plan.stages}
    assert most == 2 and len(made) == len(stages), "each shared stage is made once"
    started = len(events(workdir))
    assert len(run(workdir, planned, jobs=2)["finished"]) == 5
    assert len(events(workdir)) == started, "finished units are left alone"


def test_failures_are_named_and_tried_again(planned: list[Plan], tmp_path: Path):
    workdir = tmp_path / "work"
    outcome = run(workdir, planned, jobs=1, fails="high-seed0")
    assert outcome["failed"] == ["high-seed0"] and len(outcome["finished"]) == 4
    state = state_of(workdir, planned[2])
    assert (state.state, state.note) == ("failed", "ValueError: no luck")
    assert run(workdir, planned, jobs=1)["failed"] == []


@pytest.mark.parametrize(
    ("on_term", "failed"),
    [
        (None, False),  # it is importing, or compiling: the signal itself ends it
        ("os._exit(75)", False),
        ("os.kill(os.getpid(), 9)", False),  # no memory, or no patience
        ("print('ValueError: a bug', flush=True); os._exit(1)", True),
    ],
)
def test_a_signal_ends_the_units_and_the_next_start_goes_on(
    planned: list[Plan], tmp_path: Path, on_term: str | None, failed: bool
):
    workdir = tmp_path / "work"

    def stop() -> None:
        while not (workdir / "events.txt").is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(Preempted, match="0 of 5 units finished: run again"):
        run(workdir, planned, jobs=1, seconds=600, on_term=on_term)
    states = [state_of(workdir, plan) for plan in planned]
    assert [(state.state, state.note) for state in states if state.state != "waiting"] == (
        [("failed", "ValueError: a bug")] if failed else []
    )
    assert len(run(workdir, planned, jobs=3, seconds=0)["finished"]) == 5


def test_a_signal_while_a_unit_is_started_ends_it_and_starts_no_other(
    planned: list[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    popen, started = subprocess.Popen, []

    def start(*args: Any, **how: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **how))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(Preempted, match="0 of 5 units finished"):
        run(tmp_path / "work", planned, jobs=2, seconds=600)
    assert [process.wait() for process in started] == [-signal.SIGTERM]


@pytest.mark.parametrize("finishes", [False, True])
def test_units_of_another_process_are_waited_for(planned: list[Plan], tmp_path: Path, finishes: bool):
    """Nothing else is started meanwhile; a unit that the other process finishes is not run again."""
    workdir, said = tmp_path / "work", []
    other, folder = planned[2], unit_folder(tmp_path / "work", planned[2].unit.name)
    with contextlib.ExitStack() as lock:
        lock.enter_context(locked(folder))

        def say(line: str) -> None:
            said.append(line)
            if line == f"waiting for {other.unit.name}, which another process runs ...":
                assert not (workdir / "events.txt").exists()
                if finishes:
                    write_json(folder / "result.json", {**other.decides, "metrics": {}})
                lock.close()

        outcome = Scheduler(2, say).run(tasks(workdir, planned))
    assert len(outcome["finished"]) == 5 and outcome["failed"] == []
    assert said[0].startswith("waiting") and sum(line.startswith("waiting") for line in said) == 1
    assert (["start", other.unit.name] in [event[:2] for event in events(workdir)]) != finishes


def test_a_unit_stops_at_once_while_it_waits_for_another(sweep_file: Path, planned: list[Plan], tmp_path: Path):
    """SIGTERM is not a failure: the exit code says to run again."""
    workdir = tmp_path / "work"
    folder = unit_folder(workdir, planned[0].unit.name)
    command = [sys.executable, "experiments/sweep.py", "run", str(sweep_file), f"--workdir={workdir}", "--index=0"]
    with alone_with(folder / "data", print):
        unit = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert unit.stdout.readline() == "waiting for another unit, which is making data ...\n"
        unit.send_signal(signal.SIGTERM)
        _, error = unit.communicate()
    assert (unit.returncode, error) == (PREEMPTED, "stopped as requested: run the same command again to resume\n")
    assert state_of(workdir, planned[0]).state == "waiting"


def test_several_sweeps_are_one_queue(sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first seeds of all sweeps come first; each sweep has a folder of its name, and all share their stages."""
    other = sweep_file.with_name("others.py")
    other.write_text(sweep_file.read_text().replace('"short"', '"brief"'))
    seen: list[Task] = []

    def record(self: Scheduler, tasks: list[Task]) -> dict[str, list[str]]:
        seen.extend(tasks)
        return {"finished": [], "failed": []}

    monkeypatch.setattr(Scheduler, "run", record)
    work = tmp_path / "work"
    chosen = {"action": "run", "files": [sweep_file, other], "workdir": work, "jobs": 2}
    absent = dict.fromkeys(("shared", "config", "unit", "coordinator", "processes", "process"))
    args = argparse.Namespace(**chosen, **absent)
    assert commands.act(args, "sweep.py") == (0, {"finished": [], "failed": []})
    names = [task.name for task in seen]
    assert names[:3] == ["rates/low-seed0", "rates/high-seed0", "rates/short"] and names[3] == "others/low-seed0"
    assert {task.plan.unit.seed for task in seen[6:]} == {1} and len(names) == 10
    own = (str(other), f"--workdir={work / 'others'}", "--unit", "low-seed0")
    assert seen[3].command == (sys.executable, "sweep.py", "run", *own)
    assert (work / "rates/shared").resolve() == (work / "others/shared").resolve() == work / "shared"
    args.files = [sweep_file, sweep_file]
    with pytest.raises(ConfigError, match="two files with the same name would use the same folder"):
        commands.act(args, "sweep.py")


def test_units_of_two_sweeps_make_a_common_stage_once(planned: list[Plan], tmp_path: Path):
    queue = []
    for name in ("one", "two"):
        queue += tasks(tmp_path / name, planned)
        share(tmp_path / name, tmp_path / "shared")
    assert len(Scheduler(3, print).run(queue)["finished"]) == 10
    made = [event for name in ("one", "two") for event in events(tmp_path / name) if event[0].startswith("made-")]
    assert len(made) == len({link for plan in planned for link in plan.stages})


@pytest.mark.parametrize(
    "visible, slot, jobs, gpus, memory",
    [
        ("0,1,2,3,4", 1, 2, "2,3", None),
        ("0,1", 2, 3, "0", "0.3750"),  # two on the first of two
        ("0", 1, 2, "0", "0.3750"),
        ("", 0, 4, None, "0.1875"),  # whatever JAX finds
        ("", 0, 1, None, None),
        ("3", 0, 1, "3", None),
    ],
)
def test_jobs_share_gpus_and_their_memory(visible: str, slot: int, jobs: int, gpus: str | None, memory: str | None):
    share = share_of_gpus({"CUDA_VISIBLE_DEVICES": visible}, slot, jobs)
    wanted = {"CUDA_VISIBLE_DEVICES": gpus, "XLA_PYTHON_CLIENT_MEM_FRACTION": memory}
    assert share == {key: value for key, value in wanted.items() if value is not None}


@pytest.mark.parametrize("key", ["XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"])
def test_memory_that_somebody_chose_stays(key: str):
    assert share_of_gpus({"CUDA_VISIBLE_DEVICES": "", key: "0.1"}, 0, 4) == {}


def test_last_lines(tmp_path: Path):
    (tmp_path / "log").write_bytes(b"first\nlast \xff\n\n")
    assert last_line(tmp_path / "log") == "last �" and last_line(tmp_path / "none") == ""


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (76, True), (1, False)])
def test_the_array_job_runs_units_and_queues_preempted_ones_again(tmp_path: Path, code: int, requeued: bool):
    command = ["python", "sweep.py", "run", "my sweep.py", "--index"]
    script = slurm.write_script(tmp_path / "work", "rates", 5, command, 2, ["--gpus-per-node=8"])
    text = script.read_text()
    assert "#SBATCH --array=0-4%2\n" in text and "#SBATCH --gpus-per-node=8\n" in text
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, end in (("srun", code), ("scontrol", 0)):
        (programs / name).write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\nexit {end}\n')
        (programs / name).chmod(0o755)
    env = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "77"}
    assert subprocess.run(["bash", str(script)], env=env).returncode == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].endswith("python sweep.py run my sweep.py --index 3")
    assert calls[1:] == (["requeue 77_3"] if requeued else [])


def test_handing_in_without_sbatch_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="sbatch is not installed on this machine"):
        slurm.submit(tmp_path / "sweep.sbatch")
