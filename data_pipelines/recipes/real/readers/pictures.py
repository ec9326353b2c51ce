"""Pictures with captions, as the readers yield them, and how their files are opened."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from PIL import Image

from data_pipelines.errors import BadSample

MAX_PIXELS = 50_000_000
MIN_EDGE = 32  # smaller pictures are buttons and bullets
MAX_EDGE = 1024  # larger pictures are downscaled


@dataclasses.dataclass(frozen=True)
class Pair:
    """A picture (file or image) and its descriptions.

    Attributes:
      caption: the best available description.
      alt: a poorer description, as on web pages; empty = the caption is used.
      group: pictures of one group are on the same side of the held-out split.
      translations: the caption in other languages, by English name of the language.
    """

    picture: Path | Image.Image
    caption: str
    alt: str = ""
    origin: str = ""
    group: str = ""
    translations: Mapping[str, str] = dataclasses.field(default_factory=dict)


def open_picture(picture: Path | Image.Image) -> Image.Image:
    """The picture in RGB or, where it has transparency, RGBA.

    Raises BadSample: "unreadable", "image_too_large", "image_too_small".
    """
    if isinstance(picture, Image.Image):
        return picture
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            file = Image.open(picture)
        with file as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSample("image_too_large", picture.name, f"{image.width}x{image.height}")
            if min(image.size) < MIN_EDGE:
                raise BadSample("image_too_small", picture.name, f"{image.width}x{image.height}")
            return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample("unreadable", picture.name, str(error)) from None


def on_white(image: Image.Image) -> Image.Image:
    """RGB, with transparency composited on white."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def open_pairs(pairs: Iterable[Pair], skipped: Counter[str]) -> Iterator[tuple[int, Pair, Image.Image]]:
    """(number, pair, RGB image of at most ``MAX_EDGE`` pixels per edge) of every pair; bad pictures are counted."""
    for number, pair in enumerate(pairs):
        try:
            image = on_white(open_picture(pair.picture))
        except BadSample as error:
            skipped[error.reason] += 1
            continue
        image.thumbnail((MAX_EDGE, MAX_EDGE))
        yield number, pair, image
