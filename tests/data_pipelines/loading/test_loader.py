import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_pipelines.batch import boundaries
from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.errors import BadSample, DataError
from data_pipelines.loading import loader
from data_pipelines.loading.loader import PackedData
from data_pipelines.packing import lengths
from data_pipelines.sources.source import open_source
from experiments.inspect_data import batch_hash
from tests.made_sets import config, picture, tars, write_conversations, write_pairs

BROKEN = (7, 50)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, 130, broken=BROKEN)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    """Conversations with none, one and two images."""
    folder, rng = tmp_path_factory.mktemp("talks"), np.random.default_rng(1)
    records = []
    for number in range(40):
        names = [f"{number}_{k}.png" for k in range(number % 3)]
        for name in names:
            (folder / name).write_bytes(picture(rng, 60, 40, "PNG"))
        question = "which?" + " <image>" * len(names)
        said = [{"from": "human", "value": question}, {"from": "gpt", "value": f"number {number}"}] * (1 + number % 2)
        if number % 2:
            said = [said[0], said[1], {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]
        records.append({"id": number, "conversations": said, **({"image": names} if names else {})})
    write_conversations(folder / "talks.jsonl", records)
    return folder


def talk_source(folder: Path, **fields):
    spec = {"kind": "jsonl", "paths": str(folder / "talks.jsonl"), "image_root": str(folder)}
    return {"name": "talks", "spec": spec, **fields}


def hashes(data: PackedData, start: int = 0, stop: int | None = None) -> list[str]:
    found = []
    for step, batch in data.iterate(start):
        found.append(batch_hash(batch))
        if stop is not None and step + 1 == stop:
            break
    return found


def naive_row(data: PackedData, batch: dict, row: int) -> list[dict]:
    """Reads a packed row back, position by position: what each sample's tokens are and what they are to predict."""
    samples = []
    for segment in np.unique(batch["segments"][row]):
        if segment == 0:
            continue
        at = np.flatnonzero(batch["segments"][row] == segment)
        end = boundaries(batch)[row]
        sample = {"ids": [], "patches": [], "cells": [], "learnt": {}}
        for place, position in enumerate(at.tolist()):
            assert batch["positions"][row, position] == place
            slot = int(batch["order"][row, position])
            if slot < end:
                sample["ids"].append(data.builder.chat.image_token)
                sample["patches"].append(batch["patches"][row, slot])
                sample["cells"].append(int(batch["patch_cells"][row, slot]))
            else:
                sample["ids"].append(int(batch["tokens"][row, slot - end]))
                if weight := float(batch["loss_weights"][row, slot - end]):
                    sample["learnt"][place + 1] = (int(batch["targets"][row, slot - end]), weight)
        samples.append(sample)
    return samples


ELASTIC = {"visual_tokens": 320, "text_tokens": 240, "boundary_block": 16}


@pytest.mark.parametrize(
    ("weighting", "changes"), [("token", {}), ("sample", {}), ("sqrt", {}), ("token", ELASTIC)], ids=str
)
def test_rows_hold_the_samples_one_behind_the_other(golden_dir, talks, pairs, cache, weighting, changes):
    settings = config(golden_dir, talk_source(talks), tars(pairs), loss_weighting=weighting, **changes)
    data, builder = PackedData(settings, cache), SampleBuilder(settings)
    sources = [open_source(source.spec) for source in settings.sources]
    for step in range(3):
        batch = data.batch(step)
        data.spec.check(batch)
        for row in range(data.batch_size):
            assert sorted(batch["order"][row].tolist()) == list(range(data.spec.sequence))
            used = batch["segments"][row] > 0
            assert not used[np.argmin(used) :].any() or used.all()  # padding comes last
            block, number = data.plan.locate(step * data.batch_size + row)
            block = data.plan.block(block)
            inside = range(block.starts[number], block.starts[number + 1])
            wanted = []
            for unit in inside:
                raw = sources[block.source[unit]].read(int(block.sample[unit]))
                with contextlib.suppress(BadSample):
                    wanted.append(builder.build(raw))
            found = naive_row(data, batch, row)
            assert len(found) == len(wanted)
            for got, sample in zip(found, wanted):
                assert got["ids"] == sample.input_ids.tolist()
                np.testing.assert_array_equal(np.array(got["patches"]).reshape(sample.patches.shape), sample.patches)
                assert got["cells"] == sample.patch_cells.tolist()
                learnt = np.flatnonzero(sample.loss_mask)
                assert sorted(got["learnt"]) == learnt.tolist() and len(learnt)
                weight = {"token": 1, "sample": 1 / len(learnt), "sqrt": len(learnt) ** -0.5}[weighting]
                for place, (target, given) in got["learnt"].items():
                    assert target == sample.input_ids[place] and given == pytest.approx(weight)


def test_elastic_rows_suit_any_mix(golden_dir, talks, pairs, cache):
    """Rows of text alone and of images nearly alone, all of them full."""
    settings = config(golden_dir, talk_source(talks), tars(pairs), batch_size=2, block_samples=256, **ELASTIC)
    data = PackedData(settings, cache)
    keys = [key for step in range(data.total_steps()) for key in data.sample_keys(step)]
    assert len(keys) == len(set(keys)) == 170
    ends, tokens = [], 0
    for _, batch in data.iterate():
        data.spec.check(batch)
        assert batch["order"].shape == (2, 320) and (batch["visual_slots"] % 16 == 0).all()
        ends += batch["visual_slots"].tolist()
        tokens += int((batch["segments"] > 0).sum())
    assert len(set(ends)) > 2, "boundaries differ"
    # 305 = 320 slots less what the boundary may cost. No static V and T come near: the mix differs from row to row.
    assert data.plan.epoch_rows(0) <= 1.1 * tokens / 305 + 1
    with pytest.raises(DataError, match="multiple of it"):
        config(golden_dir, tars(pairs), visual_tokens=100, text_tokens=50, boundary_block=16)


@pytest.mark.parametrize(("hosts", "changes"), [(2, {}), (3, {}), (4, {}), (8, {}), (3, ELASTIC)], ids=str)
def test_global_batch_is_the_same_for_any_number_of_hosts(golden_dir, pairs, cache, hosts, changes):
    settings = config(golden_dir, tars(pairs), shuffle="local", local_runs=2, run_length=16, **changes)
    one = PackedData(settings, cache)
    others = [PackedData(settings, cache) for _ in range(hosts)]
    iterators = [other.iterate(1, host, hosts) for host, other in enumerate(others)]
    for step in (1, 2, 3):
        parts = [next(iterator) for iterator in iterators]
        assert [part[0] for part in parts] == [step] * hosts
        joined = {name: np.concatenate([part[1][name] for part in parts]) for name in parts[0][1]}
        assert batch_hash(joined) == batch_hash(one.batch(step))
    for iterator in iterators:
        iterator.close()
    assert sum(other.report.samples for other in others) >= one.report.samples > 0


def test_resuming_is_starting_at_a_step(golden_dir, pairs, cache, tmp_path):
    settings = config(golden_dir, tars(pairs), epochs=2)
    whole = hashes(PackedData(settings, cache))
    assert len(whole) == len(set(whole)) == PackedData(settings, tmp_path).total_steps()
    assert hashes(PackedData(settings, cache), 3) == whole[3:]
    assert hashes(PackedData(settings, tmp_path), len(whole) - 1) == whole[-1:]
    assert hashes(PackedData(settings, cache), len(whole)) == []


def test_every_good_sample_is_delivered_once(golden_dir, pairs, cache):
    data = PackedData(config(golden_dir, tars(pairs)), cache)
    keys = [key for step in range(data.total_steps()) for key in data.sample_keys(step)]
    assert len(keys) == len(set(keys)) == 130
    assert data.steps_per_epoch() == data.total_steps() == len(hashes(data))
    assert data.report.samples == 128 and data.report.skipped == {"truncated_image": 2}
    assert len(data.report.bad) == 2 and all(key in keys for key, _, _ in data.report.bad)
    listed = [json.loads(line) for line in data.report.file.read_text().splitlines()]
    assert {(item["key"], item["reason"]) for item in listed} == {(key, why) for key, why, _ in data.report.bad}


def test_a_bad_sample_changes_nothing_else(golden_dir, tmp_path, cache):
    """Two sets whose images differ in one file only: the same rows, but for its slots."""
    for name, broken in (("good", ()), ("bad", (3,))):
        write_pairs(tmp_path / name, 60, broken=broken)
    good, bad = (PackedData(config(golden_dir, tars(tmp_path / name)), cache) for name in ("good", "bad"))
    assert good.identity != bad.identity
    for step in range(good.total_steps()):
        ours, theirs = good.batch(step), bad.batch(step)
        assert good.sample_keys(step) == bad.sample_keys(step)
        for row in range(good.batch_size):
            segments = set(ours["segments"][row]) - set(theirs["segments"][row])
            kept = [s for s in naive_with_segments(good, ours, row) if s[0] not in segments]
            assert repr(kept) == repr(naive_with_segments(bad, theirs, row))
    assert bad.report.skipped == {"truncated_image": 1} and bad.report.samples == good.report.samples - 1


def test_an_unexpected_error_costs_one_sample(golden_dir, pairs, cache, monkeypatch):
    data = PackedData(config(golden_dir, tars(pairs)), cache)
    key, build = data.sample_keys(0)[1], data.builder.build

    def fails(raw, *rest):
        if raw.key == key:
            raise TypeError("what is this?")
        return build(raw, *rest)

    monkeypatch.setattr(data.builder, "build", fails)
    assert data.batch(0)["segments"].any()
    assert (key, "unexpected_error", "TypeError: what is this?") in data.report.bad


def test_an_unexpected_error_while_counting_costs_one_sample(golden_dir, pairs, tmp_path, monkeypatch):
    count, seen = SampleBuilder.text_tokens, []

    def fails(builder, raw, *rest):
        seen.append(raw.key)
        if len(seen) == 3:
            raise TypeError("what is this?")
        return count(builder, raw, *rest)

    monkeypatch.setattr(SampleBuilder, "text_tokens", fails)
    data = PackedData(config(golden_dir, tars(pairs)), tmp_path)
    assert data.plan.units[0].lengths.bad == {"unexpected_error": 1}


def test_processes_that_count_the_same_do_not_disturb_each_other(golden_dir, pairs, tmp_path, monkeypatch):
    """As hosts that start together on a shared cache: the slower one finds the parts gone and the result there."""
    settings = config(golden_dir, tars(pairs))
    expected = PackedData(settings, tmp_path / "alone").plan.units[0].lengths.counts
    save = lengths._save

    def overtaken(*args):
        save(*args)
        monkeypatch.setattr(lengths, "_save", save)
        PackedData(settings, tmp_path / "shared")

    monkeypatch.setattr(lengths, "_save", overtaken)
    found = PackedData(settings, tmp_path / "shared").plan.units[0].lengths.counts
    np.testing.assert_array_equal(found, expected)
    assert not list((tmp_path / "shared" / "lengths").glob("*.tmp"))


def naive_with_segments(data, batch, row):
    numbers = [int(n) for n in np.unique(batch["segments"][row]) if n]
    return [(number, sample["ids"], sample["learnt"]) for number, sample in zip(numbers, naive_row(data, batch, row))]


def test_text_alone_fills_rows(golden_dir, tmp_path, cache):
    (tmp_path / "a.txt").write_text("the grey sea and some green hill near water\n\n" * 400)
    source = {"name": "prose", "spec": {"kind": "text", "paths": str(tmp_path / "a.txt")}}
    data = PackedData(config(golden_dir, source, visual_tokens=0, text_tokens=128), cache)
    batch = data.batch(0)
    data.spec.check(batch)
    assert batch["patches"].shape == (8, 0, 28, 28, 3)
    assert (batch["segments"] > 0).mean() > 0.9
    learnt = batch["loss_weights"] > 0
    np.testing.assert_array_equal(batch["targets"][:, :-1][learnt[:, :-1]], batch["tokens"][:, 1:][learnt[:, :-1]])
    # Of each piece every token but the begin token is a target.
    for row in range(8):
        segments = batch["segments"][row]
        assert learnt[row].sum() == (segments > 0).sum() - len(set(segments) - {0})


def test_counts_of_tokens_are_kept_and_follow_the_config(golden_dir, pairs, tmp_path, monkeypatch):
    PackedData(config(golden_dir, tars(pairs)), tmp_path)
    files = set((tmp_path / "lengths").glob("*.npy"))

    def never(*_):
        raise AssertionError("counted anew")

    with monkeypatch.context() as patch:
        patch.setattr(SampleBuilder, "text_tokens", never)
        PackedData(config(golden_dir, tars(pairs), visual_tokens=64, text_tokens=400, seed=9), tmp_path)
    longer = PackedData(config(golden_dir, tars(pairs, prompts=("what is it?",))), tmp_path)
    assert len(set((tmp_path / "lengths").glob("*.npy")) - files) == 1
    assert longer.batch(0)["tokens"].any()


def test_worker_processes_count_the_same(golden_dir, pairs, tmp_path, monkeypatch):
    alone = PackedData(config(golden_dir, tars(pairs), epochs=2), tmp_path / "alone")
    monkeypatch.setattr(lengths, "CHUNK", 50)
    monkeypatch.setattr(loader, "COUNT_ALONE", 0)
    helped = PackedData(config(golden_dir, tars(pairs), epochs=2, workers=1), tmp_path / "helped")
    np.testing.assert_array_equal(alone.plan.units[0].lengths.counts, helped.plan.units[0].lengths.counts)
    assert not list((tmp_path / "helped").rglob("*.part"))
    assert alone.total_steps() == helped.total_steps()
    np.testing.assert_array_equal(alone.plan.counts, helped.plan.counts)


def test_interrupted_count_goes_on(golden_dir, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(lengths, "CHUNK", 50)
    whole, calls = lengths.count, []

    def fails_late(source, prompts, builder, chunk):
        calls.append(chunk.start)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(source, prompts, builder, chunk)

    monkeypatch.setattr(lengths, "count", fails_late)
    with pytest.raises(KeyboardInterrupt):
        PackedData(config(golden_dir, tars(pairs)), tmp_path)
    PackedData(config(golden_dir, tars(pairs)), tmp_path)
    assert calls == [0, 50, 50, 100]


def test_identity_names_what_decides_the_batches(golden_dir, pairs, cache):
    def identity(**changes):
        return PackedData(config(golden_dir, tars(pairs), **changes), cache).identity

    base = identity()
    assert identity(workers=3, prefetch=5) == base
    different = [identity(**c) for c in ({"seed": 4}, {"batch_size": 4}, {"loss_weighting": "sqrt"}, {"max_tiles": 2})]
    assert len({base, *different}) == 5


def test_augmentation_differs_between_epochs_only(golden_dir, pairs, cache):
    data = PackedData(config(golden_dir, tars(pairs), jpeg_augment=True, epochs=2), cache)
    assert batch_hash(data.batch(1)) == batch_hash(data.batch(1))
    plain = PackedData(config(golden_dir, tars(pairs), epochs=2), cache).batch(1)
    difference = np.abs(data.batch(1)["patches"].astype(int) - plain["patches"])
    assert 0 < difference.mean() < 10


def test_user_errors_are_one_line(golden_dir, pairs, cache):
    with pytest.raises(DataError, match="at least the number of processes"):
        next(PackedData(config(golden_dir, tars(pairs)), cache).iterate(0, 8, 9))
    with pytest.raises(DataError, match="no token '<IMG_CONTEXT>'"):
        plain = cache / "plain"
        plain.mkdir()
        (plain / "tokenizer.model").write_bytes((golden_dir / "chat/tokenizer.model").read_bytes())
        PackedData(config(golden_dir, tars(pairs), tokenizer=str(plain)), cache)
    for changes, message in (
        ({"visul": 3}, "did you mean 'visual_tokens'"),
        ({"shuffle": "globl"}, "did you mean 'global'"),
        ({"visual_tokens": "8"}, "must be of type int"),
        ({"batch_size": 0}, "at least 1"),
        ({"max_piece": -5}, "max_piece is -5"),
        ({"epochs": 0}, "epochs is 0"),
        ({"max_aspect": 0.5}, "max_aspect is 0.5"),
        ({"sources": ["a.tar"]}, r"sources\[source0\] is 'a.tar'; it must be a dict"),
        ({"sources": {"a": {"spec": "a.tar"}}}, "'spec' is missing, a dict"),
        ({"sources": {"a": {"spec": {"kind": "tar"}, "prompts": [1]}}}, "a list of texts"),
        ({"tile_size": 57}, "not a multiple"),
        ({"tokenizer": ""}, "data.tokenizer is missing"),
    ):
        with pytest.raises(DataError, match=message):
            config(golden_dir, tars(pairs), **changes)
    with pytest.raises(DataError, match="every source or to none"):
        config(golden_dir, tars(pairs, weight=1.0), tars(pairs, "other"))


KILLER = """
import json, os, signal, sys
from data_pipelines.config import DataConfig
from data_pipelines.loading.loader import PackedData
from experiments.inspect_data import batch_hash

def main():
    settings, cache, kill_at = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    data = PackedData(DataConfig.from_dict(settings), cache)
    import psutil
    for step, batch in data.iterate(1):
        print(json.dumps([step, batch_hash(batch)]), flush=True)
        if step in kill_at:
            workers = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
            os.kill(workers[step % len(workers)].pid, signal.SIGKILL)
    print(json.dumps([data.report.samples, dict(data.report.skipped)]))

if __name__ == "__main__":
    main()
"""


def test_workers_change_nothing_even_when_killed(golden_dir, pairs, cache, tmp_path):
    """Real worker processes in a real program; one of them is killed on the way."""
    source = tars(pairs)
    settings = config(golden_dir, source, epochs=4)  # many more steps than are made ahead
    alone = PackedData(settings, cache)
    wanted = [[step, batch_hash(batch)] for step, batch in alone.iterate(1)]
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    values = {name: getattr(settings, name) for name in settings.__dataclass_fields__ if name != "sources"}
    values |= {"sources": [source], "workers": 2}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}
    command = [sys.executable, str(script), json.dumps(values), str(cache), json.dumps([3])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[:-1] == wanted
    assert lines[-1] == [alone.report.samples, dict(alone.report.skipped)]
    assert "a data worker died" in done.stderr


def test_closing_an_iterator_ends_its_workers(golden_dir, pairs, cache):
    data = PackedData(config(golden_dir, tars(pairs), workers=1), cache)
    iterator = data.iterate()
    next(iterator)
    started = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    assert started
    iterator.close()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive
