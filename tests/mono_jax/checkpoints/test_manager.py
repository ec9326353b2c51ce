"""Checkpoints of a run, in a folder and in buckets: saved states are restored, and damage is detected."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mono_jax.checkpoints.manager import Checkpoints
from mono_jax.checkpoints.orbax_manager import OrbaxManager
from mono_jax.errors import CheckpointError, ConfigError
from mono_jax.storage.places import Place
from tests.mono_jax.stored import abstract, assert_equal, flip_a_bit, largest_file, make_state, mesh

P = jax.sharding.PartitionSpec


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_comes_back(place, asynchronous):
    metadata = {"config": {"lr": 1e-3, "stages": ["S1.1"]}, "data": {"digest": "abc"}, "versions": {"jax": "1"}}
    with Checkpoints(place / "c", asynchronous=asynchronous) as checkpoints:
        checkpoints.save(7, make_state(7), metadata)
    with Checkpoints(place / "c") as checkpoints:
        assert checkpoints.metadata() == metadata
        state, found = checkpoints.restore(abstract(make_state(0)))
    assert_equal(state, make_state(7))
    assert found == metadata


def test_a_part_of_the_state_is_restored_without_the_rest(place, monkeypatch):
    """Parameters without the optimizer's moments, which may be twice as large."""
    whole = make_state(7)
    wanted = {"trainable": abstract(whole)["trainable"]}
    with Checkpoints(place / "c") as checkpoints:
        checkpoints.save(7, whole, {"at": 7})
        with pytest.raises(CheckpointError, match=r"opt_state.* is not part of the state"):
            checkpoints.restore(wanted)
        monkeypatch.setattr(Checkpoints, "_verified", lambda *_: True)  # it reads every file
        for file in (place / "c/7/state").rglob("*"):
            if "opt_state" in str(file) and file.is_file() and "zarr" not in file.name:  # in a bucket
                file.unlink()
        state, metadata = checkpoints.restore(wanted, 7, part=True)
        assert_equal(state, {"trainable": whole["trainable"]})
        assert metadata == {"at": 7}
        wanted["trainable"]["more"] = jax.ShapeDtypeStruct((2,), jnp.float32)
        with pytest.raises(CheckpointError, match="trainable/more is missing"):
            checkpoints.restore(wanted, part=True)


def test_newest_checkpoints_are_kept(place):
    with Checkpoints(place, keep=2) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, make_state(step), {"at": step})
        assert checkpoints.steps() == [20, 30]
        state, metadata = checkpoints.restore(make_state(0), step=20)
        assert_equal(state, make_state(20))
        assert metadata == {"at": 20}


def test_a_donated_state_is_saved_as_it_was(place):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    with Checkpoints(place) as checkpoints:
        for step in (1, 2, 3):
            state = make_state(step, size=4096)
            checkpoints.save(step, state, {})
            jax.block_until_ready(overwrite(state))
            assert_equal(checkpoints.restore(make_state(0, size=4096))[0], make_state(step, size=4096))


def test_restoring_onto_another_mesh(place):
    saved_on, wanted_on = mesh(8, 1), mesh(2, 2)
    state = make_state(1)
    kernel = state["trainable"]["layers"]["kernel"]
    state["trainable"]["layers"]["kernel"] = jax.device_put(kernel, jax.NamedSharding(saved_on, P(None, "x")))
    with Checkpoints(place) as checkpoints:
        checkpoints.save(1, state, {})
        wanted = abstract(state)
        sharding = jax.NamedSharding(wanted_on, P(None, "y", "x"))
        wanted["trainable"]["layers"]["kernel"] = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=sharding)
        restored, _ = checkpoints.restore(wanted)
    assert restored["trainable"]["layers"]["kernel"].sharding == sharding
    assert_equal(restored, make_state(1))


def damage_bit(folder: Place) -> None:
    flip_a_bit(largest_file(folder / "state"))


def damage_truncate(folder: Place) -> None:
    file = largest_file(folder / "state")
    file.write_bytes(file.read_bytes()[:100])


def damage_delete(folder: Place) -> None:
    largest_file(folder / "state").unlink()


def damage_metadata(folder: Place) -> None:
    (folder / "metadata" / "metadata").write_text("{")


def damage_list(folder: Place) -> None:
    (folder / "checksums.json").write_text("nonsense")


@pytest.mark.parametrize("damage", [damage_bit, damage_truncate, damage_delete, damage_metadata, damage_list])
def test_damaged_newest_is_reported_and_the_one_before_used(place, damage):
    with Checkpoints(place) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step, size=4096), {"at": step})
    damage(place / "2")
    reported: list[str] = []
    with Checkpoints(place, report=reported.append) as checkpoints:
        state, metadata = checkpoints.restore(make_state(0, size=4096))
        assert metadata == {"at": 1}
        assert_equal(state, make_state(1, size=4096))
        assert len(reported) == 1
        assert "\n" not in reported[0]
        assert reported[0].startswith(f"{place / '2'}: damaged")
        assert reported[0].endswith("; using step 1")
        assert checkpoints.steps() == [1]
        aside = place / "damaged-2" if isinstance(place, Path) else place / "2" / "damaged.json"
        assert aside.exists()
        checkpoints.save(2, make_state(2, size=4096), {"at": 2})  # the run reaches this step again
        assert checkpoints.steps() == [1, 2]
        assert_equal(checkpoints.restore(make_state(0, size=4096))[0], make_state(2, size=4096))


