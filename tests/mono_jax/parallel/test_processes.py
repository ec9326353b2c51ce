"""Runs of several real processes: equal to one process on every mesh, stopped together, resumed by any number."""

from __future__ import annotations

import signal

import pytest

from mono_jax.training.callbacks.stopping import PREEMPTED
from tests.mono_jax.parallel.clusters import Cluster, assert_same_run, clusters, config

__all__ = ["clusters", "config"]  # fixtures that pytest looks up by name
MESHES = {"data": (4, 1, 1), "fsdp": (1, 4, 1), "tensor": (1, 1, 4), "fsdp_tensor": (1, 2, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("mesh", MESHES)
def test_any_number_of_processes_trains_alike_on_any_mesh(config, tmp_path, clusters, mesh, processes):
    axes = [f"--config.mesh.{a}={size}" for a, size in zip(("data", "fsdp", "tensor"), MESHES[mesh])]
    for name, count in (("one", 1), ("several", processes)):
        clusters.append(Cluster(config, tmp_path / name, count, axes))
        assert clusters[-1].wait() == [0] * count, clusters[-1].said(0)
    assert_same_run(tmp_path / "one", tmp_path / "several")
    assert clusters[-1].said(0).count("done: step") == 1 and "step 1/" not in clusters[-1].said(1)
    assert (tmp_path / "several/logs/process-1.log").is_file()


@pytest.mark.slow
def test_all_stop_when_one_is_asked_and_any_number_resumes(config, tmp_path, clusters):
    """SIGTERM reaches one process of two; then one resumes, then four finish."""
    long = ["--config.steps=40"]
    clusters.append(Cluster(config, tmp_path / "whole", 1, long))
    assert clusters[-1].wait() == [0]
    for count, ends in ((2, 8), (1, 16), (4, None)):
        clusters.append(Cluster(config, tmp_path / "parts", count, long))
        if ends:
            clusters[-1].wait_for_step(ends)
            clusters[-1].processes[-1].send_signal(signal.SIGTERM)
        codes = clusters[-1].wait()
        assert codes == [PREEMPTED if ends else 0] * count, clusters[-1].said(0)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
