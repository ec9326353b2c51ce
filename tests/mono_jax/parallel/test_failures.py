"""A run one of whose processes is lost, or has an error that the others do not have."""

from __future__ import annotations

import resource
import signal
import time

import pytest

from mono_jax.parallel.watch import PEER_LOST
from tests.mono_jax.parallel.clusters import Cluster, assert_same_run, clusters, config, records, write_config
from tests.mono_jax.parallel.hosts import hosts
from tests.mono_jax.runs.test_stage import settings

__all__ = ["clusters", "config"]  # fixtures that pytest looks up by name

BROKEN = """
import os
if os.environ.get("BROKEN"):
    from data_pipelines.errors import StorageError
    from data_pipelines.loading.packed_data import PackedData
    whole = PackedData.iterate

    def iterate(self, start_step=0, rows=None):
        for number, batch in whole(self, start_step, rows):
            if number == int(os.environ["BROKEN"]):
                raise StorageError(["pictures"], "the disk does not answer")
            yield number, batch

    PackedData.iterate = iterate
"""


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_when_one_is_lost_the_others_say_which_and_end(config, tmp_path, clusters, victim: int, how: int):
    clusters.append(Cluster(config, tmp_path / "run", 2, ["--config.steps=100000"]))
    cluster, other = clusters[-1], 1 - victim
    cluster.wait_for_step(8)
    cluster.processes[victim].send_signal(how)
    lost = time.monotonic()
    assert cluster.processes[other].wait(timeout=100) == PEER_LOST, cluster.said(other)
    assert time.monotonic() - lost < 90  # 60 on an idle machine
    [error] = cluster.errors(other)
    assert f"process {victim} on" in error


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "step"), [(0, 6), (1, 6), (1, 0), (1, 11)])
def test_an_error_of_the_data_of_one_ends_all_saved(sets, tmp_path, clusters, victim: int, step: int):
    """No earlier step is lost or repeated: the resumed run equals the one that never stopped."""
    values = settings(sets, steps=12, checkpoint_every=100, data={"batch_size": 8}, mesh={})
    config = write_config(tmp_path / "config.py", values, BROKEN)
    clusters.append(Cluster(config, tmp_path / "run", 2, variables={victim: {"BROKEN": str(step)}}))
    codes = clusters[-1].wait()
    errors = [clusters[-1].errors(number) for number in range(2)]
    assert codes[victim] == 1 and codes[1 - victim] == 2, clusters[-1].said(0) + clusters[-1].said(1)
    assert [len(lines) for lines in errors] == [1, 1] and all("the disk does not answer" in e[0] for e in errors)
    assert f"process {victim} on host" in errors[1 - victim][0] and "; saved: " in errors[1 - victim][0]
    saved = [int(folder.name) for folder in (tmp_path / "run/checkpoints").iterdir()]
    assert saved == [step]
    for name, count in (("run", 2), ("whole", 1)):
        clusters.append(Cluster(config, tmp_path / name, count))
        assert clusters[-1].wait() == [0] * count, clusters[-1].said(0)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_save_that_fails_on_one_fails_on_all_and_the_run_goes_on(sets, tmp_path, clusters):
    """Process 1 may write only small files for a while."""
    values = settings(sets, steps=40, checkpoint_every=4, keep=20, data={"batch_size": 8}, mesh={})
    config = write_config(tmp_path / "config.py", values)
    clusters.append(Cluster(config, tmp_path / "run", 2))
    cluster = clusters[-1]
    cluster.wait_for_step(6)
    pid = cluster.processes[1].pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (8192, before[1]))
    for _ in range(600):
        if "was not saved" in cluster.said(0) or cluster.processes[0].poll() is not None:
            break
        time.sleep(0.1)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    assert cluster.wait() == [0, 0], cluster.said(0) + cluster.said(1)
    [line, *_] = [line for line in cluster.said(0).splitlines() if "was not saved" in line]
    assert "process 1 on host" in line and "failed saves so far: 1" in line
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(1, 41))
    assert (tmp_path / "run/checkpoints/40/checksums.1.json").is_file()
    clusters.append(Cluster(config, tmp_path / "whole", 1))
    assert clusters[-1].wait() == [0]
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_host_that_is_cut_off_is_named_and_the_rest_resumes(config, tmp_path, clusters):
    """Separate hosts, and no connection is closed. Both sides notice; one host can resume from the checkpoint."""
    with hosts(2) as two:
        clusters.append(Cluster(config, tmp_path / "run", 2, ["--config.steps=100000"], hosts=two))
        cluster = clusters[-1]
        cluster.wait_for_step(8)
        two.cut_off(1)
        cut = time.monotonic()
        assert cluster.wait() == [PEER_LOST] * 2, cluster.said(0) + cluster.said(1)
        assert time.monotonic() - cut < 90  # 60 on an idle machine
    for number in range(2):
        [error] = cluster.errors(number)
        assert f"process {1 - number} on host {two.addresses[1 - number]} has not been heard from" in error
    done = max(int(folder.name) for folder in (tmp_path / "run/checkpoints").iterdir() if folder.name.isdigit())
    clusters.append(Cluster(config, tmp_path / "run", 1, [f"--config.steps={done + 2}"]))
    assert clusters[-1].wait() == [0] and f"resuming S1.1 at step {done}" in clusters[-1].said(0)
