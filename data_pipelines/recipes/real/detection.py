"""Detection (S1.3): collages of stamps (cut-out pictures with names) on photographs, so that every box is exact.

The stamps come from tuxpaint (GPL-2), the photographs are wallpapers of Plasma (GPL-2+) and MATE (GPL-2+,
CC-BY-SA-4.0).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.errors import BadSample
from data_pipelines.recipes.conversations import Box, boxes_text
from data_pipelines.recipes.parts import Counts, sample_rng
from data_pipelines.recipes.real.catalogue import PICTURE_SIZES, Options, Recipe, is_heldout
from data_pipelines.recipes.real.readers.clipart import read_tuxpaint
from data_pipelines.recipes.real.readers.pictures import MAX_PIXELS, Pair, on_white, open_picture
from data_pipelines.recipes.shard_writer import ShardWriter, encode_image

PROMPT = "detect the objects in the image and give their boxes"
_WALLPAPER_EDGE = 1400
_MIN_SHARE, _MAX_SHARE = 0.15, 0.4  # longer edge of a stamp as a share of the picture's shorter edge


def _write_detection(options: Options, folder: Path, roots: list[Path]) -> Counts:
    composer = package_composer(roots)
    with ShardWriter(folder) as writer:
        for index in range(options.count(options.detection)):
            collage = composer.collage(sample_rng(options.seed, "detection", index))
            answer = boxes_text((placed.label, placed.box) for placed in collage.placed)
            image = encode_image(collage.image, quality=90)
            writer.write(image, answer, size=collage.image.size, url="tuxpaint on wallpapers")
    return {"pairs": writer.samples}


@dataclasses.dataclass(frozen=True)
class Placed:
    """A stamp on a picture."""

    label: str
    box: Box


@dataclasses.dataclass(frozen=True)
class Collage:
    """An RGB picture and the stamps on it, from top to bottom."""

    image: Image.Image
    placed: tuple[Placed, ...]


class CollageComposer:
    """Composes collages.

    Args:
      stamps: cut-outs with names; those that cannot be read are left out.
      wallpapers: files of photographs; empty = plain colours.
    """

    def __init__(self, stamps: Sequence[Pair], wallpapers: Sequence[Path]) -> None:
        self.wallpapers = wallpapers
        self.stamps: list[tuple[str, Image.Image]] = []
        for pair in stamps:
            with contextlib.suppress(BadSample):
                self.stamps.append((stamp_name(pair), _stamp(pair.picture)))

    def collage(self, rng: np.random.Generator) -> Collage:
        """One to five stamps, none covering another, on a crop of a wallpaper."""
        width, height = PICTURE_SIZES[int(rng.integers(len(PICTURE_SIZES)))]
        image = self._background(rng, width, height)
        boxes: list[Box] = []  # in pixels
        labels: list[str] = []
        for _ in range(int(rng.integers(1, 6))):
            name, stamp = self.stamps[int(rng.integers(len(self.stamps)))]
            scale = rng.uniform(_MIN_SHARE, _MAX_SHARE) * min(width, height) / max(stamp.size)
            stamp = stamp.resize((max(8, round(stamp.width * scale)), max(8, round(stamp.height * scale))))
            for _ in range(20):
                x, y = int(rng.integers(width - stamp.width + 1)), int(rng.integers(height - stamp.height + 1))
                box = (x, y, x + stamp.width, y + stamp.height)
                if not any(_overlap(box, other) for other in boxes):
                    image.paste(stamp, (x, y), stamp.getchannel("A"))
                    boxes.append(box)
                    labels.append(name)
                    break
        to_thousandths = 1000 / np.array([width, height, width, height])
        placed = [
            Placed(name, tuple(int(v) for v in np.rint(box * to_thousandths)))  # type: ignore[arg-type]
            for name, box in zip(labels, boxes, strict=True)
        ]
        return Collage(image, tuple(sorted(placed, key=lambda p: (p.box[1], p.box[0]))))

    def _background(self, rng: np.random.Generator, width: int, height: int) -> Image.Image:
        if not self.wallpapers:
            return Image.new("RGB", (width, height), tuple(int(v) for v in rng.integers(150, 256, size=3)))
        paper = _wallpaper(self.wallpapers[int(rng.integers(len(self.wallpapers)))])
        share = rng.uniform(0.5, 1.0) * min(paper.width / width, paper.height / height)
        w, h = int(width * share), int(height * share)
        x, y = int(rng.integers(paper.width - w + 1)), int(rng.integers(paper.height - h + 1))
        return paper.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))


def stamp_name(pair: Pair) -> str:
    """Short name of a stamp: the first words of its caption, without the article."""
    text = re.split(r"[.,:;!?(]", pair.caption.removeprefix("an emoji of "))[0].strip()
    text = re.sub(r"^(?:an?|the|some|this is an?)\s+", "", text, flags=re.IGNORECASE)
    return text[:1].lower() + text[1:]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _stamp(picture: Path | Image.Image) -> Image.Image:
    """RGBA cropped to the visible part, no larger than it is ever pasted. Raises BadSample ("unreadable")."""
    image = open_picture(picture).convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
    if box is None:
        raise BadSample("unreadable", detail="nothing is visible")
    image = image.crop(box)
    edge = round(_MAX_SHARE * max(min(size) for size in PICTURE_SIZES))
    image.thumbnail((edge, edge))
    return image


@functools.lru_cache(maxsize=128)
def _wallpaper(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.draft("RGB", (_WALLPAPER_EDGE, _WALLPAPER_EDGE))
        reduced = on_white(image.convert("RGBA") if image.has_transparency_data else image.convert("RGB"))
    reduced.thumbnail((_WALLPAPER_EDGE, _WALLPAPER_EDGE))
    return reduced


def package_composer(roots: Sequence[Path]) -> CollageComposer:
    """Stamps of the first package (training split, short names only), and wallpapers of the other packages."""
    stamps = [
        pair
        for pair in read_tuxpaint(roots[0])
        if not is_heldout(pair.group) and 1 <= len(stamp_name(pair).split()) <= 3
    ]
    pictures = [path for root in roots[1:] for path in sorted(root.rglob("*")) if path.suffix in (".jpg", ".png")]
    return CollageComposer(stamps, [path for path in pictures if not path.is_symlink() and _is_photograph(path)])


def _is_photograph(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return min(image.size) >= 700 and image.width * image.height <= MAX_PIXELS
    except OSError:
        return False


RECIPES: dict[str, Recipe] = {"detection": _write_detection}
