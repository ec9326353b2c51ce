"""Held-out loss during a run, and the checkpoint of the best step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from data_pipelines.config import DataConfig
from data_pipelines.errors import StorageError
from data_pipelines.loading.packed_data import PackedData
from mono_jax.errors import ConfigError, PeerError
from mono_jax.evaluation.heldout import HeldoutLoss, HeldoutSources
from mono_jax.models.transformer import Model
from mono_jax.runs.config import RunConfig
from mono_jax.weights.model_folder import load_model
from tests.mono_jax.peers import Peers
from tests.mono_jax.runs.test_stage import run, same_weights, settings

pytestmark = pytest.mark.usefixtures("one_device")


def configured(sets: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """In S1.1 the text ability is frozen: the loss on text stays as it is, so the first evaluation is the best."""
    text, pairs = sets["heldout"]["text"], sets["stages"]["s1_2"]["sources"][0]["spec"]
    evaluation = {"every": 3, "sources": {"text": text, "pairs": pairs}, "batches": 2, "keep_best": "text"}
    return settings(sets, steps=8, keep=2, evaluation=evaluation | changes)


def measured(workdir: Path) -> dict[int, tuple[float, float]]:
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: (r["heldout/text"], r["heldout/pairs"]) for r in records if "heldout/text" in r}


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit())


@pytest.fixture(scope="module")
def finished(sets: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, run(configured(sets), workdir)


def test_losses_are_recorded_and_the_best_checkpoint_stays(finished: tuple[Path, dict[str, Any]]) -> None:
    workdir, result = finished
    found = measured(workdir)
    assert list(found) == [3, 6, 8]
    assert len({text for text, _ in found.values()}) == 1, "what is frozen does not move"
    assert len({pairs for _, pairs in found.values()}) == 3
    assert result["best"] == {"metric": "heldout/text", "step": 3, "value": found[3][0]}
    assert checkpoints(workdir) == [3, 6, 8]


def test_the_value_is_that_of_the_model(
    sets: dict[str, Any], finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Measured again from the model folder, on batches read one by one."""
    workdir, result = finished
    config, params = load_model(result["model"])
    values = configured(sets)["data"]
    spec = {"kind": "text", "paths": sets["heldout"]["text"]}
    values |= {"sources": [{"name": "text", "spec": spec}], "shuffle": "none", "seed": 0, "epochs": 1}
    data = PackedData(DataConfig.from_dict(values), tmp_path, config.geometry)
    loss = HeldoutLoss(Model(config), jnp.float32)(params, {}, [data.batch(0), data.batch(1)])
    assert loss == pytest.approx(measured(workdir)[8][0], abs=1e-6)


def test_a_resumed_run_measures_the_same_and_knows_its_best(
    sets: dict[str, Any], finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, first = finished
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    for step in (6, 8):  # as after a kill
        shutil.rmtree(copy / "checkpoints" / str(step))
    shutil.rmtree(copy / "model")
    result = run(configured(sets), copy)
    assert measured(copy) == measured(whole) and result["best"] == first["best"]
    assert same_weights(result["model"], first["model"])
    assert checkpoints(copy) == [3, 6, 8]


def test_evaluating_leaves_the_training_alone(
    sets: dict[str, Any], finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    result = run(configured(sets, sources={}, keep_best=None), tmp_path / "run")
    assert same_weights(result["model"], finished[1]["model"]) and result["best"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_best": "txt"}, r"evaluation\.keep_best.*txt.*text"),
        ({"sources": {"text": 3}}, r"evaluation\.sources\.text is 3"),
        ({"every": 0}, r"evaluation\.every"),
    ],
)
def test_settings_that_make_no_sense_are_named(sets: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(configured(sets, **changes))


@pytest.mark.parametrize("failing", [None, 0, 1])
@pytest.mark.parametrize("most", [3, None])
def test_a_process_that_cannot_read_takes_part_to_the_end(
    monkeypatch: pytest.MonkeyPatch, failing: int | None, most: int | None
) -> None:
    """The others wait for it in each batch; then all raise. Processes as threads, and batches that are counted only."""
    used: dict[int, list[Any]] = {}

    class Data:
        spec = SimpleNamespace(empty=lambda rows: "empty")

        def iterate(self, start: int, rows: list[int]) -> Iterator[tuple[int, str]]:
            for number in range(5):
                if number == 2 and rows == [failing]:
                    raise StorageError(["text"], "away")
                yield number, "batch"

        def steps_per_epoch(self) -> int:
            return 5

    def process(index: int) -> dict[str, float]:
        sources = object.__new__(HeldoutSources)
        sources._data, sources._batches = {"text": Data()}, most
        sources._rows = SimpleNamespace(numbers=[index], put=lambda batch: batch)
        sources._loss = lambda trainable, frozen, batches: len(used.setdefault(index, list(batches)))
        return sources({}, {})

    count = most or 5
    for index, result in enumerate(Peers(2, monkeypatch).run(process)):
        assert used[index] == ["batch"] * 2 + ["empty" if index == failing else "batch"] * (count - 2)
        if failing is None:
            assert result == {"heldout/text": count}
        else:
            assert isinstance(result, StorageError if index == failing else PeerError) and "away" in str(result)
