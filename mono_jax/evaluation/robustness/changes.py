"""Ways in which a question about a picture gets harder, each with levels from none to severe.

A change of the picture keeps the question and its answer valid, as long as it does not hide what the question is
about: what counts is the curve of right answers over the levels, not its end. A change of the arrangement leaves the
picture unchanged and moves it, or adds other pictures or text.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from data_pipelines.encoding.chat import IMAGE

Level = float
_GREY = (128, 128, 128)
_PIECES, _PIECE_WORDS = 4, 10  # of interleaved text
_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "along", "the", "river")


@dataclasses.dataclass(frozen=True)
class Change:
    """``apply(picture, level, rng)``, and the meaning of the levels; the first one leaves the picture unchanged."""

    levels: Sequence[Level]
    unit: str
    apply: Callable[[Image.Image, Level, np.random.Generator], Image.Image]


def scaled(picture: Image.Image, edge: int) -> Image.Image:
    """``picture`` resized to a shorter edge of ``edge`` pixels."""
    factor = edge / min(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _blurred(picture: Image.Image, level: Level, rng: np.random.Generator) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(level / 100 * min(picture.size)))


def _noisy(picture: Image.Image, level: Level, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(picture, np.float32) + rng.normal(0, level, (picture.height, picture.width, 3))
    return Image.fromarray(np.uint8(np.clip(pixels, 0, 255)))


def _compressed(picture: Image.Image, level: Level, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(100 - level))
    return Image.open(buffer).convert("RGB")


def _dark(picture: Image.Image, level: Level, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(1 - level / 100)


def _rotated(picture: Image.Image, level: Level, rng: np.random.Generator) -> Image.Image:
    return picture.rotate(level, Image.Resampling.BICUBIC, expand=True, fillcolor=_GREY)


def _covered(picture: Image.Image, level: Level, rng: np.random.Generator) -> Image.Image:
    """Squares of an eighth of the shorter edge, until ``level`` percent are covered."""
    side = max(1, min(picture.size) // 8)
    columns, rows = -(-picture.width // side), -(-picture.height // side)
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    for cell in rng.permutation(columns * rows)[: round(level / 100 * columns * rows)]:
        x, y = cell % columns * side, cell // columns * side
        draw.rectangle((x, y, x + side - 1, y + side - 1), fill=_GREY)
    return picture


def _coarse(picture: Image.Image, level: Level, rng: np.random.Generator) -> Image.Image:
    """Scaled down, and back up to the original size."""
    size = tuple(max(1, round(edge / level)) for edge in picture.size)
    return picture.resize(size, Image.Resampling.BICUBIC).resize(picture.size, Image.Resampling.BICUBIC)


def _in_a_corner(picture: Image.Image, level: Level, rng: np.random.Generator) -> Image.Image:
    canvas = Image.new("RGB", tuple(round(edge * level) for edge in picture.size), _GREY)
    canvas.paste(picture, (0, 0))
    return canvas


def _stretched(picture: Image.Image, level: Level, rng: np.random.Generator) -> Image.Image:
    return picture.resize((round(picture.width * level), picture.height), Image.Resampling.BICUBIC)


def _written_over(picture: Image.Image, level: Level, rng: np.random.Generator) -> Image.Image:
    """``level`` lines of dark text, smaller the more there are: from edge to edge, as on a dense page."""
    if not level:
        return picture
    picture, pitch = picture.copy(), picture.height / level
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(4, round(min(picture.height / 10, pitch))))
    for line in range(int(level)):
        words = " ".join(_WORDS[int(i)] for i in rng.integers(len(_WORDS), size=12 + 2 * int(level)))
        draw.text((0, (line + 0.2) * pitch), words, fill=(20, 20, 20), font=font)
    return picture


CHANGES: Mapping[str, Change] = {
    "blurred": Change((0, 1, 2, 4, 8), "radius, % of the edge", _blurred),
    "noisy": Change((0, 10, 25, 50, 100), "standard deviation, of 255", _noisy),
    "compressed": Change((0, 50, 80, 90, 97), "100 - JPEG quality", _compressed),
    "dark": Change((0, 40, 60, 80, 90), "% darker", _dark),
    "rotated": Change((0, 5, 15, 45, 90), "degrees", _rotated),
    "covered": Change((0, 10, 25, 50, 75), "% covered", _covered),
    "coarse": Change((1, 2, 4, 8, 16), "times fewer pixels a side", _coarse),
    "in_a_corner": Change((1, 1.5, 2, 3, 4), "edge of the canvas, in edges of the picture", _in_a_corner),
    "stretched": Change((1, 1.5, 2, 4, 8), "times wider", _stretched),
    "written_over": Change((0, 1, 2, 4, 8, 16, 24, 40), "lines of text", _written_over),
}


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """``apply(question, pictures, others, level)`` returns the question with ``<image>``s, and the pictures in order.

    others_edge: the shorter edge, in pixels, that other questions' pictures are reduced to; None = unchanged.
    """

    levels: Sequence[Level]
    unit: str
    apply: Callable[[str, Sequence[Any], Sequence[Any], Level], tuple[str, list[Any]]]
    others_edge: int | None = None


def _text_between(question: str, own: Sequence[Any], others: Sequence[Any], level: Level) -> tuple[str, list[Any]]:
    filler = _filler(int(level))
    return f"{_marks(own)}\n{filler}\n{question}" if filler else f"{_marks(own)}\n{question}", list(own)


def _picture_last(question: str, own: Sequence[Any], others: Sequence[Any], level: Level) -> tuple[str, list[Any]]:
    return (f"{question}\n{_marks(own)}" if level else f"{_marks(own)}\n{question}"), list(own)


def _other_pictures(question: str, own: Sequence[Any], others: Sequence[Any], level: Level) -> tuple[str, list[Any]]:
    """Pictures of other questions come first; the question is about the last one."""
    before = _first(others, int(level))
    return f"{_marks([*before, *own])}\n{question}", [*before, *own]


def _many_tiny(question: str, own: Sequence[Any], others: Sequence[Any], level: Level) -> tuple[str, list[Any]]:
    """``level`` pictures in total: the question's own comes last and unchanged, the others are tiny."""
    return _other_pictures(question, own, others, level - 1)


