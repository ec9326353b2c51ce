"""Runs whose workdir is a bucket: resumed on other machines, read by all commands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from mono_jax import tree
from mono_jax.errors import CheckpointError
from mono_jax.runs.config import RunConfig
from mono_jax.runs.stage import run_stage
from mono_jax.runs.workdir import looked_at, opened
from mono_jax.storage import lease
from mono_jax.training import goodput, loop
from mono_jax.training.callbacks.evaluating import Evaluating
from mono_jax.weights.model_folder import load_model

pytestmark = pytest.mark.usefixtures("one_device")


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing more is printed or saved."""


def settings(folder: Path, golden_dir: Path, **changes: Any) -> RunConfig:
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text("\n".join(f"line {n} of some text to learn" for n in range(400)))
    source = {"name": "text", "spec": {"kind": "text", "paths": str(folder / "*.txt")}}
    data = {"sources": [source], "tokenizer": str(golden_dir / "chat"), "batch_size": 2, "text_tokens": 32}
    data |= changes.pop("data", {})
    model = {"preset": "tiny_lm", "vocab_size": 1000, "hidden_size": 32}
    values = {"stage": "S0", "steps": 6, "model": model, "dtype": "float32", "log_every": 1, "checkpoint_every": 2}
    return RunConfig.from_dict(values | {"data": data | {"visual_tokens": 0, "block_samples": 64}} | changes)


def train(
    run: RunConfig, url: str | Path, said: list[str], after: Mapping[int, Callable[[], None]] = MappingProxyType({})
) -> dict[str, Any]:
    """``after`` maps a step to what happens after it."""
    after_step = loop.after_step

    def followed(progress, callbacks):
        after_step(progress, callbacks)
        after.get(progress.done, lambda: None)()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "after_step", followed)
        with opened(str(url), say=said.append) as workdir:
            return run_stage(run, workdir, say=said.append)


def die() -> None:
    raise Killed


def losses(metrics: str) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in map(json.loads, metrics.splitlines())]


def test_a_run_goes_on_on_another_machine(bucket, golden_dir, tmp_path, monkeypatch):
    run, said = settings(tmp_path / "data", golden_dir, compilation_cache=str(tmp_path / "programs")), []
    expected = train(run, tmp_path / "run", said)
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "one"))
    with pytest.raises(Killed):
        train(run, str(bucket), said, {5: die})
    assert (bucket / "checkpoints/4/checksums.json").is_file()
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "other"))
    said.clear()
    result = train(run, str(bucket), said)
    assert f"resuming S0 at step 4 from {bucket}/checkpoints" in said
    assert result["model"] == f"{bucket}/model" and result["step"] == 6
    found = losses((bucket / "metrics.jsonl").read_text())
    np.testing.assert_allclose(np.array(found), losses((tmp_path / "run/metrics.jsonl").read_text()), rtol=0, atol=0)
    (_, one), (_, two) = load_model(result["model"]), load_model(expected["model"])
    assert all(
        np.array_equal(a, b) for a, b in zip(tree.flatten(one).values(), tree.flatten(two).values(), strict=True)
    )
    names = {name.partition("/")[0] for name in bucket.objects()}
    assert names == {"checkpoints", ".checkpointed", "config.json", "config.initial.json", "metrics.jsonl", "model",
                     "tensorboard", "timeline.jsonl"}  # fmt: skip
    assert not Path("gs:").exists() and not Path("s3:").exists()
    with looked_at(str(bucket)) as files:
        measured = goodput.measure(files)
    assert (measured["steps"], measured["starts"]) == (6, 2)
    said.clear()
    assert train(run, str(bucket), said)["loss"] == result["loss"]  # finished: nothing is trained
    assert not any(line.startswith("compiling") for line in said)


@pytest.mark.parametrize("step", [1, 3])
def test_the_best_model_is_in_the_bucket(bucket, golden_dir, tmp_path, monkeypatch, step: int):
    """An earlier one, and the last one."""
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Evaluating, "_is_better", lambda self, values: step == 3 or self.best is None)
    evaluation = {"every": 1, "sources": {"text": str(tmp_path / "data/a.txt")}, "batches": 2}
    evaluation["keep_best"] = "heldout/text"
    result = train(settings(tmp_path / "data", golden_dir, evaluation=evaluation, steps=3), str(bucket), [])
    best = result["best"]
    assert best["model"] == f"{bucket}/best" and best["step"] == step
    assert json.loads((bucket / "best/step.json").read_text())["step"] == step
    (_, one), (_, two) = load_model(best["model"]), load_model(result["model"])
    same = all(np.array_equal(a, b) for a, b in zip(tree.flatten(one).values(), tree.flatten(two).values()))
    assert same == (step == 3)


@pytest.mark.slow
@pytest.mark.parametrize("away", ["checkpoints/4", "metrics.jsonl", "model/"])
def test_a_save_that_storage_does_not_take_is_made_later(bucket, stores, golden_dir, tmp_path, monkeypatch, away):
    """A checkpoint, its records, or, at the end, the model, which the next start writes."""
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))
    impatient = {"async_checkpoints": False, "data": {"retries": 0, "storage_wait_s": 0}}
    run, said, store = settings(tmp_path / "data", golden_dir, **impatient), [], stores(bucket.scheme)

    def refuse() -> None:
        store.fault = lambda method, path: 503 if method in ("PUT", "POST") and away in path else None

    def serve() -> None:
        store.fault = lambda method, path: None

    if away == "model/":
        with pytest.raises(CheckpointError, match=f"{bucket}/model: the model was not saved: .*HTTP 503"):
            train(run, str(bucket), said, {5: refuse})
        serve()
        assert train(run, str(bucket), said)["step"] == 6
        assert "resuming S0 at step 6" in " ".join(said)
    else:
        assert train(run, str(bucket), said, {3: refuse, 5: serve})["failed_saves"] == 1
        assert any(line.startswith(f"{bucket}/checkpoints: step 4 was not saved: ") for line in said)
        assert not (bucket / "checkpoints/4/checksums.json").is_file()
    assert [step for step, _ in losses((bucket / "metrics.jsonl").read_text())] == [1, 2, 3, 4, 5, 6]
    assert (bucket / "checkpoints/6/checksums.json").is_file() and load_model(bucket)


@pytest.mark.slow
def test_a_run_that_loses_its_workdir_stops_and_writes_nothing_more(bucket, golden_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lease, "BEAT", 0.05)
    other = json.dumps({"id": "x", "pid": 1, "host": "elsewhere", "since": "today"})

    def take_over() -> None:
        (bucket / ".lock").write_text(other)
        time.sleep(1.0)  # many beats: it is noticed, and asks the run to stop

    run = settings(tmp_path / "data", golden_dir, steps=100, async_checkpoints=False)
    with pytest.raises(CheckpointError, match=f"{bucket}: taken over by pid 1 on host elsewhere since today"):
        train(run, str(bucket), [], {3: take_over})
    assert (bucket / ".lock").read_text() == other
    assert {name.split("/")[1] for name in bucket.objects() if name.endswith("checksums.json")} == {"2"}
