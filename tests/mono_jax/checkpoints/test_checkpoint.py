"""Checkpoints, the frozen base and model folders: what is saved comes back, and damage is noticed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from mono_jax import tree
from mono_jax.checkpoints import checkpoint
from mono_jax.checkpoints.checkpoint import (
    Checkpoints,
    diff_config,
    load_base,
    load_model,
    save_base,
    save_model,
    tree_hash,
)
from mono_jax.errors import CheckpointError, ConfigError, WeightsError
from mono_jax.weights import hf

P = jax.sharding.PartitionSpec


def make_state(step: int, size: int = 64) -> dict[str, Any]:
    """Trainables in two dtypes and the optimizer state of a stage, named tuples and masked nodes included."""
    keys = jax.random.split(jax.random.key(step), 2)
    params = {
        "layers": {"kernel": jax.random.normal(keys[0], (3, size, 8))},
        "projector": {"bias": jax.random.normal(keys[1], (size,), jnp.bfloat16)},
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform(
            {"a": optax.adamw(optax.cosine_decay_schedule(1e-3, 10)), "frozen": optax.set_to_zero()},
            {"layers": "a", "projector": "frozen"},
        ),
    )
    return {"step": jnp.int32(step), "trainable": params, "opt_state": optimizer.init(params)}


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def largest_file(folder: Path) -> Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def mesh(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("x", "y"), devices=jax.devices()[: shape[0] * shape[1]])


# ------------------------------------------------------------------------------------------- checkpoints of a run


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_comes_back(tmp_path, asynchronous):
    metadata = {"config": {"lr": 1e-3, "stages": ["S1.1"]}, "data": {"digest": "abc"}, "versions": {"jax": "1"}}
    with Checkpoints(tmp_path / "c", asynchronous=asynchronous) as checkpoints:
        checkpoints.save(7, make_state(7), metadata)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.metadata() == metadata
        state, found = checkpoints.restore(abstract(make_state(0)))
    assert_equal(state, make_state(7))
    assert found == metadata


def test_newest_checkpoints_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, make_state(step), {"at": step})
        assert checkpoints.steps() == [20, 30]
        state, metadata = checkpoints.restore(make_state(0), step=20)
        assert_equal(state, make_state(20))
        assert metadata == {"at": 20}


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            state = make_state(step, size=4096)
            checkpoints.save(step, state, {})
            jax.block_until_ready(overwrite(state))
            assert_equal(checkpoints.restore(make_state(0, size=4096))[0], make_state(step, size=4096))


def test_restoring_onto_another_mesh(tmp_path):
    saved_on, wanted_on = mesh(8, 1), mesh(2, 2)
    state = make_state(1)
    kernel = state.trainable["layers"]["kernel"]
    state.trainable["layers"]["kernel"] = jax.device_put(kernel, jax.NamedSharding(saved_on, P(None, "x")))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        wanted = abstract(state)
        sharding = jax.NamedSharding(wanted_on, P(None, "y", "x"))
        wanted["trainable"]["layers"]["kernel"] = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=sharding)
        restored, _ = checkpoints.restore(wanted)
    assert restored["trainable"]["layers"]["kernel"].sharding == sharding
    assert_equal(restored, make_state(1))


def damage_bit(folder: Path) -> None:
    flip_a_bit(largest_file(folder / "state"))


def damage_truncate(folder: Path) -> None:
    file = largest_file(folder / "state")
    file.write_bytes(file.read_bytes()[:100])


def damage_delete(folder: Path) -> None:
    largest_file(folder / "state").unlink()


def damage_metadata(folder: Path) -> None:
    (folder / "metadata" / "metadata").write_text("{")


def damage_list(folder: Path) -> None:
    (folder / "checksums.json").write_text("nonsense")


def damage_unlisted(folder: Path) -> None:
    (folder / "checksums.json").unlink()
    damage_truncate(folder)


@pytest.mark.parametrize(
    "damage", [damage_bit, damage_truncate, damage_delete, damage_metadata, damage_list, damage_unlisted]
)
def test_damaged_newest_is_reported_and_the_one_before_used(tmp_path, damage):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step, size=4096), {"at": step})
    damage(tmp_path / "2")
    reported: list[str] = []
    with Checkpoints(tmp_path, report=reported.append) as checkpoints:
        state, metadata = checkpoints.restore(make_state(0, size=4096))
        assert metadata == {"at": 1}
        assert_equal(state, make_state(1, size=4096))
        assert len(reported) == 1
        assert "\n" not in reported[0]
        assert reported[0].startswith(f"{tmp_path / '2'}: damaged")
        assert reported[0].endswith("; using step 1")
        assert checkpoints.steps() == [1]
        assert (tmp_path / "damaged-2").is_dir()
        checkpoints.save(2, make_state(2, size=4096), {"at": 2})  # the run gets there again
        assert checkpoints.steps() == [1, 2]
        assert_equal(checkpoints.restore(make_state(0, size=4096))[0], make_state(2, size=4096))


def test_a_checkpoint_without_checksums_is_used_if_it_reads(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {})
    (tmp_path / "1" / "checksums.json").unlink()  # killed between commit and checksums
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(make_state(0))[0], make_state(1))


def test_metadata_is_that_of_the_checkpoint_that_will_be_restored(tmp_path):
    reported: list[str] = []
    with Checkpoints(tmp_path, report=reported.append) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"at": step})
        checkpoints.wait()
        damage_bit(tmp_path / "2")
        assert checkpoints.metadata() == {"at": 1}
        assert_equal(checkpoints.restore(make_state(0))[0], make_state(1))
        checkpoints.save(2, make_state(2), {"at": 2})
        assert checkpoints.metadata() == {"at": 2}
    assert len(reported) == 1


def test_only_damaged_checkpoints(tmp_path):
    """They stay where they are: the next run must not take the folder for a new one."""
    with Checkpoints(tmp_path, report=pytest.fail) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {})
        damage_bit(tmp_path / "1")
        checkpoints.wait()
        damage_bit(tmp_path / "2")
        with pytest.raises(CheckpointError, match=r"2: damaged.*choose another of the steps \[1, 2\]"):
            checkpoints.restore(make_state(0), step=2)
        for read in (checkpoints.metadata, lambda: checkpoints.restore(make_state(0))):
            with pytest.raises(CheckpointError, match=r"2: damaged.*1: damaged.*no other checkpoint is left"):
                read()
        assert checkpoints.steps() == [1, 2]


def test_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="no checkpoint in it"):
            checkpoints.restore(make_state(0))
        checkpoints.save(3, make_state(3), {})
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 4: there are \[3\]"):
            checkpoints.restore(make_state(0), step=4)


def test_a_state_that_does_not_fit_lists_all_differences(tmp_path):
    with Checkpoints(tmp_path, report=pytest.fail) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        other = make_state(0)
        other["trainable"]["layers"]["kernel"] = jnp.zeros((3, 9, 8))
        other["trainable"]["projector"] = {"bias": jnp.zeros(64), "scale": jnp.zeros(2)}
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(other)
        assert checkpoints.steps() == [1]
    message = str(caught.value)
    assert "\n" not in message
    assert "trainable/projector/scale is missing" in message
    assert "trainable/layers/kernel is float32[3, 64, 8], the state has float32[3, 9, 8]" in message
    assert "trainable/projector/bias is bfloat16[64], the state has float32[64]" in message


def test_an_interrupted_save_leaves_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")  # as a killed process leaves it
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.restore(make_state(0))[0]["step"] == 1
        assert not (tmp_path / "2.orbax-checkpoint-tmp").exists()


def test_saving_a_step_twice_does_nothing(tmp_path):
    """As when a run is stopped at the very step of a periodic save."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, make_state(2), {"save": "first"})
        checkpoints.save(2, make_state(2), {"save": "second"})
        assert checkpoints.metadata() == {"save": "first"}


def test_going_back_to_an_older_step_replaces_what_followed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {"run": "first"})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(make_state(0), step=1)
        checkpoints.save(2, make_state(5), {"run": "second"})
        assert checkpoints.steps() == [1, 2]
        assert_equal(checkpoints.restore(make_state(0))[0], make_state(5))
        assert checkpoints.metadata() == {"run": "second"}


def assert_nothing_lost(checkpoints: Checkpoints, size: int) -> None:
    assert checkpoints.steps() == [1, 2]
    assert_equal(checkpoints.restore(make_state(0, size))[0], make_state(2, size))


def test_too_little_space_is_said_before_writing(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {})
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 5000))
        with pytest.raises(CheckpointError, match=r"step 3 was not saved: it needs .* GB, the disk has 5e-06 GB free"):
            checkpoints.save(3, make_state(3), {})
        monkeypatch.undo()
        assert_nothing_lost(checkpoints, 64)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_fills_up_while_saving_loses_nothing(tmp_path, asynchronous):
    """A limit on file sizes makes the write fail half-way, as a full disk does."""
    size = 40_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, keep=2, asynchronous=asynchronous) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step, size), {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(
                CheckpointError, match=r"step 3 was not saved: .*earlier checkpoints are intact"
            ) as caught:
                checkpoints.save(3, make_state(3, size), {})
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(caught.value)
        assert_nothing_lost(checkpoints, size)
        checkpoints.save(4, make_state(4, size), {})  # once there is room it goes on
        assert_equal(checkpoints.restore(make_state(0, size))[0], make_state(4, size))


def test_unusable_directories_and_settings(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.*cannot be used for checkpoints"):
        Checkpoints(tmp_path / "file" / "c")
    with pytest.raises(ConfigError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_diff_config():
    old = {"optim": {"lr": 1e-3, "clip": 1.0}, "stage": "S1.1", "data": [1, 2]}
    new = {"optim": {"lr": 2e-3, "clip": 1.0}, "stage": "S1.1", "data": [1, 3], "seed": 0}
    assert diff_config(old, new) == [("data", [1, 2], [1, 3]), ("optim.lr", 1e-3, 2e-3), ("seed", None, 0)]
    assert diff_config(old, json.loads(json.dumps(old))) == []


def test_package_versions_name_what_numbers_depend_on():
    assert {"python", "jax", "jaxlib", "optax", "orbax-checkpoint"} <= checkpoint.package_versions().keys()


_PROCESS = """
import sys
from pathlib import Path
import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from mono_jax import checkpoint, hf, tree

rank, port, golden, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
jax.distributed.initialize(f"localhost:{port}", 2, rank)
mesh = jax.make_mesh((4,), ("x",))

def place(array, spec):
    array, sharding = np.asarray(array), jax.NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

def state(k):
    w = np.arange(64, dtype=np.float32).reshape(8, 8) * k
    return {"step": place(np.int32(k), jax.P()), "w": place(w, jax.P("x")), "b": place(w, jax.P())}

reported = []
with checkpoint.Checkpoints(folder / "c", keep=2, report=reported.append) as checkpoints:
    for k in (1, 2, 3):
        checkpoints.save(k, state(k), {"at": k})
    assert checkpoints.steps() == [2, 3]
    sync_global_devices("saved")
    if rank == 0:
        file = max((f for f in (folder / "c/3/state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        file.write_bytes(file.read_bytes()[:-1])
    sync_global_devices("damaged")
    restored, metadata = checkpoints.restore(state(0))
    assert metadata == {"at": 2} and len(reported) == (rank == 0)
    for name, leaf in state(2).items():
        for a, b in zip(restored[name].addressable_shards, leaf.addressable_shards):
            np.testing.assert_array_equal(a.data, b.data)

config = checkpoint.model_config(golden)
shardings = {
    path: jax.NamedSharding(mesh, jax.P(*[None] * (len(shape) - 1), None if shape[-1] % 4 else "x"))
    for path, shape in hf.param_shapes(config).items()
}
shardings = tree.unflatten(shardings)
_, params = checkpoint.load_model(golden, shardings=shardings)
checkpoint.save_model(folder / "model", config, params)
_, again = checkpoint.load_model(folder / "model", shardings=shardings)
base = checkpoint.save_base(folder / "base", params)
assert checkpoint.tree_hash(again) == base == checkpoint.tree_hash(hf.load_params(golden, config))
checkpoint.load_base(folder / "base", base, again)
print("done")
"""


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path, golden_dir):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    env["PYTHONPATH"] = str(Path(checkpoint.__file__).parents[2])
    arguments = [str(port), str(golden_dir / "mono_tiny"), str(tmp_path)]
    processes = [
        subprocess.Popen([sys.executable, "-c", _PROCESS, str(rank), *arguments], env=env, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [output.decode().splitlines()[-1] for output in outputs] == ["done", "done"]


# ------------------------------------------------------------------------------------------- frozen base


@pytest.fixture
def frozen() -> dict[str, Any]:
    return {
        "layers": {"kernel": jnp.arange(96, dtype=jnp.bfloat16).reshape(3, 8, 4)},
        "embed": {"embedding": jax.random.normal(jax.random.key(0), (10, 8))},
    }


def test_tree_hash_depends_on_paths_dtypes_shapes_and_bytes(frozen):
    value = tree_hash(frozen)
    assert value == tree_hash(jax.tree.map(np.asarray, frozen)) == tree_hash(dict(reversed(frozen.items())))
    embedding = frozen["embed"]["embedding"]
    others = [
        {"layers": frozen["layers"], "lm_head": frozen["embed"]},
        frozen | {"embed": {"embedding": embedding.reshape(8, 10)}},
        frozen | {"embed": {"embedding": embedding.view(jnp.int32)}},
        frozen | {"embed": {"embedding": embedding.at[9, 7].multiply(-1)}},
    ]
    assert len({value, *map(tree_hash, others)}) == 5


def test_base_is_stored_once_and_restored_onto_any_mesh(tmp_path, frozen):
    content = save_base(tmp_path, frozen)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert save_base(tmp_path, frozen) == content
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == written
    sharding = jax.NamedSharding(mesh(4, 2), P(None, "x", "y"))
    wanted = abstract(frozen)
    wanted["layers"]["kernel"] = jax.ShapeDtypeStruct((3, 8, 4), jnp.bfloat16, sharding=sharding)
    restored = load_base(tmp_path, content, wanted)
    assert_equal(restored, frozen)
    assert restored["layers"]["kernel"].sharding == sharding
    assert save_base(tmp_path / "sharded", restored) == content


def test_bases_that_cannot_be_used(tmp_path, frozen):
    content = save_base(tmp_path, frozen)
    with pytest.raises(CheckpointError, match="frozen base of this run is missing"):
        load_base(tmp_path, "0" * 64, abstract(frozen))
    with pytest.raises(CheckpointError, match="does not fit this run: embed/embedding is not part of the state"):
        load_base(tmp_path, content, abstract({"layers": frozen["layers"]}))
    target = tmp_path / content / "embed.embedding"
    chunk = largest_file(target)
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="frozen base is damaged"):
        load_base(tmp_path, content, abstract(frozen))
    shutil.rmtree(target)
    shutil.copytree(tmp_path / content / "layers.kernel", target)
    with pytest.raises(
        CheckpointError, match=r"embed/embedding is bfloat16\[3, 8, 4\], the state has float32\[10, 8\]"
    ):
        load_base(tmp_path, content, abstract(frozen))


def test_a_base_with_other_content_is_noticed(tmp_path, frozen):
    content = save_base(tmp_path, frozen)
    other = save_base(tmp_path, frozen | {"embed": {"embedding": frozen["embed"]["embedding"] + 1}})
    shutil.rmtree(tmp_path / content)
    (tmp_path / other).rename(tmp_path / content)
    with pytest.raises(CheckpointError, match="its content no longer has this hash"):
        load_base(tmp_path, content, abstract(frozen))


# ------------------------------------------------------------------------------------------- model folders


@pytest.fixture
def model(golden_dir):
    """(config, parameters in memory, the same lazily) of a golden model."""
    config, lazy, _ = checkpoint.open_model(golden_dir / "mono_tiny", image_token_id=100)
    return config, hf.load_params(golden_dir / "mono_tiny", config), lazy


@pytest.mark.parametrize("streamed", [True, False])
def test_model_folder_comes_back_and_orbax_itself_restores_it(tmp_path, model, streamed):
    config, params, lazy = model
    save_model(tmp_path, config, lazy if streamed else jax.tree.map(jnp.asarray, params))
    found, loaded = load_model(tmp_path)
    assert found == config
    assert_equal(loaded, params)
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert_equal(checkpointer.restore(tmp_path / "params"), params)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_equal(checkpointer.restore(tmp_path / "params", abstract(loaded)), params)


def test_negative_zeros_and_nans_survive(tmp_path, model):
    config, params, _ = model
    flat = tree.flatten(params)
    wqkv = flat["layers/attention/wqkv/kernel"]
    wqkv[0], wqkv[1], wqkv[2] = -0.0, 0.0, np.uint32(0x7FC01234).view(np.float32)

    def lazy(path: str) -> hf.LazyArray:
        array, stacked = flat[path], hf.is_stacked(path)
        return hf.LazyArray(array.shape, array.dtype, stacked, lambda n: array if n is None else array[n])

    save_model(tmp_path, config, tree.unflatten({path: lazy(path) for path in flat}))
    assert_equal(load_model(tmp_path)[1], params)


def test_large_arrays_without_layers_are_cut_into_chunks(tmp_path, model, monkeypatch):
    config, params, lazy = model
    monkeypatch.setattr(checkpoint, "CHUNK", 10_000)
    save_model(tmp_path, config, lazy)
    assert len(list((tmp_path / "params" / "embed.embedding").glob("[0-9]*"))) == 3  # 128 rows of 192 bytes by 52
    assert_equal(load_model(tmp_path)[1], params)


def test_sharded_parameters_are_saved_and_placed(tmp_path, model):
    config, params, _ = model
    devices = mesh(4, 1)
    shardings = jax.tree.map(
        lambda x: jax.NamedSharding(devices, P(*[None] * (x.ndim - 1), None if x.shape[-1] % 4 else "x")), params
    )
    save_model(tmp_path / "a", config, params)
    _, placed = load_model(tmp_path / "a", shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    save_model(tmp_path / "b", config, placed)
    assert_equal(load_model(tmp_path / "b")[1], params)


def test_dtype_is_cast_when_asked_for(tmp_path, model):
    config, params, lazy = model
    save_model(tmp_path, config, lazy)
    assert_equal(load_model(tmp_path, jnp.bfloat16)[1], jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params))


def test_huggingface_folder_is_loaded_directly(golden_dir, model):
    config, params, _ = model
    found, loaded = load_model(golden_dir / "mono_tiny", image_token_id=100)
    assert found == config
    assert_equal(loaded, params)


def test_saving_again_replaces_the_model_and_copies_extra_files(tmp_path, model):
    config, params, lazy = model
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    folder = tmp_path / "model"
    save_model(folder, config, lazy)
    changed = jax.tree.map(lambda x: x + 1, params)
    save_model(folder, config, changed, extra_files=[tmp_path / "tokenizer.model"], names={"final_norm/scale": "n"})
    assert_equal(load_model(folder)[1], changed)
    assert (folder / "tokenizer.model").read_bytes() == b"pieces"
    assert checkpoint.open_model(folder)[2] == {"final_norm/scale": "n"}


def test_folders_that_are_no_models(tmp_path, model):
    config, params, lazy = model
    with pytest.raises(WeightsError, match="nowhere: no such folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"empty: not a model folder: it has no model\.json"):
        load_model(tmp_path / "empty")
    folder = tmp_path / "model"
    save_model(folder, config, lazy)
    (folder / "config.json").write_text("{}")
    file = folder / "model.json"
    values = json.loads(file.read_text())
    for changes, message in (
        ({"format": 99}, "format is 99, this version reads 1"),
        ({"model": values["model"] | {"hiden_size": 3}}, "did you mean 'hidden_size'"),
        ({"model": values["model"] | {"remat": "some"}}, r"model\.json.*remat"),
    ):
        file.write_text(json.dumps(values | changes))
        with pytest.raises(ConfigError, match=message):
            load_model(folder)
    file.write_text(json.dumps(values | {"model": values["model"] | {"intermediate_size": 64}}))
    with pytest.raises(
        WeightsError, match=r"feed_forward/gate/kernel is \[3, 48, 96\], the config asks for \[3, 48, 64\]"
    ):
        load_model(folder)
    file.unlink()  # as an interrupted save leaves it
    with pytest.raises(WeightsError, match=r"not a model folder: it has no model\.json"):
        load_model(folder)
    del params["projector"]
    with pytest.raises(WeightsError, match="6 missing"):
        save_model(folder, config, params)


@pytest.mark.parametrize("lost", [True, False])
def test_damaged_model_folders(tmp_path, model, lost):
    """zarr reads a chunk that is not there as zeros: that must not pass for weights."""
    config, _, lazy = model
    save_model(tmp_path, config, lazy)
    chunk = largest_file(tmp_path / "params" / "layers.attention.wqkv.kernel")
    if lost:
        chunk.unlink()
    else:
        flip_a_bit(chunk)
    with pytest.raises(WeightsError, match=r"layers\.attention\.wqkv\.kernel/.* (is missing|has changed)"):
        load_model(tmp_path)


def test_a_model_that_cannot_be_written_is_one_line(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/m.*was not saved") as caught:
        save_model(tmp_path / "file" / "m", model[0], model[2])
    assert "\n" not in str(caught.value)