def _interleaved(question: str, own: Sequence[Any], others: Sequence[Any], level: Level) -> tuple[str, list[Any]]:
    """The same pictures and the same text in another order: ``level`` percent of the text is between pictures.

    The pictures are ``_PIECES`` of other questions, followed by the question's own; the text is ``_PIECES`` pieces of
    ``_PIECE_WORDS`` words. Text that is not between two pictures precedes all of them.
    """
    before = _first(others, _PIECES)
    gaps = [int((gap + 1) * level / 100) - int(gap * level / 100) for gap in range(len(before))]  # spread evenly
    pieces = [_filler(_PIECE_WORDS)] * _PIECES
    lines = pieces[sum(gaps) :]
    for between in gaps:
        lines += [IMAGE, *pieces[:between]]
    return "\n".join([*lines, _marks(own), question]), [*before, *own]


def _first(others: Sequence[Any], count: int) -> list[Any]:
    return [others[i % len(others)] for i in range(count)] if others else []


def _filler(words: int) -> str:
    return " ".join(_WORDS[i % len(_WORDS)] for i in range(words))


def _marks(pictures: Sequence[Any]) -> str:
    return "\n".join([IMAGE] * len(pictures))


ARRANGEMENTS: Mapping[str, Arrangement] = {
    "text_between": Arrangement((0, 10, 50, 200), "words between picture and question", _text_between),
    "picture_last": Arrangement((0, 1), "0 = before, 1 = after the question", _picture_last),
    "other_pictures": Arrangement((0, 1, 2, 4), "pictures before the one that is asked about", _other_pictures),
    "many_tiny": Arrangement((1, 2, 4, 8, 16, 32, 64), "pictures, all but the last tiny", _many_tiny, others_edge=16),
    "interleaved": Arrangement((0, 25, 50, 75, 100), "% of 40 words between 5 pictures, not before", _interleaved),
}
