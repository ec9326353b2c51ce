"""Runs of several real processes: equal to one process on every mesh, stopped together, resumed with any number."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from mono_jax.training.callbacks.stopping import PREEMPTED
from tests.devices import simulated
from tests.mono_jax.evaluation import small_benchmarks
from tests.mono_jax.parallel.clusters import (
    ROOT,
    Cluster,
    assert_same_run,
    assert_same_weights,
    clusters,
    config,
    records,
    write_config,
)
from tests.mono_jax.runs.test_stage import settings

__all__ = ["clusters", "config"]  # fixtures that pytest looks up by name
AXES = ("data", "fsdp", "tensor", "context")
MESHES = {
    "data": (4, 1, 1, 1),
    "fsdp": (1, 4, 1, 1),
    "tensor": (1, 1, 4, 1),
    "fsdp_tensor": (1, 2, 2, 1),
    "context": (1, 1, 1, 4),
    "fsdp_context": (1, 2, 1, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("mesh", MESHES)
def test_any_number_of_processes_trains_alike_on_any_mesh(config, tmp_path, clusters, mesh, processes):
    axes = [f"--config.mesh.{a}={size}" for a, size in zip(AXES, MESHES[mesh])]
    for name, count in (("one", 1), ("several", processes)):
        clusters.append(Cluster(config, tmp_path / name, count, axes))
        assert clusters[-1].wait() == [0] * count, clusters[-1].said(0)
    assert_same_run(tmp_path / "one", tmp_path / "several")
    assert clusters[-1].said(0).count("done: step") == 1 and "step 1/" not in clusters[-1].said(1)
    assert (tmp_path / "several/logs/process-1.log").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["SLURM", "Open MPI"])
def test_processes_find_each_other_by_what_their_launcher_says(config, tmp_path, clusters, launcher: str):
    """SLURM is simulated by the variables that srun sets; Open MPI processes are started by mpirun itself."""
    clusters.append(Cluster(config, tmp_path / "one", 1))
    assert clusters[-1].wait() == [0], clusters[-1].said(0)
    if launcher == "SLURM":
        job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
        job |= {"SLURM_STEP_TASKS_PER_NODE": "2"}
        tasks = {n: job | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(2)}
        clusters.append(Cluster(config, tmp_path / "several", 2, variables=tasks, flags=False))
        assert clusters[-1].wait() == [0, 0], clusters[-1].said(0) + clusters[-1].said(1)
    else:
        if not (mpirun := shutil.which("mpirun")):
            pytest.skip("no mpirun here")
        line = [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "experiments/train.py"]
        env = os.environ | {"XLA_FLAGS": simulated(2), "PYTHONPATH": str(ROOT)}
        command = [*line, f"--config={config}", f"--workdir={tmp_path / 'several'}"]
        said = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
        assert said.returncode == 0 and said.stdout.count("done: step") == 1, said.stdout + said.stderr
    assert_same_run(tmp_path / "one", tmp_path / "several")
    assert (tmp_path / "several/logs/process-1.log").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "parts"), [(4, ((2, 8), (1, 16), (4, None))), (12, ((4, 8), (3, 16), (4, None)))])
def test_all_stop_when_one_is_asked_and_any_number_resumes(sets, tmp_path, clusters, devices: int, parts):
    """SIGTERM reaches one process; another number of processes resumes with the very next batch."""
    values = settings(sets, steps=40, data={"batch_size": 2 * devices, "workers": 1}, mesh={})
    config = write_config(tmp_path / "config.py", values)
    clusters.append(Cluster(config, tmp_path / "whole", 1, devices=devices))
    assert clusters[-1].wait() == [0]
    for count, ends in parts:
        clusters.append(Cluster(config, tmp_path / "parts", count, devices=devices))
        if ends:
            clusters[-1].wait_for_step(ends)
            clusters[-1].processes[-1].send_signal(signal.SIGTERM)
        codes = clusters[-1].wait()
        assert codes == [PREEMPTED if ends else 0] * count, clusters[-1].said(0)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


SCORED = """
from experiments.configs import demo
def get_config():
    config = demo.get_config("smoke")
    config.scores = {"s1_2": "s0", "s1_3": "s1_2"}
    config.filters = {"s1_2": {"max_loss": "50%"}, "s1_3": {"min_sight": "25%"}}
    for stage in ("s1_3", "s2"):
        config.stages[stage].optim = {"learning_rate": 1e-3}
    return config
