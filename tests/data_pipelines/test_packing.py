import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.capacity import suggest, try_capacity
from data_pipelines.images import Tiling
from data_pipelines.packing import STYLES, best_styles, least_rows, pack


def lognormal(rng, count, median, spread, low, high):
    return np.clip(np.exp(rng.normal(np.log(median), spread, count)), low, high).astype(int)


def image_tokens(rng, count, max_tiles, median=480):
    """Sizes as in web crawls: edges around `median` pixels, many squares."""
    edge, aspect = np.exp(rng.normal(np.log(median), 0.55, count)), np.exp(rng.normal(0.12, 0.38, count))
    aspect[rng.random(count) < 0.18] = 1
    sizes = np.clip(np.stack([edge * np.sqrt(aspect), edge / np.sqrt(aspect)], axis=1), 32, 6000)
    return Tiling(max_tiles=max_tiles).tokens(sizes.astype(int))


def stage(name, count, seed=0):
    """(visual, text) tokens like those of a stage: template and prompt take some 60 text tokens."""
    rng = np.random.default_rng(seed)
    if name == "S1.1":
        return image_tokens(rng, count, 4), 60 + lognormal(rng, count, 14, 0.7, 2, 300)
    if name == "S1.2":
        return image_tokens(rng, count, 6), 60 + lognormal(rng, count, 30, 0.4, 5, 300)
    if name == "S1.3":
        kinds = rng.choice(3, count, p=[0.539, 0.052, 0.409])
        lengths = [
            lognormal(rng, count, 30, 0.4, 5, 300),
            lognormal(rng, count, 80, 0.7, 10, 800),
            lognormal(rng, count, 90, 0.8, 3, 1200),
        ]
        return image_tokens(rng, count, 12, 800), 60 + np.choose(kinds, lengths)
    visual, text = image_tokens(rng, count, 24, 800), 60 + lognormal(rng, count, 180, 0.8, 10, 2500)
    visual[rng.random(count) < 0.25] = 0
    return visual, text


def occupied(rows, visual, text, slots):
    count = rows.max() + 1
    return visual.sum() / (count * slots[0]), text.sum() / (count * slots[1])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=80),
    st.sampled_from(STYLES),
)
def test_rows_hold_what_they_are_given(samples, style):
    visual, text = np.array(samples).T
    rows = pack(visual, text, 40, 30, [style])
    assert rows.dtype == np.int32 and len(rows) == len(samples) and rows.min() == 0
    assert set(rows) == set(range(rows.max() + 1))
    assert np.bincount(rows, visual).max() <= 40 and np.bincount(rows, text).max() <= 30
    np.testing.assert_array_equal(rows, pack(visual, text, 40, 30, [style]))


def test_nothing_packs_into_nothing():
    assert len(pack(np.zeros(0, int), np.zeros(0, int), 8, 8)) == 0


def test_text_alone_needs_no_visual_slots():
    text = lognormal(np.random.default_rng(0), 4000, 300, 1.0, 5, 2048)
    rows = pack(np.zeros_like(text), text, 0, 4096)
    assert text.sum() / ((rows.max() + 1) * 4096) > 0.97


@pytest.mark.parametrize(("name", "slots"), [("S1.1", 12288), ("S1.2", 12288), ("S1.3", 24576), ("S2", 16384)])
def test_stages_fill_97_percent_of_visual_and_90_of_text_slots(name, slots):
    """With V and T suggested on one sample of the mixture and blocks drawn anew."""
    best = suggest(*stage(name, 8192), slots, 256)[0]
    assert best.visual % 256 == 0 and best.visual + best.text <= slots
    visual, text = stage(name, 16384, seed=1)
    fits = (visual <= best.visual) & (text <= best.text)
    assert fits.mean() > 0.99
    visual, text = visual[fits], text[fits]
    styles = best_styles(visual[:8192], text[:8192], best.visual, best.text)
    rows = pack(visual, text, best.visual, best.text, styles)
    reached = occupied(rows, visual, text, (best.visual, best.text))
    assert reached[0] >= 0.97 and reached[1] >= 0.90, (best, reached)


def test_blocks_packed_alone_cost_under_half_a_percent():
    visual, text = stage("S1.1", 4 * 16384)
    slots = 8192, 1072
    styles = best_styles(visual[:16384], text[:16384], *slots)
    together = pack(visual, text, *slots, styles).max() + 1
    alone = sum(pack(v, t, *slots, styles).max() + 1 for v, t in zip(visual.reshape(4, -1), text.reshape(4, -1)))
    assert alone <= 1.005 * together


def test_capacity_counts_what_does_not_fit():
    visual, text = np.array([4, 4, 4, 9]), np.array([5, 5, 5, 5])
    capacity = try_capacity(visual, text, 8, 10)
    assert capacity.dropped == 0.25 and capacity.samples_per_row == 1.5
    assert capacity.visual_occupancy == 12 / 16 and capacity.text_occupancy == 15 / 20
    assert capacity.bound >= capacity.occupancy
    assert least_rows(visual[:3], text[:3], 8, 10) == 2
