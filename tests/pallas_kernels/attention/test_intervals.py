"""Which keys a token sees, from segments, positions and images."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.contract import visible
from pallas_kernels.attention.intervals import packed_intervals, scattered_intervals

#                    0  1  2  3  4  5  6  7  8  9
SEGMENTS = np.array([1, 1, 1, 2, 2, 2, 2, 0, 0, 3])
VISUAL = np.array([0, 1, 1, 1, 1, 0, 1, 1, 0, 0], bool)


def intervals_of(segments: np.ndarray, visual: np.ndarray | None = None) -> tuple[list[int], list[int]]:
    found = packed_intervals(jnp.asarray(segments)[None], None if visual is None else jnp.asarray(visual)[None])
    return found.first[0].tolist(), found.last[0].tolist()


def test_causal_rows():
    first, last = intervals_of(SEGMENTS)
    assert first == [0, 0, 0, 3, 3, 3, 3, 7, 8, 9]
    assert last == list(range(10))


def test_images_end_with_their_run_and_with_their_sample():
    first, last = intervals_of(SEGMENTS, VISUAL)
    assert first == [0, 0, 0, 3, 3, 3, 3, 7, 8, 9]
    assert last == [0, 2, 2, 4, 4, 5, 6, 7, 8, 9]


def test_bounds_never_decrease():
    rng = np.random.default_rng(0)
    for _ in range(8):
        lengths = rng.integers(1, 9, 12)
        segments = np.repeat(np.where(rng.random(12) < 0.2, 0, np.arange(1, 13)), lengths)
        for visual in (None, (rng.random(len(segments)) < 0.6) & (segments > 0)):
            first, last = map(np.array, intervals_of(segments, visual))
            index = np.arange(len(segments))
            assert (np.diff(first) >= 0).all() and (np.diff(last) >= 0).all()
            assert (first <= index).all() and (index <= last).all()
            same = segments[:, None] == segments[None]
            seen = (first[:, None] <= index) & (index <= last[:, None])
            filled = segments > 0
            expected = same & filled & (index <= np.array(last)[:, None])
            np.testing.assert_array_equal(seen[filled], expected[filled])
            np.testing.assert_array_equal(seen[~filled], np.eye(len(segments), dtype=bool)[~filled])


def test_scattered_keys_are_seen_as_in_sequence_order():
    """Keys in any order, empty slots between them, and queries that are the last of each sample."""
    rng = np.random.default_rng(1)
    positions = np.concatenate([np.arange(3), np.arange(4), [0, 0, 0]])
    shuffled = rng.permutation(10)
    keys = tuple(jnp.asarray(a[shuffled])[None] for a in (positions, SEGMENTS))
    at = np.array([1, 2, 5, 6])
    queries = tuple(jnp.asarray(a[at])[None] for a in (positions, SEGMENTS))
    for visual in (None, VISUAL):
        straight = packed_intervals(jnp.asarray(SEGMENTS)[None], None if visual is None else jnp.asarray(visual)[None])
        reach = jnp.asarray(positions[at])[None] + (straight.last - jnp.arange(10))[:, at]
        seen = visible(scattered_intervals(queries, keys, reach), 10)[0]
        np.testing.assert_array_equal(seen, visible(straight, 10)[0][at][:, shuffled])
