"""A run that trains low-rank adapters: its checkpoints, how it resumes, and its exported model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax import tree
from mono_jax.checkpoints.integrity import tree_hash
from mono_jax.checkpoints.manager import Checkpoints
from mono_jax.errors import ConfigError
from mono_jax.models.adapters import is_adapter, pairs
from mono_jax.models.transformer import Model
from mono_jax.runs.config import RunConfig
from mono_jax.runs.parameter_counts import parameter_counts
from mono_jax.runs.program import Program
from mono_jax.runs.stage import run_stage
from mono_jax.weights.model_folder import load_model, open_model
from tests.mono_jax.helpers import random_batch
from tests.mono_jax.runs.test_result import hf_folder, settings, stored

pytestmark = pytest.mark.usefixtures("one_device")

TARGETS = ("attention/wqkv", "visual_experts")
ADAPTED = {"layers/attention/wqkv/kernel"} | {f"layers/visual_feed_forward/{n}/kernel" for n in ("gate", "up", "down")}


@pytest.fixture(scope="module")
def finished(sets: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """(initial weights in bfloat16, workdir, config) of a run of 4 steps with a checkpoint after 2."""
    folder = tmp_path_factory.mktemp("lora")
    init = hf_folder(folder / "init", sets, "bfloat16")
    values = settings(sets, init, stage="S2", trains=["lora"], lora={"rank": 2, "targets": TARGETS}, steps=4)
    values |= {"checkpoint_every": 2, "optim": {"learning_rate": 1e-2}, "save_dtype": "float32"}
    run(values, folder / "run", folder / "base")
    return init, folder / "run", values


def run(values: dict[str, Any], workdir: Path, base: Path) -> Path:
    return Path(run_stage(RunConfig.from_dict(values), workdir, base_dir=base, say=lambda line: None)["model"])


def adapters(workdir: Path, values: dict[str, Any], step: int | None = None) -> tuple[Program, tree.Tree]:
    """The trained parameters of a checkpoint, by default the newest."""
    program = Program.build(RunConfig.from_dict(values))
    abstract, _ = program.abstract_state()
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return program, checkpoints.restore(vars(abstract), step)[0]["trainable"]


def test_checkpoints_hold_adapters_alone(finished: tuple[Path, Path, dict[str, Any]]):
    _, workdir, values = finished
    program, trainable = adapters(workdir, values)
    assert all(map(is_adapter, tree.flatten(trainable))) and pairs(trainable).keys() == ADAPTED
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trainable))
    state, frozen = program.abstract_state()
    arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vars(state)))
    assert arrays == pytest.approx(3 * size, rel=0.05) and len(tree.flatten(frozen)) > len(ADAPTED)


def test_the_model_that_leaves_has_the_adapters_in_its_kernels(finished: tuple[Path, Path, dict[str, Any]]):
    """Kernels without an adapter keep their bits; logits are those of base and adapters."""
    init, workdir, values = finished
    before, after = stored(init), stored(workdir / "model")
    assert after.keys() == before.keys()
    program, trainable = adapters(workdir, values)
    for path in before.keys() - ADAPTED:
        assert after[path].tobytes() == before[path].tobytes() and after[path].dtype == before[path].dtype, path
    for path, (a, b) in pairs(trainable).items():
        expected = np.float64(before[path]) + 16.0 * np.float64(a) @ np.float64(b)
        assert after[path].dtype == np.float32 and np.abs(expected - np.float64(before[path])).max() > 1e-3
        np.testing.assert_allclose(after[path], expected, atol=1e-6, err_msg=path)
    config, base = load_model(str(init))
    params = tree.merge(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), base), trainable)
    batch = random_batch(2, program.run.data.batch_spec(config.geometry), vocab=config.vocab_size)
    batch["patch_cells"] %= config.geometry.tokens_per_tile
    expected = program.model(params, batch, jnp.float32).hidden
    found = Model(config)(load_model(str(workdir / "model"))[1], batch, jnp.float32).hidden
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_best_model_has_the_adapters_of_its_step(
    finished: tuple[Path, Path, dict[str, Any]], sets: dict[str, Any], tmp_path: Path
):
    """The best step is the first: visual experts by themselves do not change the loss on text."""
    init, workdir, values = finished
    evaluation = {"every": 1, "sources": {"text": sets["heldout"]["text"]}, "batches": 1, "keep_best": "heldout/text"}
    values = values | {"steps": 3, "evaluation": evaluation, "lora": {"rank": 2, "targets": ["visual_experts"]}}
    run(values, tmp_path / "run", workdir.parent / "base")
    before, best, last = stored(init), stored(tmp_path / "run/best"), stored(tmp_path / "run/model")
    _, trainable = adapters(tmp_path / "run", values, 1)
    for path, (a, b) in pairs(trainable).items():
        expected = np.float64(before[path]) + 16.0 * np.float64(a) @ np.float64(b)
        np.testing.assert_allclose(best[path], expected, atol=1e-6, err_msg=path)
        assert np.abs(last[path] - expected).max() > 1e-3
    assert all(best[path].tobytes() == leaf.tobytes() for path, leaf in before.items() if path not in pairs(trainable))


def test_it_resumes_and_shares_the_base(finished: tuple[Path, Path, dict[str, Any]], tmp_path: Path):
    """Back at step 2, in a copy; a run with other adapters uses the same frozen base."""
    _, workdir, values = finished
    copy = Path(shutil.copytree(workdir, tmp_path / "copy"))
    shutil.rmtree(copy / "checkpoints/4")
    shutil.rmtree(copy / "model")
    base = workdir.parent / "base"
    again = stored(run(values, copy, base))
    whole = stored(workdir / "model")
    assert all(again[path].tobytes() == leaf.tobytes() for path, leaf in whole.items())
    metadata = [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert metadata == [1, 2, 3, 4]
    other = Program.build(RunConfig.from_dict(values | {"lora": {"rank": 1}}))
    assert [folder.name for folder in base.iterdir() if folder.is_dir()] == [tree_hash(other.frozen_source({}))]
    with pytest.raises(ConfigError, match=r"a different lora\.rank"):
        run(values | {"lora": {"rank": 1, "targets": TARGETS}, "steps": 6}, copy, base)


def test_the_summary_counts_them(finished: tuple[Path, Path, dict[str, Any]]):
    init, workdir, values = finished
    config, params, _ = open_model(workdir / "model")
    _, trainable = adapters(workdir, values)
    counts = parameter_counts(RunConfig.from_dict(values), config, params)
    size = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert counts["groups"]["lora"] == {"parameters": size, "trained": True} and counts["trainable"] == size
    assert counts["frozen"] == sum(leaf.size for leaf in stored(init).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trains": ["lora", "*"]}, "config.trains: '\\*' trains every kernel"),
        ({"lora": {"rank": 4}}, "config.lora is given, but config.trains does not name 'lora'"),
        ({"trains": ["lora"], "lora": {"rank": 0}}, "config.lora.rank is 0"),
        ({"trains": ["lora"], "lora": {"targets": []}}, "lora.targets is empty"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, Any], message: str):
    data = {"tokenizer": "tokenizer", "sources": [{"spec": {"kind": "tar", "paths": "*.tar"}}]}
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict({"stage": "S2", "steps": 1, "data": data} | changes)
