"""OCR (S1.3): sentences rendered in lines, so that every letter is known.

The sentences come from the docstrings of installed packages (``prose.py``); the font is Pillow's built-in font.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.errors import BadSample
from data_pipelines.recipes import prose
from data_pipelines.recipes.parts import Counts, sample_rng, skip_counts
from data_pipelines.recipes.real.catalogue import PICTURE_SIZES, Options, Recipe
from data_pipelines.recipes.shard_writer import ShardWriter, encode_image

PROMPT = "read the text in the image"
_MARGIN = 20
_LINE_HEIGHT = 1.3  # times the size of the font


def _write_ocr(options: Options, folder: Path, roots: list[Path]) -> Counts:
    sentences = [p for document in prose.documents(packages=prose.PACKAGES[:3]) for p in document.paragraphs]
    skipped: Counter[str] = Counter()
    with ShardWriter(folder) as writer:
        for index in range(options.count(options.ocr)):
            try:
                image, text = draw_page(sentences, sample_rng(options.seed, "ocr", index))
            except BadSample as error:
                skipped[error.reason] += 1
                continue
            writer.write(encode_image(image, quality=90), text, size=image.size, url="rendered text")
    return {"pairs": writer.samples, **skip_counts(skipped)}


def draw_page(sentences: Sequence[str], rng: np.random.Generator) -> tuple[Image.Image, str]:
    """A page with up to eight lines of one of the sentences in one size and colour, and its text with line breaks.

    Raises BadSample ("text_too_wide") if the first word does not fit.
    """
    width, height = PICTURE_SIZES[int(rng.integers(len(PICTURE_SIZES)))]
    dark_on_light = bool(rng.integers(5))  # four times out of five
    shades = (rng.integers(200, 256, size=3), rng.integers(0, 90, size=3))
    paper, ink = (tuple(int(v) for v in shade) for shade in (shades if dark_on_light else shades[::-1]))
    image = Image.new("RGB", (width, height), paper)
    font = ImageFont.load_default(int(rng.integers(18, 49)))
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels come with FreeType
    words = sentences[int(rng.integers(len(sentences)))].split()
    max_lines = min(8, int((height - 2 * _MARGIN) / (_LINE_HEIGHT * font.size)))
    lines = _wrap(words, font, width - 2 * _MARGIN, max_lines)
    text = "\n".join(lines)
    if not text:
        raise BadSample("text_too_wide", detail=words[0])
    y = int(rng.integers(_MARGIN, max(_MARGIN + 1, height - _MARGIN - int(len(lines) * font.size * _LINE_HEIGHT))))
    ImageDraw.Draw(image).multiline_text((_MARGIN, y), text, fill=ink, font=font, spacing=font.size * 0.15)
    return image, text


def _wrap(words: Sequence[str], font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> list[str]:
    """Lines of at most ``width`` pixels; they end before a word that does not fit on a line of its own."""
    lines: list[str] = []
    line = ""
    for word in words:
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        line = word
        if len(lines) == max_lines or font.getlength(word) > width:
            return lines
    return [*lines, line] if line else lines


RECIPES: dict[str, Recipe] = {"ocr": _write_ocr}