"""


@pytest.mark.slow
def test_evip_of_two_processes_is_that_of_one(tmp_path, clusters):
    """All stages: training, the loss on text between stages, the answers; only one process prints and writes.

    Both score samples: S1.2 trains on the half that the base finds easier, S1.3 on those that S1.2 sees best.
    """
    demo = tmp_path / "demo.py"
    demo.write_text(SCORED)
    stages = ("s0", "s1_1", "s1_2", "s1_3", "s2")
    # AdamW divides a gradient by its own size. Two processes add in another order than one, so gradients that are small
    # compared with the terms of their sum have a share of rounding errors, and their updates have the same share. With
    # eps 1e-8, 11 of S0's 2.0 M weights differ by more than 1e-5 after its four steps (their gradients are about
    # 1e-6), and 1.4 M of S2's 3.5 M after all stages, by up to what a stage moves them (7e-3); losses differ by
    # 2.5e-4, gradient norms by 3e-3. With eps 1e-2, weights move by up to 6e-3 in a stage and differ by 1.2e-7 in the
    # end. Muon, which the demo uses where attention trains, makes all directions of an update equally long, including
    # those of rounding errors, and has no eps: after S1.3, 16 of 147,456 weights of a matrix differed by up to 1.3e-5.
    options = [f"--config.stages.{name}.optim.eps=0.01" for name in stages]
    for name, count in (("one", 1), ("two", 2)):
        clusters.append(Cluster(demo, tmp_path / name, count, options, "evip.py"))
        assert clusters[-1].wait() == [0] * count, clusters[-1].said(0) + clusters[-1].said(count - 1)
    for stage in stages:
        assert_same_run(tmp_path / "one" / stage, tmp_path / "two" / stage, atol=1e-6)
        one, two = (json.loads((tmp_path / name / stage / "summary.json").read_text()) for name in ("one", "two"))
        assert two["text_loss_after"] == pytest.approx(one["text_loss_after"], abs=1e-5)
        assert two["data"]["samples"] == one["data"]["samples"] and two.get("evaluation") == one.get("evaluation")
    said = [clusters[-1].said(number) for number in range(2)]
    asked = [f"--model={tmp_path / 'two' / stages[-1]}", "--prompt=What is this?", "--max_new_tokens=12", "--json"]
    asked += ["--temperature=3", f"--image={next((tmp_path / 'two/data').rglob('*.png'))}"]
    for count in (1, 2):
        clusters.append(Cluster(None, tmp_path / f"asked_{count}", count, asked, "generate.py"))
        assert clusters[-1].wait() == [0] * count, clusters[-1].said(0)
    answers = [json.loads(cluster.said(0).splitlines()[-1])["text"] for cluster in clusters[-2:]]
    assert answers[0] == answers[1] and len(answers[0]) > 5 and "text" not in clusters[-1].said(1)
    assert said[0].count("report:") == 1 and "report:" not in said[1] and "held-out" not in said[1]
    for name in ("one", "two"):  # two stages of three sources
        assert len(list((tmp_path / name / "cache/scores").iterdir())) == 6
    # The first process has two sources of each stage.
    assert said[0].count(" samples scored by ") == 4 and "scored" not in said[1]


@pytest.mark.slow
def test_two_processes_measure_on_the_way_as_one_does(sets, tmp_path, clusters):
    """Losses, and the answers to a benchmark and to questions: both processes ask everything, on their common mesh."""
    text, questions = sets["heldout"]["text"], sets["heldout"]["questions"]
    evaluation = {"every": 3, "sources": {"text": text}, "batches": 2, "keep_best": "heldout/text", "examples": 2}
    evaluation["tasks"] = {
        "questions": {"path": questions["path"], "image_root": questions["image_root"], "max_new_tokens": 3},
        "pope": {"benchmark": "pope", "data": str(small_benchmarks.write(tmp_path)), "max_new_tokens": 2},
    }
    config = write_config(
        tmp_path / "config.py",
        settings(sets, evaluation=evaluation, data={"batch_size": 8}, mesh={"fsdp": 2, "tensor": 2}),
    )
    for name, count in (("one", 1), ("two", 2)):
        clusters.append(Cluster(config, tmp_path / name, count))
        assert clusters[-1].wait() == [0] * count, clusters[-1].said(0) + clusters[-1].said(count - 1)
    measured = ("heldout/", "tasks/")
    one, two = (
        {r["step"]: {key: r[key] for key in r if key.startswith(measured)} for r in records(tmp_path / name)}
        for name in ("one", "two")
    )
    assert [step for step in one if one[step]] == [step for step in two if two[step]] == [3, 6]
    assert {"heldout/text", "tasks/questions", "tasks/pope"} <= set(one[3])
    for step in (3, 6):
        assert two[step] == pytest.approx(one[step], abs=1e-5)
    said = [(tmp_path / name / "evaluation/answers.jsonl").read_text() for name in ("one", "two")]
    assert said[0] == said[1] and said[0].count("\n") == 2 * 2 * 2
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert_same_weights(tmp_path / "one/best", tmp_path / "two/best")
    assert json.loads((tmp_path / "two/best/step.json").read_text())["step"] == 3


@pytest.mark.slow
def test_a_run_goes_on_where_rows_are_shared_by_other_numbers_of_devices(config, tmp_path, clusters):
    """Rows are shared by two devices, then by none, then by all four; the last two are two processes."""
    long = ["--config.steps=40"]
    clusters.append(Cluster(config, tmp_path / "whole", 1, [*long, "--config.mesh.fsdp=4"]))
    assert clusters[-1].wait() == [0]
    for context, fsdp, count, ends in ((2, 2, 1, 8), (1, 4, 1, 16), (4, 1, 2, None)):
        mesh = [f"--config.mesh.context={context}", f"--config.mesh.fsdp={fsdp}"]
        clusters.append(Cluster(config, tmp_path / "parts", count, [*long, *mesh]))
        if ends:
            clusters[-1].wait_for_step(ends)
            clusters[-1].processes[-1].send_signal(signal.SIGTERM)
        assert clusters[-1].wait() == [PREEMPTED if ends else 0] * count, clusters[-1].said(0)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
