"""The commands on workdirs, models and data in buckets, as separate processes: killed, resumed elsewhere."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mono_jax import tree
from mono_jax.cli import USER_ERROR
from mono_jax.storage.places import Place
from mono_jax.weights.model_folder import open_model
from tests.devices import simulated
from tests.mono_jax.parallel.clusters import ROOT, write_config
from tests.mono_jax.runs.test_stage import settings
from tests.stores import Store

pytestmark = pytest.mark.slow


class Machine:
    """Where commands run: with a separate cache folder, and so a separate local copy of the workdir."""

    def __init__(self, store: Store, folder: Path, name: str):
        self._log, self._place = folder / f"{name}.log", folder / name
        self._env = {**os.environ, **store.environment, "MONO_JAX_CACHE": str(self._place), "PYTHONPATH": str(ROOT)}
        self._env |= {"XLA_FLAGS": simulated(2)}

    def start(self, *line: str) -> subprocess.Popen[str]:
        with self._log.open("w") as output:
            command = [sys.executable, f"experiments/{line[0]}", *line[1:]]
            return subprocess.Popen(command, env=self._env, cwd=ROOT, stdout=output, stderr=output, text=True)

    def run(self, *line: str) -> str:
        """The command's output; it must succeed."""
        assert self.start(*line).wait(timeout=900) == 0, self.said()
        return self.said()

    def said(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str, process: subprocess.Popen[str]) -> None:
        for _ in range(6000):
            if re.search(pattern, self.said()):
                return
            assert process.poll() is None, self.said()
            time.sleep(0.1)
        raise TimeoutError(self.said())


@pytest.fixture(params=["s3", "gs"])
def store(request, stores) -> Any:
    with stores(request.param).found() as found:
        yield found


def records(metrics: str) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, metrics.splitlines())]


def assert_same(one: Place, other: Place, rtol: float = 0.0) -> None:
    np.testing.assert_allclose(*(np.array(records((w / "metrics.jsonl").read_text())) for w in (one, other)), rtol=rtol)
    flat = [tree.flatten(open_model(workdir / "model")[1]) for workdir in (one, other)]
    for path, leaf in flat[0].items():
        np.testing.assert_allclose(np.asarray(flat[1][path]), np.asarray(leaf), rtol=0, atol=rtol, err_msg=path)


def test_a_killed_run_goes_on_elsewhere_and_its_model_is_used(store, sets, tmp_path):
    """Trained from data in the bucket if the package for it is installed; asked, converted, and asked again."""
    values = settings(sets, steps=600, checkpoint_every=20, data={"batch_size": 4}, mesh={})
    config, url = write_config(tmp_path / "config.py", values), store.folder(tmp_path.name)
    Machine(store, tmp_path, "local").run("train.py", f"--config={config}", f"--workdir={tmp_path / 'local_run'}")
    first, second = (Machine(store, tmp_path, name) for name in ("first", "second"))
    process = first.start("train.py", f"--config={config}", f"--workdir={url / 'run'}")
    first.wait_for(r"step +2[1-9]/", process)
    refused = second.start("train.py", f"--config={config}", f"--workdir={url / 'run'}")
    assert refused.wait(timeout=300) == USER_ERROR
    assert f"{url}/run: in use by pid {process.pid} on host" in second.said() and "Traceback" not in second.said()
    process.send_signal(signal.SIGKILL)
    process.wait()
    said = second.run("train.py", f"--config={config}", f"--workdir={url / 'run'}")
    assert f"taken over from pid {process.pid}" in said
    assert re.search(rf"resuming S1.1 at step [0-9]+ from {url}/run/checkpoints", said)
    assert f"model in {url}/run/model" in said
    assert_same(tmp_path / "local_run", url / "run")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    answers = []
    second.run("convert.py", str(url / "run"), str(url / "hf"))
    for model in (tmp_path / "local_run", url / "run", url / "hf"):
        line = ["generate.py", f"--model={model}", "--prompt=What is this?", f"--image={tmp_path / 'red.png'}"]
        answers.append(json.loads(second.run(*line, "--json", "--max_new_tokens=8").splitlines()[-1])["text"])
    assert answers[0] == answers[1] == answers[2]


def test_evip_in_a_bucket(store, tmp_path):
    """Killed in its second stage; the report exists at the end, and a third start has nothing to do."""
    url, first, second = (store.folder(tmp_path.name), *(Machine(store, tmp_path, name) for name in ("a", "b")))
    line = ["evip.py", "--config=experiments/configs/demo.py:smoke", f"--workdir={url}"]
    process = first.start(*line)
    first.wait_for(r"S1.1 step 2/", process)
    process.kill()
    process.wait()
    said = second.run(*line)
    assert "finished: 4 steps" in said and f"report: {url}/report.md" in said
    assert set(json.loads((url / "s2/summary.json").read_text())) >= {"loss", "text_loss_after", "evaluation"}
    assert (url / "report.html").is_file() and (url / "s2/model/model.json").is_file()
    assert second.run(*line).count("finished: 4 steps") == 5


@pytest.mark.parametrize("mesh", [{"data": -1}, {"data": 1, "fsdp": -1}])
def test_hosts_without_a_common_disk(store, sets, tmp_path, mesh):
    """Two processes with separate folders share only the bucket; then a single process continues."""
    values = settings(sets, steps=12, checkpoint_every=4, data={"batch_size": 8}, mesh=mesh)
    config, url = write_config(tmp_path / "config.py", values), store.folder(tmp_path.name)
    Machine(store, tmp_path, "local").run("train.py", f"--config={config}", f"--workdir={tmp_path / 'local_run'}")

    def together(*options: str) -> tuple[list[Machine], list[subprocess.Popen[str]]]:
        hosts = [Machine(store, tmp_path, f"host{n}") for n in range(2)]
        joined = [f"--coordinator=localhost:{_free_port()}", "--processes=2"]
        line = ["train.py", f"--config={config}", f"--workdir={url}", *joined, *options]
        return hosts, [host.start(*line, f"--process={n}") for n, host in enumerate(hosts)]

    hosts, processes = together()
    hosts[0].wait_for(r"step +[67]/", processes[0])
    for process in processes:
        process.kill()
        process.wait()
    said = Machine(store, tmp_path, "alone").run(
        "train.py", f"--config={config}", f"--workdir={url}", "--config.steps=12"
    )
    assert f"resuming S1.1 at step 4 from {url}/checkpoints" in said
    assert_same(tmp_path / "local_run", url, rtol=1e-4)
    hosts, processes = together("--config.steps=12")  # finished: read by both
    assert [process.wait(timeout=600) for process in processes] == [0, 0], hosts[0].said() + hosts[1].said()
    lists = [name for name in url.objects() if re.fullmatch(r"checkpoints/4/checksums(\.1)?\.json", name)]
    assert len(lists) == 2  # each process wrote its own part of the checkpoint


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
