"""Synthetic images for the data benchmark: photographs, a screenshot, and a shard of photographs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.recipes.shard_writer import ShardWriter

CAPTION = "a wooden boat lies on the shore of a lake, mountains in the background"


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise whose amplitude decreases with frequency, as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / max(width, height)
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency**1.45
    spectrum = spectrum * 0.35 + spectrum[:1] * 0.65  # colour channels are correlated
    pixels = np.fft.irfft2(spectrum, s=(height, width))
    pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def screenshot(width: int, height: int) -> Image.Image:
    """Black text on white, where shortcuts in resizing are most visible."""
    image = Image.new("RGB", (width, height), "white")
    font, draw = ImageFont.load_default(14), ImageDraw.Draw(image)
    for line in range(0, height, 18):
        draw.text((8, line), (CAPTION + "  " + str(line) + "  ") * 4, "black", font)
    return image


def write_shard(folder: Path, count: int, size: tuple[int, int]) -> str:
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "shard") as writer:
        for _ in range(count):
            buffer = io.BytesIO()
            photograph(rng, *size).save(buffer, "JPEG", quality=88)
            writer.write(buffer.getvalue(), CAPTION, size=size)
    return str(folder / "shard" / "*.tar")
