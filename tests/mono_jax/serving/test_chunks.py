"""Chunks contain every token of a prompt once, in its place, and fit the existing programs."""

from __future__ import annotations

import numpy as np
import pytest

from mono_jax.generation.prompts import Prompt, check_prompt
from mono_jax.models.presets import preset
from mono_jax.serving.chunks import Part, Reading
from tests.mono_jax.generation.test_decode import IMAGE, prompt

SIZES, BLOCK = (8, 16, 32, 64), 16  # the smallest chunk is half a block


def parts_of(reading: Reading, start: int = 0) -> list[Part]:
    parts = []
    while start < len(reading.ids):
        parts.append(reading.part(start))
        start = parts[-1].stop
    return parts


@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_token_is_read_once(bidirectional: bool) -> None:
    config = preset("tiny_mono", bidirectional_images=bidirectional)
    rng = np.random.default_rng(0)
    for _ in range(60):
        pattern = "".join(rng.choice(["t", "tt", "ttttt", "It"], rng.integers(1, 8))) + "t"
        given = check_prompt(config, prompt(pattern), "")
        reading = Reading(config, given, SIZES, BLOCK)
        ids, is_visual = np.asarray(given.input_ids), np.asarray(given.input_ids) == IMAGE
        start = int(rng.integers(0, len(ids))) if not bidirectional else 0
        read: list[int] = []
        for part in parts_of(reading, start):
            chunk = reading.chunk(part, row=3, is_scored=False)
            assert chunk.tokens.size == part.size in SIZES
            assert chunk.boundary[0] % min(BLOCK, part.size) == 0
            count = part.stop - part.start
            assert sorted(chunk.order[0]) == list(range(part.size))
            assert chunk.segments[0].tolist() == [1] * count + [0] * (part.size - count)
            for place, slot in enumerate(chunk.order[0, :count], part.start):
                assert (slot < chunk.boundary[0]) == is_visual[place]
                if is_visual[place]:
                    assert chunk.feature + slot == is_visual[:place].sum()
                else:
                    assert chunk.tokens[slot - chunk.boundary[0]] == ids[place]
                assert chunk.positions[0, place - part.start] == place
            if bidirectional and part.stop < len(ids):
                assert not (is_visual[part.stop - 1] and is_visual[part.stop])
            text = part.start + np.flatnonzero(~is_visual[part.start : part.stop])
            wanted = [(n + 1, ids[n + 1]) for n in text if n + 1 < len(ids) and not is_visual[n + 1]]
            assert [(n, t) for n, t in zip(reading.scored(part), chunk.targets[chunk.targets >= 0])] == wanted
            assert chunk.is_last == (part.stop == len(ids))
            read += range(part.start, part.stop)
        assert read == list(range(start, len(ids)))
        assert chunk.tokens[chunk.end] == ids[-1]


def test_little_is_padding() -> None:
    """Of the last chunks less than a quarter, but for less than the smallest one."""
    config = preset("tiny_lm")
    for length in range(1, 200):
        reading = Reading(config, check_prompt(config, Prompt([5] * length), ""), SIZES, BLOCK)
        parts = parts_of(reading)
        assert sum(part.size for part in parts) < max(length / 0.75, length + SIZES[0])
        assert len(parts) <= length // SIZES[-1] + len(SIZES)


def test_an_image_that_is_seen_whole_has_a_length() -> None:
    whole = preset("tiny_mono", bidirectional_images=True)
    for config, longest in ((whole, 32), (preset("tiny_mono"), 0)):
        reading = Reading(config, check_prompt(config, prompt("tItIIt"), ""), SIZES, BLOCK)
        assert reading.longest_image() == longest
