"""Checkpoints in buckets, where nothing can be renamed and storage may be unavailable."""

from __future__ import annotations

import pytest

from data_pipelines.errors import StorageError
from mono_jax.checkpoints.manager import Checkpoints
from mono_jax.errors import CheckpointError
from tests.mono_jax.stored import assert_equal, make_state


@pytest.fixture
def store(bucket, stores):
    return stores(bucket.scheme)


@pytest.mark.parametrize(("kind", "asynchronous"), [("checksums.json", True), ("state/", False), ("metadata", True)])
def test_a_save_that_storage_does_not_take_is_reported_and_the_next_one_made(bucket, store, asynchronous, kind):
    reported: list[str] = []
    with Checkpoints(bucket, keep=2, asynchronous=asynchronous, report=reported.append) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"at": step})
        checkpoints.wait()
        store.fault = lambda method, path: 503 if method in ("PUT", "POST") and kind in path else None
        with pytest.raises(
            CheckpointError, match=r"step 3 was not saved: .*HTTP 503.*earlier checkpoints are intact"
        ) as caught:
            checkpoints.save(3, make_state(3), {})
            checkpoints.wait()
        assert "\n" not in str(caught.value) and checkpoints.failed == 1 and len(reported) == asynchronous
        store.fault = lambda method, path: None
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(4, make_state(4), {"at": 4})
        assert checkpoints.steps() == [2, 4]
    with Checkpoints(bucket) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        assert_equal(checkpoints.restore(make_state(0))[0], make_state(4))
    assert {name.partition("/")[0] for name in bucket.objects()} == {"2", "4"}  # step 3's objects are gone


def test_a_step_without_its_lists_is_not_there(bucket):
    with Checkpoints(bucket) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {})
    (bucket / "2/checksums.json").unlink()  # killed before it was written
    text = (bucket / "3/checksums.json").read_text().replace('"processes": 1', '"processes": 2')
    (bucket / "3/checksums.json").write_text(text)  # the other process was killed before it wrote its own
    with Checkpoints(bucket) as checkpoints:
        assert checkpoints.steps() == [1]
        assert_equal(checkpoints.restore(make_state(0))[0], make_state(1))
    assert {name.partition("/")[0] for name in bucket.objects()} == {"1"}


def test_storage_that_is_away_is_no_damage(bucket, store):
    """A checkpoint is not set aside because storage did not answer."""
    with Checkpoints(bucket) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        store.fault = lambda method, path: 503
        for ask in (checkpoints.metadata, lambda: checkpoints.restore(make_state(0))):
            with pytest.raises(StorageError, match="HTTP 503"):
                ask()
        store.fault = lambda method, path: None
        assert_equal(checkpoints.restore(make_state(0))[0], make_state(1))


def test_what_must_be_stored_before_a_checkpoint_is(bucket):
    stored: list[bool] = []

    def before_commit() -> None:
        stored.append((bucket / "2/checksums.json").is_file())
        if len(stored) == 1:
            raise CheckpointError("the records were not stored")

    with Checkpoints(bucket, asynchronous=False, before_commit=before_commit) as checkpoints:
        with pytest.raises(CheckpointError, match="step 2 was not saved: the records were not stored"):
            checkpoints.save(2, make_state(2), {})
        assert checkpoints.steps() == []
        checkpoints.save(2, make_state(2), {})
        assert checkpoints.steps() == [2]
    assert stored == [False, False]
