import dataclasses
import json
import threading
import time

import numpy as np
import pytest

from data_pipelines.batch import boundaries
from data_pipelines.errors import DataError, StorageError
from data_pipelines.inspection.batches import batch_hash
from data_pipelines.loading import packed_data
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.packing import lengths
from tests.made_sets import GEOMETRY, config, packed, talk_source, tars, write_pairs


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


@pytest.mark.parametrize("boundary", [{}, {"boundary_block": 8, "visual_tokens": 352}], ids=["static", "ragged"])
def test_batches_say_on_request_which_source_each_text_slot_comes_from(golden_dir, pairs, talks, cache, boundary):
    settings = config(golden_dir, tars(pairs), talk_source(talks), batch_size=4, **boundary)
    plain, data = packed(settings, cache), packed(dataclasses.replace(settings, source_ids=True), cache)
    assert data.identity == plain.identity and "sources" not in plain.batch(0)
    batch, keys, seen = data.batch(0), iter(data.sample_keys(0)), set()
    data.spec.check(batch)
    for row, first_text in enumerate(boundaries(batch)):
        numbers = [0, *(1 + ("/" not in next(keys)) for _ in range(batch["segments"][row].max()))]
        expected = np.zeros_like(batch["sources"][row])
        for slot, segment in zip(batch["order"][row], batch["segments"][row]):
            if segment and slot >= first_text:
                expected[slot - first_text] = numbers[segment]
        np.testing.assert_array_equal(batch["sources"][row], expected)
        seen |= set(expected.tolist())
    assert seen == {0, 1, 2}
    for name, array in plain.batch(0).items():
        np.testing.assert_array_equal(batch[name], array)


def whole_block(data: PackedData, block: int) -> list[tuple[int, int]]:
    """The places of its rows."""
    return [(block, row) for row in range(data.plan.block(block).rows)]


def test_augmentation_differs_between_epochs_samples_and_sources(golden_dir, tmp_path, cache):
    """Two sources of the same images, read twice: their pixels differ by the seed only, and no two seeds are equal."""
    write_pairs(tmp_path, 40)
    sources = [tars(tmp_path, name) for name in ("one", "other")]
    data = packed(config(golden_dir, *sources, jpeg_augment=True, epochs=2, block_samples=80), cache)
    seeds, pixels, build = {}, {}, data.builder.build

    def seen(raw, seed, *rest):
        sample = build(raw, seed, *rest)
        seeds.setdefault(raw.key, []).append(seed)
        pixels.setdefault(raw.key, []).append(sample.patches.tobytes())
        return sample

    data.builder.build = seen
    for epoch in (0, 1):
        data.assemble(whole_block(data, epoch))
    assert len(seeds) == 40 and all(len(found) == 4 for found in seeds.values())
    assert len({seed for found in seeds.values() for seed in found}) == 160
    assert all(len(set(found)) > 1 for found in pixels.values())


def test_drops_are_reported_once_with_the_first_row_of_their_block(golden_dir, tmp_path, cache):
    """Samples too long for a row, each known by its key before it is read."""
    write_pairs(tmp_path, 60)
    counts = packed(config(golden_dir, tars(tmp_path)), cache).plan.units[0].lengths.counts
    limit = int(np.median(counts[:, 1]))
    data, found = packed(config(golden_dir, tars(tmp_path), text_tokens=limit, block_samples=20), cache), []
    for number in range(data.plan.blocks):
        rows = whole_block(data, number)
        reports = [data.assemble([row])[2] for row in rows]
        assert len(rows) > 1 and reports[0] and not any(reports[1:])
        found += reports[0]
        assert data.assemble(rows)[2] == reports[0]
    long = [data.sources[0].key(index) for index in np.flatnonzero(counts[:, 1] > limit)]
    assert 0 < len(long) < 60 and sorted(bad[:2] for bad in found) == sorted((key, "too_long") for key in long)
    assert all(detail.endswith(f"text tokens, but a row has room for 32 and {limit}") for _, _, detail in found)


def test_drops_of_blocks_without_a_row_are_reported_too(golden_dir, tmp_path, cache):
    """Nothing of the first sources fits: with the order of the files, whole blocks are dropped."""
    write_pairs(tmp_path, 40)
    counts = packed(config(golden_dir, tars(tmp_path)), cache).plan.units[0].lengths.counts
    limit = int(np.min(counts[:, 1]))
    settings = config(golden_dir, tars(tmp_path), text_tokens=limit, block_samples=2, shuffle="none", batch_size=1)
    data = packed(settings, cache)
    rows = data.plan.epoch_rows(0)
    fits = np.flatnonzero(counts[:, 1] == limit)
    assert 0 < rows <= len(fits) and (data.plan.counts == 0).sum() > 5
    for step in range(rows):
        data.batch(step)
    last = fits[-1] // 2 * 2 + 2  # end of the last block with a row
    assert data.report.samples == len(fits) and data.report.skipped == {"too_long": last - len(fits)}
    assert data.report.found == 0, "all were known before"


def test_the_cache_has_a_place_of_its_own(golden_dir, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path))
    data = PackedData(config(golden_dir, tars(pairs)), geometry=GEOMETRY)
    assert data.cache_dir == tmp_path and list((tmp_path / "lengths").glob("*.npy"))


def test_augmentation_leaves_a_step_as_it_is_and_images_nearly(golden_dir, pairs, cache):
    data = packed(config(golden_dir, tars(pairs), jpeg_augment=True, epochs=2), cache)
    assert batch_hash(data.batch(1)) == batch_hash(data.batch(1))
    plain = packed(config(golden_dir, tars(pairs), epochs=2), cache).batch(1)
    difference = np.abs(data.batch(1)["patches"].astype(int) - plain["patches"])
    assert 0 < difference.mean() < 10


def test_user_errors_are_one_line(golden_dir, pairs, cache):
    with pytest.raises(DataError, match=r"rows \[10000\] requested, but data.batch_size is"):
        next(packed(config(golden_dir, tars(pairs)), cache).iterate(0, [10_000]))
    with pytest.raises(DataError, match="no token '<IMG_CONTEXT>'"):
        plain = cache / "plain"
        plain.mkdir()
        (plain / "tokenizer.model").write_bytes((golden_dir / "chat/tokenizer.model").read_bytes())
        packed(config(golden_dir, tars(pairs), tokenizer=str(plain)), cache)


def test_remote_samples_are_read_several_at_a_time(golden_dir, pairs, cache, monkeypatch):
    """The batch is the same, and an error ends it without the reads that have not begun."""
    data = packed(config(golden_dir, tars(pairs)), cache)
    alone, (source,) = batch_hash(data.batch(0)), data.sources
    read, lock, running, most, begun = source.read, threading.Lock(), set(), [0], []

    def slow(index):
        with lock:
            running.add(index)
            begun.append(index)
            most[0] = max(most[0], len(running))
        time.sleep(0.02)
        with lock:
            running.discard(index)
        return read(index)

    monkeypatch.setattr(source, "read", slow)
    assert batch_hash(data.batch(0)) == alone and most == [1]
    monkeypatch.setattr(source, "is_remote", True)
    assert batch_hash(data.batch(0)) == alone and most[0] > 4
    begun.clear()

    def away(index):
        begun.append(index)
        raise StorageError("x", "gone")

    monkeypatch.setattr(source, "read", away)
    with pytest.raises(StorageError):
        data.assemble(data._places(0, range(8)))
    assert len(begun) <= 64
