"""Which blocks are visited, against the mask itself, and how much of the work in them is useful."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.contract import Intervals, visible
from pallas_kernels.attention.intervals import packed_intervals
from pallas_kernels.attention.spans import Spans, key_spans, query_spans
from pallas_kernels.checks.attention import AttentionCase, layouts

LENGTH = 96
CASES = {
    f"{layout}{'_images' * images}": {"layout": layout, "images": images}
    for layout in layouts(LENGTH)
    for images in (False, True)
}
CASES |= {f"part_{start}": {"queries": tuple(range(start, start + 32)), "images": True} for start in (0, 32, 64)}


def check(spans: Spans, blocks: np.ndarray) -> None:
    """``blocks`` bool [B, own blocks, blocks walked along, scores of a block]."""
    index = np.arange(blocks.shape[2])
    start, full_start, full_stop, stop = (np.asarray(bound)[..., None] for bound in spans)
    visited, unmasked = (start <= index) & (index < stop), (full_start <= index) & (index < full_stop)
    assert (start <= full_start).all() and (full_start <= full_stop).all() and (full_stop <= stop).all()
    np.testing.assert_array_equal(visited, blocks.any(axis=-1))
    np.testing.assert_array_equal(unmasked, blocks.all(axis=-1))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("block_q", "block_kv"), [(8, 16), (32, 8)])
def test_blocks_are_those_of_the_mask(name: str, block_q: int, block_kv: int):
    case = AttentionCase(length=LENGTH, **CASES[name])
    _, intervals, _, _ = case.inputs()
    seen = np.asarray(visible(intervals, case.length))
    batch, queries, keys = seen.shape
    blocks = seen.reshape(batch, queries // block_q, block_q, keys // block_kv, block_kv).transpose(0, 1, 3, 2, 4)
    by_query = blocks.reshape(*blocks.shape[:3], -1)
    check(key_spans(*intervals[:2], block_q, block_kv), by_query)
    check(query_spans(*intervals[:2], keys, block_q, block_kv), by_query.swapaxes(1, 2))


def s11_rows() -> Intervals:
    """Rows of 10,240 + 1,024 slots with 8 samples of unequal lengths that fill them but for a few slots."""
    rng = np.random.default_rng(0)
    lengths = rng.multinomial(11_264 - 40, rng.dirichlet(np.full(8, 8.0)), size=4)
    segments = np.stack([np.repeat(np.arange(1, 10) % 9, [*row, 40]) for row in lengths])
    return packed_intervals(jnp.asarray(segments, jnp.int32))


@pytest.mark.parametrize(
    ("kernel", "block_q", "block_kv"),
    [("forward and dquery", 128, 128), ("dquery", 128, 64), ("dkeys", 64, 128), ("xla_blocked on CPUs", 128, 128)],
)
def test_visited_scores_are_within_a_third_of_the_useful_ones(kernel: str, block_q: int, block_kv: int):
    """Causal kernels that know nothing of samples make 8 times as many, all scores 16 times."""
    intervals = s11_rows()
    useful = int((intervals.last - intervals.first + 1).sum())
    bounds = intervals.first, intervals.last
    if kernel == "dkeys":
        spans = query_spans(*bounds, 11_264, block_q, block_kv)
    else:
        spans = key_spans(*bounds, block_q, block_kv)
    visited = int((spans.stop - spans.start).sum()) * block_q * block_kv
    assert useful < visited < 1.3 * useful
