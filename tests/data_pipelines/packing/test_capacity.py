import numpy as np
import pytest

from data_pipelines.packing.capacity import suggest, try_capacity

RNG = np.random.default_rng(0)
VISUAL, TEXT = RNG.integers(1, 4, 400) * 16, RNG.integers(5, 40, 400)


def test_what_a_capacity_reaches_is_bounded():
    found = try_capacity(VISUAL, TEXT, 256, 192)
    assert found.dropped == 0 and 0 < found.occupancy <= found.bound <= 1
    assert try_capacity(VISUAL, TEXT, 40, 192).dropped == pytest.approx(np.mean(VISUAL > 40))
    assert try_capacity(VISUAL, TEXT, 8, 192).dropped == 1


def test_suggestions_fit_and_the_best_comes_first():
    found = suggest(VISUAL, TEXT, 512, 16)
    assert all(c.visual_tokens % 16 == 0 and c.visual_tokens + c.text_tokens <= 512 for c in found)
    assert [c.merit for c in found] == sorted((c.merit for c in found), reverse=True)
    for slots, text_tokens in ((100, 96), (4095, 4080), (4096, 4096), (4200, 4160)):
        [text_only] = suggest(np.zeros(50, int), TEXT[:50], slots, 16)
        assert (text_only.visual_tokens, text_only.text_tokens) == (0, text_tokens)


def test_suggestions_are_pinned():
    """Also of a mixture of which a part has no images."""
    visual = np.where(np.arange(400) % 4, VISUAL, 0)
    found = [(c.visual_tokens, c.text_tokens) for c in suggest(visual, TEXT, 512, 16)]
    assert found[:3] == [(192, 176), (160, 144), (176, 160)] and len(found) == 16
