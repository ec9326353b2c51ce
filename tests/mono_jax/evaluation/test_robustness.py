"""Changed pictures and arrangements, and files that are answered about or refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.patches import image_patches
from data_pipelines.encoding.tiling import Tiling
from data_pipelines.errors import BadSample
from mono_jax.evaluation.robustness.broken import BROKEN
from mono_jax.evaluation.robustness.changes import ARRANGEMENTS, CHANGES

READABLE = {
    "grey", "black and white", "palette", "transparent", "grey, transparent", "16 bit", "cmyk jpeg", "turned by exif",
    "progressive jpeg", "animated gif", "bmp", "tiff", "webp",
}  # fmt: skip


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((64, 48), Image.Resampling.NEAREST)


def apart(one: Image.Image, other: Image.Image) -> float:
    pixels = [np.asarray(image.resize((64, 48)), np.float64) for image in (one, other)]
    return float(np.abs(pixels[0] - pixels[1]).mean())


@pytest.mark.parametrize("name", CHANGES)
def test_levels_of_a_change_go_further_and_further_from_the_picture(name: str, picture: Image.Image):
    change = CHANGES[name]
    changed = [change.apply(picture, level, np.random.default_rng(1)) for level in change.levels]
    assert all(image.mode == "RGB" and min(image.size) > 0 for image in changed)
    if name == "stretched":  # which only the size shows
        assert [image.width for image in changed] == [round(64 * level) for level in change.levels]
        return
    if name == "in_a_corner":
        assert all(apart(picture, image.crop((0, 0, 64, 48))) == 0 for image in changed)
        assert [image.size for image in changed] == [(round(64 * n), round(48 * n)) for n in change.levels]
        return
    far = [apart(picture, image) for image in changed]
    assert far[0] < (15 if name == "compressed" else 1e-9), "the first level leaves it as it is"
    assert far == sorted(far) and far[-1] > far[0] + 5
    again = change.apply(picture, change.levels[-1], np.random.default_rng(1))
    assert apart(changed[-1], again) == 0, "decided by the seed"


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_an_arrangement_keeps_the_question_and_has_a_mark_for_each_picture(name: str):
    arrangement = ARRANGEMENTS[name]
    for level in arrangement.levels:
        text, pictures = arrangement.apply("what is it?", ["own"], ["a", "b"], level)
        assert "what is it?" in text and text.count("<image>") == len(pictures) and pictures[-1] == "own"
    first, _ = arrangement.apply("what is it?", ["own"], ["a"], arrangement.levels[0])
    assert first == "<image>\nwhat is it?"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_read_or_refused_by_name(name: str, picture: Image.Image):
    data = BROKEN[name](picture)
    try:
        patches = image_patches(data, Tiling(), ImageLimits())
    except BadSample as error:
        assert name not in READABLE and error.reason
    else:
        assert len(patches) and patches.dtype == np.uint8
        assert name in READABLE or "flipped" in name or "cut" in name
