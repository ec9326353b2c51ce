"""Units as processes: how many at once, which may start, what failed, signals; the array job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mono_jax.errors import ClusterError
from mono_jax.runs.sweeping import slurm
from mono_jax.runs.sweeping.chain import Plan, plans
from mono_jax.runs.sweeping.schedule import Scheduler, last_line, share_of_gpus
from mono_jax.runs.sweeping.status import state_of
from mono_jax.runs.sweeping.units import read_sweep
from mono_jax.training.callbacks.stopping import Preempted

# Stands for sweep.py run: makes the unit's stages one after another, as its plan in plans.json says.
WORKER = """
import json, os, sys, time
workdir, name = sys.argv[1], sys.argv[2]
plan = json.load(open(workdir + "/plans.json"))[name]
def note(event):
    with open(workdir + "/events.txt", "a") as file:
        file.write(f"{event} {name} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
note("start")
if name == plan["fails"]:
    print("some line"); print("ValueError: no luck", file=sys.stderr); sys.exit(1)
for folder, digest in plan["stages"].items():
    done = f"{workdir}/shared/{folder}-{digest}/summary.json"
    if not os.path.exists(done):
        time.sleep(plan["seconds"])
        os.makedirs(os.path.dirname(done), exist_ok=True)
        open(done + ".part", "w").write("{}")
        os.rename(done + ".part", done)
        note("made-" + folder)
json.dump({"stages": plan["stages"], "metrics": {}}, open(f"{workdir}/units/{name}/result.json", "w"))
note("end")
"""


@pytest.fixture
def planned(sweep_file: Path) -> list[Plan]:
    return plans(read_sweep(sweep_file))


def scheduler(workdir: Path, planned: list[Plan], jobs: int, seconds: float = 0.05, fails: str = "") -> Scheduler:
    workdir.mkdir(exist_ok=True)
    described = {
        plan.unit.name: {"stages": {s.folder: s.digest for s in plan.stages}, "seconds": seconds, "fails": fails}
        for plan in planned
    }
    (workdir / "plans.json").write_text(json.dumps(described))
    return Scheduler(workdir, [sys.executable, "-c", WORKER, str(workdir)], jobs, print)


def events(workdir: Path) -> list[list[str]]:
    return [line.split() for line in (workdir / "events.txt").read_text().splitlines()]


def test_several_at_once_and_nothing_twice(planned: list[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    workdir = tmp_path / "work"
    outcome = scheduler(workdir, planned, jobs=2).run(planned)
    assert sorted(outcome["finished"]) == sorted(plan.unit.name for plan in planned) and outcome["failed"] == []
    active, most, made = set(), 0, []
    for event, name, gpus in events(workdir):
        assert gpus in ("4,5", "6,7")
        (active.add if event == "start" else active.discard if event == "end" else made.append)(name)
        most = max(most, len(active))
    stages = {link for plan in planned for link in plan.stages}
    assert most == 2 and len(made) == len(stages), "each shared stage is made once"
    started = len(events(workdir))
    assert len(scheduler(workdir, planned, jobs=2).run(planned)["finished"]) == 5
    assert len(events(workdir)) == started, "finished units are left alone"


def test_failures_are_named_and_tried_again(planned: list[Plan], tmp_path: Path):
    workdir = tmp_path / "work"
    outcome = scheduler(workdir, planned, jobs=1, fails="high-seed0").run(planned)
    assert outcome["failed"] == ["high-seed0"] and len(outcome["finished"]) == 4
    state = state_of(workdir, planned[2])
    assert (state.state, state.note) == ("failed", "ValueError: no luck")
    assert scheduler(workdir, planned, jobs=1).run(planned)["failed"] == []


def test_a_signal_ends_the_units_and_the_next_start_goes_on(planned: list[Plan], tmp_path: Path):
    workdir = tmp_path / "work"

    def stop() -> None:
        while not (workdir / "events.txt").is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(Preempted, match="0 of 5 units finished: run again"):
        scheduler(workdir, planned, jobs=2, seconds=600).run(planned)
    assert len(scheduler(workdir, planned, jobs=3, seconds=0).run(planned)["finished"]) == 5


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
    with pytest.raises(ClusterError, match="sbatch is not on this machine"):
        slurm.submit(tmp_path / "sweep.sbatch")
