import dataclasses

import numpy as np
import pytest

from data_pipelines.batch import TileGeometry
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.errors import DataError
from data_pipelines.packing import plan as module
from data_pipelines.packing.pack import pack
from data_pipelines.packing.plan import Plan
from data_pipelines.packing.units import Units


class FakeLengths:
    """Token counts that need no source."""

    def __init__(self, counts, reasons=()):
        self.counts, self.reasons = np.asarray(counts, np.int32), list(reasons)
        self.plain = bool((self.counts[:, 1] < 0).any())


def random_lengths(count, seed=0):
    rng = np.random.default_rng(seed)
    return FakeLengths(np.stack([rng.integers(0, 5, count) * 4, rng.integers(3, 30, count)], axis=1))


def plan_of(*lengths, weights=None, **changes) -> Plan:
    weights = weights or [None] * len(lengths)
    sources = tuple(SourceConfig(f"s{n}", {"kind": "tar"}, weight) for n, weight in enumerate(weights))
    config = DataConfig(sources, "none", visual_tokens=40, text_tokens=90, block_samples=50, batch_size=4, max_tiles=1)
    units = [Units(item, 20, 1) for item in lengths]
    return Plan(dataclasses.replace(config, **changes), units, geometry=TileGeometry(tile_size=56))


def units_of(plan, blocks):
    return [
        pair
        for number in blocks
        for pair in zip(plan.block(number).source.tolist(), plan.block(number).sample.tolist())
    ]


