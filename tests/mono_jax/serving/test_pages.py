"""Pages are never given to two requests unless their content is equal, and no page is lost."""

from __future__ import annotations

import numpy as np
import pytest

from mono_jax.generation.prompts import Prompt, check_prompt
from mono_jax.models.architecture import RopeScaling
from mono_jax.models.presets import preset
from mono_jax.serving.pages import Contents, Pages
from tests.mono_jax.generation.test_decode import IMAGE

MONO = preset("tiny_mono")


@pytest.mark.parametrize("seed", range(5))
def test_random_holders(seed: int) -> None:
    """A model of the pages: which request holds which page, and what was written to each."""
    rng = np.random.default_rng(seed)
    pages = Pages(20)
    held: list[list[int]] = []
    written: dict[int, bytes] = {}
    for _ in range(2000):
        if rng.random() < 0.55:
            chain = [bytes([int(rng.integers(4)), n]) for n in range(int(rng.integers(0, 6)))]
            found = pages.found(chain)
            assert [written[page] for page in found] == chain[: len(found)]
            new = pages.take(int(rng.integers(1, 6)))
            if new is None:
                pages.release(found)
                continue
            assert not {page for of_one in held for page in of_one} & set(new)
            for page in new:
                written[page] = b""
            for page, content in zip(new, chain[len(found) :]):
                written[page] = content
                pages.fill(page, content)
            held.append(found + new)
        elif held:
            pages.release(held.pop(int(rng.integers(len(held)))))
        assert pages.used == len({page for of_one in held for page in of_one})
        assert pages.used + pages.reusable + len(pages._free) == pages.count
    for of_one in held:
        pages.release(of_one)
    assert pages.used == 0
    assert len(pages.take(20)) == 20
    assert pages.take(1) is None


def test_the_longest_unused_is_given_away_first() -> None:
    pages = Pages(3)
    for content in (b"a", b"b", b"c"):
        [page] = pages.take(1)
        pages.fill(page, content)
        pages.release([page])
    pages.release(pages.found([b"a"]))
    pages.take(1)
    assert [bool(pages.found([content])) for content in (b"a", b"b", b"c")] == [True, False, True]


def contents(
    ids: list[int], image: np.ndarray | None = None, cells: np.ndarray | None = None, **changes
) -> list[bytes]:
    config = MONO.replace(**changes)
    return Contents(config, check_prompt(config, Prompt(ids, image, cells), ""), 4).digests


def test_equal_contents_are_equal_tokens_pixels_and_angles() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 256, (2, 16, 8, 8, 3), np.uint8)
    ids = [1, 2, *[IMAGE] * 16, 3, 4]
    first = contents(ids, one)
    assert len(first) == 5
    assert contents([*ids, 5, 6], one)[:5] == first
    changed = one.copy()
    changed[15, 7, 7, 2] ^= 1  # the last pixel counts for all pages that the image touches
    for different in (contents(ids, other), contents(ids, changed), contents([2, *ids[1:]], one)):
        assert not set(different) & set(first)
    assert not set(contents(ids, one, np.arange(16)[::-1].copy())) & set(first)
    assert contents([*range(1, 9)])[0] == contents([1, 2, 3, 4, 9, 9, 9, 9])[0]
    # Beyond the trained length, dynamic RoPE rotates all keys by angles of the whole length.
    scaled = {"rope_scaling": RopeScaling("dynamic", 2.0), "max_position_embeddings": 8}
    assert contents([*range(1, 9)], **scaled)[0] == contents([*range(1, 7)], **scaled)[0]
    assert contents([*range(1, 10)], **scaled)[0] != contents([*range(1, 9)], **scaled)[0]
    assert contents([*range(1, 10)], **scaled)[0] != contents([*range(1, 11)], **scaled)[0]


@pytest.mark.parametrize("name", ["tiny_mono", "tiny_modular"])
@pytest.mark.parametrize("runs", [(16, 16), (32,), (8, 24), (8, 8, 16), (4, 20, 8)])
def test_a_page_is_known_by_all_pixels_that_its_keys_depend_on(name: str, runs: tuple[int, ...]) -> None:
    """Visual tokens of one tile may stand apart; an encoder still mixes all of its pixels."""
    config, tile = preset(name), 16
    ids = [token for count in runs for token in (*[IMAGE] * count, 1, 2, 3, 4)]
    runs_of = np.repeat(np.arange(len(runs)), runs)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), np.uint8)

    def digests(image: np.ndarray) -> list[bytes]:
        return Contents(config, check_prompt(config, Prompt(ids, image), ""), 4).digests

    before = digests(pixels)
    for changed in range(32):
        other = pixels.copy()
        other[changed, 0, 0, 0] ^= 1
        together = runs_of == runs_of[changed]
        if not config.is_monolithic:
            together |= np.arange(32) // tile == changed // tile
        first = int(np.argmax(together))
        page = (first + 4 * int(runs_of[first])) // 4
        same = [old == new for old, new in zip(before, digests(other))]
        assert not any(same[page:]), changed


@pytest.mark.parametrize("limit", [512, 8])
def test_answers_are_contents_too(limit: int) -> None:
    """As if they had been in the prompt, but not beyond the length from which their angles would change."""
    config = MONO.replace(rope_scaling=RopeScaling("dynamic", 2.0), max_position_embeddings=limit)
    answered = Contents(config, check_prompt(config, Prompt([1, 2, 3]), ""), 4)
    for part in ([4, 5], [6], [7, 8, 9, 10, 11, 12]):
        answered.add(part)
    whole = Contents(config, check_prompt(config, Prompt([*range(1, min(limit, 12) + 1)]), ""), 4)
    assert answered.digests == whole.digests
    assert len(answered.digests) == min(limit, 12) // 4
