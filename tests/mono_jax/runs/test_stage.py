"""One stage through the public command: resuming, stopping, changed configs, bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from data_pipelines.batch import TileGeometry
from data_pipelines.errors import DataError
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.packing.plan import Plan
from mono_jax import tree
from mono_jax.checkpoints.manager import Checkpoints
from mono_jax.errors import CheckpointError, ConfigError
from mono_jax.models.transformer import Model
from mono_jax.runs.config import RunConfig
from mono_jax.runs.stage import run_stage
from mono_jax.training import goodput, loop, stages
from mono_jax.training.callbacks import stopping
from mono_jax.training.callbacks.profiling import may_trace
from mono_jax.training.groups import split
from mono_jax.weights.model_folder import load_model

pytestmark = pytest.mark.usefixtures("one_device")

INSIDE: dict[str, Any] = {"data": {"source_ids": True}}
VISION = {"hidden_size": 16, "patch_size": 8, "image_size": 64}


def settings(sets: dict[str, Any], stage: str = "S1.1", folder: str = "s1_1", **changes: Any) -> dict[str, Any]:
    data = {
        "sources": sets["stages"][folder]["sources"],
        "tokenizer": sets["tokenizer"],
        "system_message": "",
        "batch_size": 4,
        "visual_tokens": 32,
        "text_tokens": 96,
        "block_samples": 64,
    }
    model = {"preset": "tiny_mono", "vocab_size": 1035, "image_token_id": 1028, "vision": VISION, "hidden_size": 32}
    values = {"stage": stage, "steps": 6, "model": model, "dtype": "float32", "frozen_dtype": "float32"}
    values |= {"log_every": 1, "checkpoint_every": 2, "seed": 3, "mesh": {"data": 1, "fsdp": -1}}
    values |= changes
    return values | {"data": data | changes.get("data", {})}


def run(values: dict[str, Any], workdir: Path, said: list[str] | None = None) -> dict[str, Any]:
    return run_stage(RunConfig.from_dict(values), workdir, say=([] if said is None else said).append)


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())]


def same_weights(a: str, b: str) -> bool:
    one, two = (tree.flatten(load_model(folder)[1]) for folder in (a, b))
    return one.keys() == two.keys() and all(np.array_equal(one[path], two[path]) for path in one)


@pytest.fixture(scope="module")
def finished(sets: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    began, traced = time.monotonic(), may_trace()
    result = run(settings(sets, profile_steps=[2, 3], **INSIDE), workdir)
    return workdir, result | {"wall": time.monotonic() - began, "traced": traced}


def test_a_run_leaves_metrics_checkpoints_and_a_model(finished: tuple[Path, dict[str, Any]]):
    workdir, result = finished
    assert result["step"] == 6
    assert [step for step, _ in losses(workdir)] == [1, 2, 3, 4, 5, 6]
    assert result["loss"] == losses(workdir)[-1][1]
    record = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss", "grad_norm", "lr", "tokens_per_s", "mfu", "data_wait", "eta_s"} <= set(record)
    assert record["tokens_per_s"] > 0
    assert result["data"]["samples"] > 0
    config, params = load_model(result["model"])
    assert config.visual_ffn_experts
    assert (workdir / "model" / "tokenizer.model").is_file()
    # The frozen side is as initialised by the seed.
    _, frozen = split(stages.get_stage("S1.1"), config, params)
    before = tree.flatten(jax.jit(Model(config).init)(jax.random.key(3)))
    for path, leaf in tree.flatten(frozen).items():
        assert np.array_equal(leaf, before[path]), path


def test_tiles_made_on_the_device_train_the_same_weights(
    finished: tuple[Path, dict[str, Any]], sets: dict[str, Any], tmp_path: Path
) -> None:
    whole, result = finished
    device = {"pixel_path": "device", "crop_size": 256}
    again = run(settings(sets, data={**INSIDE["data"], **device}), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole)
    assert same_weights(result["model"], again["model"])


def test_records_show_what_happens_inside(finished: tuple[Path, dict[str, Any]], sets: dict[str, Any]):
    """Norms of trained groups, the loss per source, a trace; requesting them does not change the losses (see below)."""
    workdir, _ = finished
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = settings(sets)["data"]["sources"]
    names = list(names) if isinstance(names, dict) else [source["name"] for source in names]
    for record in records:
        trained = {name.partition("/")[2] for name in record if name.startswith("lr/")}
        for kind in ("grad_norm", "update_norm", "param_norm"):
            norms = {name.partition("/")[2]: value for name, value in record.items() if name.startswith(f"{kind}/")}
            assert norms.keys() == trained == set(stages.get_stage("S1.1").trains) and min(norms.values()) > 0
        weights = [record[f"weight/{name}"] for name in names]
        assert sum(weights) == pytest.approx(record["weight"])
        shares = [record[f"loss/{name}"] * weight for name, weight in zip(names, weights) if weight]
        assert sum(shares) / sum(weights) == pytest.approx(record["loss"], rel=1e-5)
        assert "memory_bytes" not in record, "a CPU does not tell"
    traces = [file.relative_to(workdir).parts[:2] for file in workdir.rglob("*.xplane.pb")]
    assert traces == ([("profile", "steps-2-3")] if finished[1]["traced"] else [])


def assert_all_time_is_known(workdir: Path, *results: dict[str, Any]) -> None:
    """The lines of the timeline sum up to what each process reported and to the time that passed."""
    processes: list[list[dict[str, Any]]] = []
    for line in (workdir / "timeline.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] == "start":
            processes.append([])
        processes[-1].append(entry)
    assert len(processes) == len(results)
    for entries, result in zip(processes, results):
        assert all(result["seconds"][name] for name in ("start", "data", "compile", "dispatch", "save", "finish"))
        for name, value in result["seconds"].items():
            assert sum(e["seconds"].get(name, 0) for e in entries) == pytest.approx(value, abs=1e-6 * len(entries))
        assert entries[-1]["event"] == "end" and entries[-1]["step"] == result["step"]
        shown = sum(sum(e["seconds"].values()) for e in entries[1:])
        assert entries[-1]["time"] - entries[0]["time"] == pytest.approx(shown, rel=0.01, abs=0.05)  # another clock


def test_the_time_of_a_run_is_known_to_the_last_moment(finished: tuple[Path, dict[str, Any]]):
    workdir, result = finished
    assert_all_time_is_known(workdir, result)
    passed = sum(result["seconds"].values())
    assert passed <= result["wall"] <= 1.02 * passed + 0.2  # the workdir is looked at and locked before
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for name, value in result["seconds"].items():
        assert sum(record[f"seconds/{name}"] for record in records) <= value + 1e-6
    assert sum(record["seconds/wait"] + record["seconds/dispatch"] for record in records) > 0


def test_resumed_equals_uninterrupted(
    sets: dict[str, Any],
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every_program_is_kept: None,
):
    workdir, said = tmp_path / "run", []
    values = settings(sets, compilation_cache=str(tmp_path / "programs"), **INSIDE)
    first = run(values, workdir)
    # As after a kill past step 4: the last checkpoint and the model are missing, later metrics still exist.
    shutil.rmtree(workdir / "checkpoints" / "6")
    shutil.rmtree(workdir / "model")
    # As on another machine without the cache: the counts of the plan come from the checkpoint.
    shutil.rmtree(workdir / "cache")
    restored = []
    monkeypatch.setattr(Plan, "restore", lambda plan, counts: restored.append(counts.tolist()))
    result = run(values, workdir, said)
    assert losses(workdir) == losses(finished[0])
    assert any(line.startswith("the step was compiled before") for line in said)
    ends = [json.loads(line) for line in (workdir / "timeline.jsonl").read_text().splitlines() if '"end"' in line]
    assert [end["compilation_cache"] for end in ends] == [first["compilation_cache"], result["compilation_cache"]]
    assert first["compilation_cache"]["added"] > 0 < result["compilation_cache"]["found"]
    assert_all_time_is_known(workdir, first, result)
    assert same_weights(result["model"], finished[1]["model"])
    counted = PackedData(RunConfig.from_dict(settings(sets)).data, workdir / "cache", TileGeometry(64, 16)).plan.counts
    assert restored == [counted[: len(restored[0])].tolist()] and sum(restored[0]) >= 4 * 4, "all rows up to step 4"


def test_data_workers_leave_the_plan_in_the_checkpoint_too(sets: dict[str, Any], tmp_path: Path):
    run(settings(sets, steps=2, data={"workers": 1}), tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert sum(checkpoints.metadata()["plan"]) >= 2 * 4


def test_rows_with_boundaries_of_their_own(sets: dict[str, Any], tmp_path: Path):
    """A mix whose visual share is not fixed, through the grouped kernels."""
    rows = {"boundary_block": 16, "visual_tokens": 96, "text_tokens": 80}
    with pytest.raises(ConfigError, match="experts='grouped'"):
        run(settings(sets, data=rows), tmp_path / "static")
    values = settings(sets, steps=2, data=rows)
    values["execution"] = {"experts": "grouped", "experts_block": 16}
    assert run(values, tmp_path / "run")["skipped_updates"] == 0
    first, second = losses(tmp_path / "run")
    assert second[1] < first[1]


def test_data_that_ends_first_ends_the_run_saved(sets: dict[str, Any], tmp_path: Path):
    data = {"epochs": 1, "batch_size": 64, "block_samples": 1024}
    with pytest.raises(loop.DataEnded, match=r"raise data\.epochs"):
        run(settings(sets, steps=10_000, checkpoint_every=10_000, data=data), tmp_path / "steps")
    steps = len(losses(tmp_path / "steps"))
    with Checkpoints(tmp_path / "steps" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [steps]
    whole = settings(sets, epochs=1.0, data=data)
    del whole["steps"]
    assert run(whole, tmp_path / "epochs")["step"] == steps


def test_running_a_finished_stage_again_does_nothing(finished: tuple[Path, dict[str, Any]], sets: dict[str, Any]):
    workdir, result = finished
    before = (workdir / "model" / "model.json").stat().st_mtime_ns
    again = run(settings(sets), workdir, said := [])
    assert "compiling the step ..." not in said
    assert (again["step"], again["loss"]) == (result["step"], result["loss"])
    assert (workdir / "model" / "model.json").stat().st_mtime_ns == before


def test_a_changed_config_is_printed_and_refused_where_it_matters(
    finished: tuple[Path, dict[str, Any]], sets: dict[str, Any]
):
    workdir, result = finished
    lines: list[str] = []
    values = settings(sets, optim={"learning_rate": 0.5}, log_every=2)
    run_stage(RunConfig.from_dict(values), workdir, say=lines.append)
    assert any("optim.learning_rate was None, now 0.5" in line for line in lines)
    with pytest.raises(ConfigError, match=r"data\.seed.*allow_changes"):
        run(settings(sets, data={"seed": 9}), workdir)
    with pytest.raises(ConfigError, match=r"stage.*allow_changes"):
        run(settings(sets, stage="S2"), workdir)
    kept = (workdir / "config.json").read_bytes()
    done = result["step"]
    message = rf"config\.steps: .* end after {done - 1} steps, but .*checkpoints has {done}"
    with pytest.raises(ConfigError, match=message):
        run(settings(sets, steps=done - 1), workdir)
    with pytest.raises(ConfigError, match=r"stage.*allow_changes"):  # of another run, which is not to lose anything
        run(settings(sets, steps=done - 1, stage="S2"), workdir)
    assert (workdir / "config.json").read_bytes() == kept


def test_the_next_stage_starts_from_the_model_of_the_last(
    finished: tuple[Path, dict[str, Any]], sets: dict[str, Any], tmp_path: Path
):
    values = settings(sets, "S1.3", "s1_3", init=finished[1]["model"], model={}, steps=1)
    result = run(values, tmp_path / "next", said := [])
    (needs,) = (line for line in said if line.startswith("attention "))
    assert re.fullmatch(r"attention xla, experts static, remat none, float32, 0\.\d GiB", needs)
    before = tree.flatten(load_model(finished[1]["model"])[1])
    after = tree.flatten(load_model(result["model"])[1])
    assert np.array_equal(before["layers/feed_forward/gate/kernel"], after["layers/feed_forward/gate/kernel"])
    assert not np.array_equal(before["layers/attention/wqkv/kernel"], after["layers/attention/wqkv/kernel"])


def test_bad_configs_name_the_key(sets: dict[str, Any], tmp_path: Path):
    def refused(message: str, error: type[Exception] = ConfigError, **changes: Any) -> None:
        with pytest.raises(error, match=message):
            run(settings(sets, **changes), tmp_path / "refused")

    refused("did you mean 'log_every'", log_evry=1)
    refused("did you mean 'batch_size'", DataError, data={"batch": 1})
    refused(r"config\.steps is 'many'", steps="many")
    refused("did you mean 'S1.2'", stage="S12")
    refused("did you mean 'bfloat16'", dtype="float16")
    refused("unknown key 'token_pixels'", DataError, data={"token_pixels": 8})
    refused("vocabulary has 64", model={"preset": "tiny_mono", "vocab_size": 64, "vision": VISION})
    refused("no such folder", Exception, init=str(tmp_path / "absent"))
    refused("mesh", mesh={"data": 3})
    refused(r"config\.steps and config\.epochs: give one", epochs=1.0)
    refused("does not train", optim={"groups": {"attention": {"learning_rate": 1e-3}}})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        run(settings(sets), foreign)


CONFIG = """
import json
from ml_collections import ConfigDict
def get_config():
    return ConfigDict(json.loads({values!r}))
