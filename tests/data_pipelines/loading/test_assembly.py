import contextlib

import numpy as np
import pytest

from data_pipelines.batch import BatchSpec, boundaries
from data_pipelines.encoding.samples import Sample, SampleBuilder
from data_pipelines.errors import BadSample, DataError
from data_pipelines.loading.assembly import fill_row
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.sources.source import open_source
from tests.made_sets import GEOMETRY, config, packed, talk_source, tars, write_pairs


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


RAGGED = {"visual_tokens": 320, "text_tokens": 240, "boundary_block": 16}


@pytest.mark.parametrize(
    ("weighting", "changes"), [("token", {}), ("sample", {}), ("sqrt", {}), ("token", RAGGED)], ids=str
)
def test_rows_hold_the_samples_one_after_another(golden_dir, talks, pairs, cache, weighting, changes):
    settings = config(golden_dir, talk_source(talks), tars(pairs), loss_weighting=weighting, **changes)
    data, builder = packed(settings, cache), SampleBuilder(settings, geometry=GEOMETRY)
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


def test_ragged_boundaries_suit_any_mix(golden_dir, talks, pairs, cache):
    """Rows of text only and of images nearly only, all of them full."""
    settings = config(golden_dir, talk_source(talks), tars(pairs), batch_size=2, block_samples=256, **RAGGED)
    data = packed(settings, cache)
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


def test_a_bad_sample_changes_nothing_else(golden_dir, tmp_path, cache):
    """Two sets whose images differ in one file only: the same rows, but for its slots."""
    for name, broken in (("good", ()), ("bad", (3,))):
        write_pairs(tmp_path / name, 60, broken=broken)
    good, bad = (packed(config(golden_dir, tars(tmp_path / name)), cache) for name in ("good", "bad"))
    assert good.identity != bad.identity
    for step in range(good.total_steps()):
        ours, theirs = good.batch(step), bad.batch(step)
        assert good.sample_keys(step) == bad.sample_keys(step)
        for row in range(good.batch_size):
            segments = set(ours["segments"][row]) - set(theirs["segments"][row])
            kept = [s for s in naive_with_segments(good, ours, row) if s[0] not in segments]
            assert repr(kept) == repr(naive_with_segments(bad, theirs, row))
    assert bad.report.skipped == {"truncated_image": 1} and bad.report.samples == good.report.samples - 1


def naive_with_segments(data, batch, row):
    numbers = [int(n) for n in np.unique(batch["segments"][row]) if n]
    return [(number, sample["ids"], sample["learnt"]) for number, sample in zip(numbers, naive_row(data, batch, row))]


def test_text_only_fills_rows(golden_dir, tmp_path, cache):
    (tmp_path / "a.txt").write_text("the grey sea and some green hill near water\n\n" * 400)
    source = {"name": "prose", "spec": {"kind": "text", "paths": str(tmp_path / "a.txt")}}
    data = packed(config(golden_dir, source, visual_tokens=0, text_tokens=128), cache)
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


def test_samples_are_numbered_from_one_and_bad_ones_keep_their_number():
    spec = BatchSpec(8, 8, 2)
    batch = spec.empty(2)
    one, other = (
        Sample(
            key="k",
            input_ids=np.arange(10, 10 + length, dtype=np.int32),
            visual=np.arange(length) == 1,
            loss_mask=np.ones(length, np.float32),
            patches=np.zeros((1, 2, 2, 3), np.uint8),
            patch_cells=np.zeros(1, np.int32),
        )
        for length in (3, 4)
    )
    fill_row(batch, 0, [one, None, other], 8, "token")
    assert batch["segments"][0].tolist() == [1] * 3 + [3] * 4 + [0] * 9
    assert batch["positions"][0].tolist() == [0, 1, 2, 0, 1, 2, 3] + [0] * 9
    assert batch["order"][0].tolist() == [8, 0, 9, 10, 1, 11, 12, *range(2, 8), 13, 14, 15]
    assert batch["tokens"][0].tolist() == [10, 12, 10, 12, 13, 0, 0, 0]
    assert batch["targets"][0].tolist() == [11, 0, 11, 13, 0, 0, 0, 0]
    assert batch["loss_weights"][0].tolist() == [1, 0, 1, 1, 0, 0, 0, 0], "the last token of a sample has no target"
    for name, array in spec.empty(1).items():
        np.testing.assert_array_equal(batch[name][1], array[0], err_msg=name)
