"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.devices import simulate


def pytest_configure(config: pytest.Config) -> None:
    """Eight devices, so that sharding is really tested; tests that need one use the first."""
    starts_workers = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not starts_workers:  # what it put into its environment would be theirs
        simulate(8)


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """For tests of runs, not meshes: compiling for one simulated device is fastest."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr("mono_jax.parallel.mesh.jax.devices", lambda *args: first)
        yield


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Numbers computed by running the public PyTorch release on tiny random weights (facts, not code)."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def sets_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of small demo sets (64-pixel pictures, 16 visual tokens each), built once."""
    pytest.importorskip("easy_vqa")
    from data_pipelines.recipes.demo.sets import build_demo_sets
    from data_pipelines.recipes.demo.sizes import DemoSizes

    folder = tmp_path_factory.mktemp("sets")
    sizes = dict.fromkeys(("s1_1", "s1_2", "s1_3", "s2", "heldout_captions", "heldout_questions"), 40)
    build_demo_sets(folder, sizes=DemoSizes(text_bytes=150_000, **sizes))
    return folder


@pytest.fixture(scope="session")
def sets(sets_dir: Path) -> dict[str, Any]:
    """Their manifest."""
    from data_pipelines.recipes.manifest import load_manifest

    return load_manifest(sets_dir)


# What no CI machine has: compilers and simulators of accelerators, Beam, which needs a separate environment, the
# language harness, vLLM, other clients and scorers, a browser and experiment trackers; and what a container may forbid,
# namely mounting a disk.
MAY_SKIP = (
    "tests/faults/test_full_disk.py",
    "tests/pallas_kernels/",
    "tests/mono_jax/runs/planning/",
    "tests/experiments/test_kernels_benchmark.py",
    "tests/mono_jax/training/callbacks/test_profiling.py",
    "tests/mono_jax/training/sinks/",
    "tests/mono_jax/models/test_attention.py::test_the_training_step_compiles",
    "tests/mono_jax/models/test_vision.py::test_intern_vit_has_no_scores",
    "tests/data_pipelines/jobs/test_building.py",
    "tests/data_pipelines/test_index.py::test_beam_makes_the_same_indices_and_resumes",
    "tests/mono_jax/evaluation/language/test_lm_eval.py",
    "tests/mono_jax/evaluation/published/",
    "tests/mono_jax/serving/api/test_page.py",
    "tests/mono_jax/serving/api/clients/",
    "tests/vllm_plugin/",
)


def _missing_in_ci(report: pytest.TestReport | pytest.CollectReport) -> bool:
    """Whether a test that CI relies on was skipped, because its requirements are not installed."""
    return report.skipped and os.environ.get("CI") == "true" and not report.nodeid.startswith(MAY_SKIP)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Makes a skipped test fail if CI relies on it."""
    report = yield
    if _missing_in_ci(report) and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped, which CI must not: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """The same for a whole test file."""
    report = yield
    if _missing_in_ci(report):
        report.outcome, report.longrepr = "failed", f"skipped, which CI must not: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def stores() -> Iterator[Any]:
    """(scheme) -> a loopback store of that kind, started when it is first requested."""
    import contextlib
    import functools

    from tests.stores import served

    with contextlib.ExitStack() as running:
        yield functools.cache(lambda scheme: running.enter_context(served(scheme)))


BUCKETS = ["s3", pytest.param("gs", marks=pytest.mark.slow)]


@pytest.fixture
def made_folder(stores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """(kind) -> a new folder: on "disk", or in a bucket ("s3", "gs")."""
    import contextlib

    from data_pipelines.io import storage

    monkeypatch.setattr(storage, "_patience", storage.Patience(1, 0.0, 0.01))
    with contextlib.ExitStack() as running:

        def make(kind: str) -> Any:
            return tmp_path if kind == "disk" else running.enter_context(stores(kind).found()).folder(tmp_path.name)

        yield make


@pytest.fixture(params=["disk", *BUCKETS])
def place(request: pytest.FixtureRequest, made_folder: Any) -> Any:
    """A new folder on disk or in a bucket."""
    return made_folder(request.param)


@pytest.fixture(params=BUCKETS)
def bucket(request: pytest.FixtureRequest, made_folder: Any) -> Any:
    """A new folder in a bucket."""
    return made_folder(request.param)