"""


def command(values: dict[str, Any], tmp_path: Path, *more: str) -> list[str]:
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(values=json.dumps(values)))
    return [sys.executable, "experiments/train.py", f"--config={file}", f"--workdir={tmp_path / 'run'}", *more]


def environment() -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def test_sigterm_saves_and_the_same_command_goes_on(
    sets: dict[str, Any], finished: tuple[Path, dict[str, Any]], tmp_path: Path
):
    values = settings(sets, steps=5000, checkpoint_every=5000)
    began = time.time()
    process = subprocess.Popen(command(values, tmp_path), env=environment(), stderr=subprocess.PIPE, text=True)
    file = tmp_path / "run" / "metrics.jsonl"
    give_up = time.monotonic() + 240
    while not (file.exists() and len(file.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < give_up, "no progress"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == stopping.PREEMPTED, errors
    assert "run the same command again" in errors
    with Checkpoints(tmp_path / "run" / "checkpoints") as saved:
        stopped = saved.steps()[-1]
    assert stopped >= 3
    done = subprocess.run(
        command(values, tmp_path, f"--config.steps={stopped + 1}", "--json"),
        env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step"] == stopped + 1
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, stopped + 2))
    measured = goodput.measure(tmp_path / "run")
    assert sum(measured["seconds"].values()) == pytest.approx(measured["wall_s"], rel=0.005)
    assert measured["wall_s"] < time.time() - began and (measured["starts"], measured["kills"]) == (2, 0)
    assert all(measured["seconds"][name] > 0 for name in ("productive", "compile", "checkpoint", "restart"))


def test_the_command_ends_bad_input_in_one_line(sets: dict[str, Any], tmp_path: Path):
    done = subprocess.run(
        command(settings(sets), tmp_path, "--config.optim.learnin_rate=1"),
        env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean 'learning_rate'" in done.stderr