def test_a_damaged_checkpoint_without_checksums(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step, size=4096), {})
    (tmp_path / "2" / "checksums.json").unlink()
    damage_truncate(tmp_path / "2")
    reported: list[str] = []
    with Checkpoints(tmp_path, report=reported.append) as checkpoints:
        assert_equal(checkpoints.restore(make_state(0, size=4096))[0], make_state(1, size=4096))
    assert len(reported) == 1 and reported[0].startswith(f"{tmp_path / '2'}: damaged")


def test_a_checkpoint_without_checksums_is_used_if_it_reads(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {})
    (tmp_path / "1" / "checksums.json").unlink()  # killed between commit and checksums
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(make_state(0))[0], make_state(1))


def test_metadata_is_that_of_the_checkpoint_that_will_be_restored(place):
    reported: list[str] = []
    with Checkpoints(place, report=reported.append) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"at": step})
        checkpoints.wait()
        damage_bit(place / "2")
        assert checkpoints.metadata() == {"at": 1}
        assert_equal(checkpoints.restore(make_state(0))[0], make_state(1))
        checkpoints.save(2, make_state(2), {"at": 2})
        assert checkpoints.metadata() == {"at": 2}
    assert len(reported) == 1


def test_only_damaged_checkpoints(place):
    """They stay in place, so that the next run does not treat the folder as new."""
    with Checkpoints(place, report=pytest.fail) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {})
        damage_bit(place / "1")
        checkpoints.wait()
        damage_bit(place / "2")
        with pytest.raises(CheckpointError, match=r"2: damaged.*choose another of the steps \[1, 2\]"):
            checkpoints.restore(make_state(0), step=2)
        for read in (checkpoints.metadata, lambda: checkpoints.restore(make_state(0))):
            with pytest.raises(CheckpointError, match=r"2: damaged.*1: damaged.*no other checkpoint is left"):
                read()
        assert checkpoints.steps() == [1, 2]


def test_no_checkpoint(place):
    with Checkpoints(place) as checkpoints:
        with pytest.raises(CheckpointError, match="contains no checkpoint"):
            checkpoints.restore(make_state(0))
        checkpoints.save(3, make_state(3), {})
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 4: there are \[3\]"):
            checkpoints.restore(make_state(0), step=4)


def test_a_state_that_does_not_fit_lists_all_differences(place):
    with Checkpoints(place, report=pytest.fail) as checkpoints:
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
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")  # as left by a killed process
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.restore(make_state(0))[0]["step"] == 1
        assert not (tmp_path / "2.orbax-checkpoint-tmp").exists()


def test_saving_a_step_twice_does_nothing(place):
    """As when a run is stopped exactly at the step of a periodic save."""
    with Checkpoints(place) as checkpoints:
        checkpoints.save(2, make_state(2), {"save": "first"})
        checkpoints.save(2, make_state(2), {"save": "second"})
        assert checkpoints.metadata() == {"save": "first"}


def test_going_back_to_an_older_step_replaces_what_followed(place):
    with Checkpoints(place) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {"run": "first"})
    with Checkpoints(place) as checkpoints:
        checkpoints.restore(make_state(0), step=1)
        checkpoints.save(2, make_state(5), {"run": "second"})
        assert checkpoints.steps() == [1, 2]
        assert_equal(checkpoints.restore(make_state(0))[0], make_state(5))
        assert checkpoints.metadata() == {"run": "second"}


def assert_nothing_lost(checkpoints: Checkpoints, size: int) -> None:
    assert checkpoints.steps() == [1, 2]
    assert_equal(checkpoints.restore(make_state(0, size))[0], make_state(2, size))


def test_too_little_space_is_reported_before_writing(tmp_path, monkeypatch):
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
        checkpoints.save(4, make_state(4, size), {})  # once there is space, the run resumes
        assert_equal(checkpoints.restore(make_state(0, size))[0], make_state(4, size))


def test_unusable_directories_and_settings(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.*cannot be used for checkpoints"):
        Checkpoints(tmp_path / "file" / "c")
    with pytest.raises(ConfigError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_wait_after_an_error_tells_of_it_and_passes_no_point(tmp_path: Path):
    """Orbax also waits in a ``finally``: when passed, it counted as "written", and unwritten data was committed."""
    manager, calls = OrbaxManager(tmp_path / "c", asynchronous=True), []
    manager._meeting = SimpleNamespace(
        fail=lambda error: calls.append(str(error)), pass_on=lambda timeout: calls.append("passed")
    )
    with pytest.raises(OSError, match="full"):
        try:
            raise OSError("full")
        finally:
            manager._meet(key="save_finalize", timeout_ms=1)
    manager._meet(key="async_write_complete", timeout_ms=1)
    manager.close()
    assert calls == ["full", "passed"]