@pytest.mark.parametrize("shuffle", ["global", "local", "none"])
def test_every_sample_appears_once_per_epoch(shuffle):
    plan = plan_of(random_lengths(333), random_lengths(123, 1), shuffle=shuffle, local_runs=3, run_length=10)
    wanted = sorted([(0, n) for n in range(333)] + [(1, n) for n in range(123)])
    epochs = [units_of(plan, range(e * plan.blocks_per_epoch, (e + 1) * plan.blocks_per_epoch)) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == wanted
    assert epochs[0] != epochs[1]


def test_weighted_sources_are_walked_through_without_repeats():
    plan = plan_of(random_lengths(300), random_lengths(40, 1), weights=[1.0, 1.0])
    drawn = units_of(plan, range(8))
    second = [sample for source, sample in drawn if source == 1]
    assert abs(len(second) - len(drawn) / 2) <= 1
    counts = np.bincount(second, minlength=40)
    assert counts.max() - counts.min() <= 1


def test_rows_hold_what_they_can_and_are_all_found():
    plan = plan_of(random_lengths(400))
    total = plan.epoch_rows(0)
    places = [plan.locate(row) for row in range(total)]
    assert len(set(places)) == total
    for block in range(plan.blocks_per_epoch):
        packed = plan.block(block)
        assert [row for b, row in places if b == block] == list(range(packed.rows))
        for row in range(packed.rows):
            inside = slice(packed.starts[row], packed.starts[row + 1])
            assert packed.visual[inside].sum() <= 40 and packed.text[inside].sum() <= 90 and packed.sample[inside].size


def test_blocks_do_not_depend_on_what_was_asked_before():
    forward, backward = plan_of(random_lengths(400)), plan_of(random_lengths(400))
    backwards = [backward.block(number) for number in range(9, -1, -1)][::-1]
    for number, block in enumerate(backwards):
        for field in dataclasses.fields(block):
            np.testing.assert_array_equal(getattr(forward.block(number), field.name), getattr(block, field.name))


def test_seed_changes_the_order():
    assert units_of(plan_of(random_lengths(400)), [0]) != units_of(plan_of(random_lengths(400), seed=1), [0])


def test_last_epoch_ends():
    plan = plan_of(random_lengths(120), epochs=2)
    rows = plan.epoch_rows(0) + plan.epoch_rows(1)
    assert plan.locate(rows - 1) is not None and plan.locate(rows) is None
    assert plan_of(random_lengths(120)).locate(10 * rows) is not None


def test_bad_and_too_long_samples_are_left_out_and_named():
    counts = [[4, 5], [-1, 0], [44, 5], [4, 95], [-2, 0], [8, 6]]
    block = plan_of(FakeLengths(counts, ["no_caption", "image_too_small"])).block(0)
    assert sorted(block.sample.tolist()) == [0, 5]
    assert sorted(block.dropped) == [
        (0, 1, "no_caption"),
        (0, 2, "too_many_patches"),
        (0, 3, "too_long"),
        (0, 4, "image_too_small"),
    ]


def test_rows_with_ragged_boundaries_hold_that_many_tokens_of_both_kinds():
    sizes = [[20, 5], [4, 30], [0, 38], [44, 1], [0, 41], [30, 12]]
    plan = plan_of(FakeLengths(sizes), visual_tokens=40, text_tokens=40, boundary_block=8)
    assert plan.most_tokens == 40 - 7
    block = plan.block(0)
    assert sorted(block.sample.tolist()) == [0]
    assert sorted(reason for *_, reason in block.dropped) == ["too_long"] * 4 + ["too_many_patches"]
    exact = plan_of(FakeLengths(sizes), visual_tokens=40, text_tokens=40, boundary_block=4)
    assert exact.most_tokens == 40 and sorted(exact.block(0).sample.tolist()) == [0, 1, 2]


def test_text_is_cut_into_pieces_that_cover_it():
    lengths = FakeLengths([[0, -45], [0, -3], [0, -19], [0, 7]])
    plan = plan_of(lengths)  # pieces of at most 20, a begin token included
    block = plan.block(0)
    pieces = sorted(zip(block.sample.tolist(), block.piece.tolist(), block.text.tolist()))
    assert pieces == [(0, 0, 20), (0, 1, 20), (0, 2, 8), (1, 0, 4), (2, 0, 20), (3, 0, 7)]
    assert plan.epoch_units == 6


def test_counts_are_kept_and_can_be_restored(tmp_path):
    lengths = random_lengths(700)
    file = tmp_path / "plans" / "plan.npy"
    plan = plan_of(lengths)
    kept = Plan(plan.config, plan.units, file)
    rows = kept.epoch_rows(0)
    kept.save()

    def never(block):
        raise AssertionError("counted anew")

    for restored in (Plan(plan.config, plan.units, file), plan_of(lengths)):
        restored.block = never
        restored.restore(kept.counts)
        assert restored.epoch_rows(0) == rows
        assert restored.locate(rows - 1) == kept.locate(rows - 1)


def test_step_of_a_huge_plan_is_found_from_its_counts():
    """922 million samples, of which only the blocks that are asked for are looked at."""

    class Endless(FakeLengths):
        def __init__(self):
            super().__init__(random_lengths(1 << 16).counts)
            some = self.counts

            class Counts:
                def __len__(self):
                    return 922_000_000

                def __getitem__(self, at):
                    return some[at & 0xFFFF]

            self.counts, self.plain = Counts(), False

    plan = plan_of(Endless(), block_samples=16_384, batch_size=64)
    per_block = plan.block(0).rows
    plan.restore(np.full(plan.blocks_per_epoch, per_block))
    block, row = plan.locate(1_000_000 * 64)
    assert (block, row) == divmod(1_000_000 * 64, per_block)
    assert plan.block(block).sample.max() < 922_000_000


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(DataError, match="no usable sample"):
        plan_of(FakeLengths(np.zeros((0, 2))))
    with pytest.raises(DataError, match="no sample fits"):
        plan_of(FakeLengths([[400, 3]] * 9)).locate(0)


@pytest.mark.parametrize("shuffle", ["global", "local"])
def test_every_epoch_and_every_source_is_drawn_in_an_order_of_its_own(shuffle):
    """The first block of an epoch holds others than the first of the next; of equal sources, other samples."""
    plan = plan_of(random_lengths(1000), random_lengths(1000), shuffle=shuffle, local_runs=2, run_length=5)
    starts = [set(units_of(plan, [epoch * plan.blocks_per_epoch])) for epoch in range(3)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert len(starts[one] & starts[other]) < 15  # of 50
    for start in starts:
        first, second = ({sample for source, sample in start if source == number} for number in (0, 1))
        assert len(first) == len(second) == 25 and len(first & second) < 8


def test_a_source_walked_through_twice_in_an_epoch_has_two_orders():
    plan = plan_of(random_lengths(600), random_lengths(25, 1), weights=[1.0, 1.0])
    passes = [[sample for source, sample in units_of(plan, [block]) if source == 1] for block in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(25))
    drawn = [plan._drawn(block)[1].tolist() for block in range(2)]
    assert drawn[0] != drawn[1]


def test_the_order_of_drawing_is_pinned():
    """A changed order would change every run that resumes, without a word."""
    block = plan_of(random_lengths(12), random_lengths(9, 1), block_samples=10).block(1)
    assert list(zip(block.source.tolist(), block.sample.tolist())) == [
        (0, 1),
        (0, 8),
        (1, 2),
        (1, 8),
        (0, 4),
        (0, 0),
        (1, 4),
        (0, 7),
        (0, 3),
        (1, 3),
    ]
    assert block.starts.tolist() == [0, 4, 7, 10]


RAGGED = {"visual_tokens": 80, "text_tokens": 80, "boundary_block": 8}


@pytest.mark.parametrize(
    ("changes", "fits", "misfits"),
    [
        ({}, [[40, 5], [4, 90], [40, 90]], {(41, 5): "too_many_patches", (4, 91): "too_long"}),
        (RAGGED, [[40, 33], [0, 73], [20, 53]], {(40, 34): "too_long", (0, 74): "too_long", (73, 1): "too_long"}),
        ({**RAGGED, "boundary_block": 4}, [[40, 40], [0, 80]], {(41, 40): "too_long", (81, 0): "too_many_patches"}),
    ],
    ids=str,
)
def test_a_row_takes_what_just_fits(changes, fits, misfits):
    """A boundary at multiples of 8 may leave 7 slots of a row empty; one at multiples of a tile's 4 tokens none."""
    plan = plan_of(FakeLengths([*fits, *misfits]), **changes)
    block = plan.block(0)
    assert sorted(block.sample.tolist()) == list(range(len(fits)))
    assert sorted(block.dropped) == [(0, len(fits) + at, reason) for at, reason in enumerate(misfits.values())]


def test_drops_are_those_of_their_own_source_and_sample():
    """Reasons are numbered source by source."""
    one = FakeLengths([[4, 5], [-2, 0], [-1, 0]], ["no_caption", "image_too_small"])
    other = FakeLengths([[-1, 0], [4, 95], [-2, 0]], ["truncated_image", "no_image"])
    assert sorted(plan_of(one, other).block(0).dropped) == [
        (0, 1, "image_too_small"),
        (0, 2, "no_caption"),
        (1, 0, "truncated_image"),
        (1, 1, "too_long"),
        (1, 2, "no_image"),
    ]


def test_a_restored_plan_finds_step_a_million_by_packing_one_block(monkeypatch):
    """What the first batch of a resumed run costs does not grow with its step: work is counted, not time."""
    counts = np.random.default_rng(0).integers(8, 12, 450_000)
    plan = plan_of(random_lengths(333), random_lengths(4000, 1), weights=[2.0, 1.0])
    plan.restore(counts)
    packed, drawn = [], []
    monkeypatch.setattr(module, "pack", lambda *args: packed.append(len(args[0])) or pack(*args))
    monkeypatch.setattr(
        Plan, "_drawn", lambda plan, block, drawn_=Plan._drawn: drawn.append(block) or drawn_(plan, block)
    )
    step, size = 1_000_000, plan.config.batch_size
    places = [plan.locate(row) for row in range(step * size, (step + 1) * size)]
    blocks = {block for block, _ in places}
    assert places[0][0] == np.searchsorted(np.cumsum(counts), step * size, side="right") > 300_000
    for block in blocks:
        assert plan.block(block).rows > 0
    assert len(packed) == len(blocks) <= 2 and max(packed) <= 50
    assert set(drawn) <= {0, *blocks} and len(plan.counts) == len(counts)  # block 0 says which ways of packing suit
