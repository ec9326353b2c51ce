import json

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.inspection.batches import batch_hash
from data_pipelines.loading import packed_data
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.packing import lengths
from tests.made_sets import config, packed, tars


def hashes(data: PackedData, start: int = 0, stop: int | None = None) -> list[str]:
    found = []
    for step, batch in data.iterate(start):
        found.append(batch_hash(batch))
        if stop is not None and step + 1 == stop:
            break
    return found


def test_every_good_sample_is_delivered_once(golden_dir, pairs, cache):
    data = packed(config(golden_dir, tars(pairs)), cache)
    keys = [key for step in range(data.total_steps()) for key in data.sample_keys(step)]
    assert len(keys) == len(set(keys)) == 130
    assert data.steps_per_epoch() == data.total_steps() == len(hashes(data))
    assert data.report.samples == 128 and data.report.skipped == {"truncated_image": 2}
    assert len(data.report.bad) == 2 and all(key in keys for key, _, _ in data.report.bad)
    listed = [json.loads(line) for line in data.report.file.read_text().splitlines()]
    assert {(item["key"], item["reason"]) for item in listed} == {(key, why) for key, why, _ in data.report.bad}


def test_an_unexpected_error_costs_one_sample(golden_dir, pairs, cache, monkeypatch):
    data = packed(config(golden_dir, tars(pairs)), cache)
    key, build = data.sample_keys(0)[1], data.builder.build

    def fails(raw, *rest):
        if raw.key == key:
            raise TypeError("what is this?")
        return build(raw, *rest)

    monkeypatch.setattr(data.builder, "build", fails)
    assert data.batch(0)["segments"].any()
    assert (key, "unexpected_error", "TypeError: what is this?") in data.report.bad


def test_worker_processes_count_the_same(golden_dir, pairs, tmp_path, monkeypatch):
    alone = packed(config(golden_dir, tars(pairs), epochs=2), tmp_path / "alone")
    monkeypatch.setattr(lengths, "CHUNK", 50)
    monkeypatch.setattr(packed_data, "COUNT_ALONE", 0)
    helped = packed(config(golden_dir, tars(pairs), epochs=2, workers=1), tmp_path / "helped")
    np.testing.assert_array_equal(alone.plan.units[0].lengths.counts, helped.plan.units[0].lengths.counts)
    assert not list((tmp_path / "helped").rglob("*.part"))
    assert alone.total_steps() == helped.total_steps()
    np.testing.assert_array_equal(alone.plan.counts, helped.plan.counts)


def test_identity_names_what_decides_the_batches(golden_dir, pairs, cache):
    def identity(**changes):
        return packed(config(golden_dir, tars(pairs), **changes), cache).identity

    base = identity()
    assert identity(workers=3, prefetch=5) == base
    different = [identity(**c) for c in ({"seed": 4}, {"batch_size": 4}, {"loss_weighting": "sqrt"}, {"max_tiles": 2})]
    assert len({base, *different}) == 5


def test_augmentation_differs_between_epochs_only(golden_dir, pairs, cache):
    data = packed(config(golden_dir, tars(pairs), jpeg_augment=True, epochs=2), cache)
    assert batch_hash(data.batch(1)) == batch_hash(data.batch(1))
    plain = packed(config(golden_dir, tars(pairs), epochs=2), cache).batch(1)
    difference = np.abs(data.batch(1)["patches"].astype(int) - plain["patches"])
    assert 0 < difference.mean() < 10


def test_user_errors_are_one_line(golden_dir, pairs, cache):
    with pytest.raises(DataError, match="at least the number of processes"):
        next(packed(config(golden_dir, tars(pairs)), cache).iterate(0, 8, 9))
    with pytest.raises(DataError, match="no token '<IMG_CONTEXT>'"):
        plain = cache / "plain"
        plain.mkdir()
        (plain / "tokenizer.model").write_bytes((golden_dir / "chat/tokenizer.model").read_bytes())
        packed(config(golden_dir, tars(pairs), tokenizer=str(plain)), cache)
