"""Composes detection, OCR and instruction samples out of real pictures and real sentences.

Stamps (cut-out pictures with names) are pasted on photographs, so that every box is exact; sentences are drawn in
lines, so that every letter is known. Each sample is a function of its own random generator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.errors import BadSample
from data_pipelines.recipes.demo.scenes import NUMBERS, boxes_text
from data_pipelines.recipes.real.readers import Pair, on_white, open_picture

SIZES = ((448, 448), (672, 448), (448, 672), (896, 448))  # width, height: grids of 448-pixel tiles and between
DETECTION_PROMPT = "detect the objects in the image and give their boxes"
OCR_PROMPT = "read the text in the image"
_WALLPAPER_EDGE = 1400
_MIN_SHARE, _MAX_SHARE = 0.15, 0.4  # longer edge of a stamp, of the picture's shorter edge


@dataclasses.dataclass(frozen=True)
class Placed:
    """A stamp on a picture: its name and its box (x1, y1, x2, y2) on a scale of 0 to 1000."""

    label: str
    box: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Collage:
    image: Image.Image
    placed: tuple[Placed, ...]  # in reading order


class Composer:
    """Makes collages and pages of text.

    Args:
      stamps: cut-outs with names; those that cannot be read are left out.
      wallpapers: files of photographs; empty = plain colours.
      sentences: lines of English to be drawn.
    """

    def __init__(self, stamps: Sequence[Pair], wallpapers: Sequence[Path], sentences: Sequence[str]) -> None:
        self.wallpapers, self.sentences = wallpapers, sentences
        self.stamps: list[tuple[str, Image.Image]] = []
        for pair in stamps:
            with contextlib.suppress(BadSample):
                self.stamps.append((label(pair), _stamp(pair.picture)))

    def collage(self, rng: np.random.Generator) -> Collage:
        """One to five stamps, none covering another, on a cut-out of a wallpaper."""
        width, height = SIZES[int(rng.integers(len(SIZES)))]
        image = self._background(rng, width, height)
        boxes: list[tuple[int, int, int, int]] = []
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
        scale_to = 1000 / np.array([width, height, width, height])
        placed = [
            Placed(name, tuple(int(v) for v in np.rint(box * scale_to)))  # type: ignore[arg-type]
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

    def page(self, rng: np.random.Generator) -> tuple[Image.Image, str]:
        """One to eight lines of a sentence in one size and colour, and the text with its line breaks."""
        width, height = SIZES[int(rng.integers(len(SIZES)))]
        dark = bool(rng.integers(5))  # dark on light four times out of five
        shades = (rng.integers(200, 256, size=3), rng.integers(0, 90, size=3))
        paper, ink = (tuple(int(v) for v in shade) for shade in (shades if dark else shades[::-1]))
        image = Image.new("RGB", (width, height), paper)
        font = ImageFont.load_default(int(rng.integers(18, 49)))
        assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels come with FreeType
        words = self.sentences[int(rng.integers(len(self.sentences)))].split()
        margin = 20
        most = min(8, int((height - 2 * margin) / (1.3 * font.size)))
        lines = _wrapped(words, font, width - 2 * margin, most)
        text = "\n".join(lines)
        if not text:
            raise BadSample("text_too_wide", detail=words[0])
        y = int(rng.integers(margin, max(margin + 1, height - margin - int(len(lines) * font.size * 1.3))))
        ImageDraw.Draw(image).multiline_text((margin, y), text, fill=ink, font=font, spacing=font.size * 0.15)
        return image, text


def _wrapped(words: Sequence[str], font: ImageFont.FreeTypeFont, width: float, most: int) -> list[str]:
    """At most ``most`` lines that are no wider than ``width``; ends before a word that is wider alone."""
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
        if len(lines) == most or font.getlength(word) > width:
            return lines
    return [*lines, line] if line else lines


def label(pair: Pair) -> str:
    """Short name of a stamp: the first words of its caption, without article."""
    text = re.split(r"[.,:;!?(]", pair.caption.removeprefix("an emoji of "))[0].strip()
    text = re.sub(r"^(?:an?|the|some|this is an?)\s+", "", text, flags=re.IGNORECASE)
    return text[:1].lower() + text[1:]


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _stamp(picture: Path | Image.Image) -> Image.Image:
    """RGBA cut to what can be seen, no larger than it is ever pasted. Raises BadSample ("unreadable")."""
    image = open_picture(picture).convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
    if box is None:
        raise BadSample("unreadable", detail="nothing to be seen")
    image = image.crop(box)
    edge = round(_MAX_SHARE * max(min(size) for size in SIZES))
    image.thumbnail((edge, edge))
    return image


@functools.lru_cache(maxsize=128)
def _wallpaper(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.draft("RGB", (_WALLPAPER_EDGE, _WALLPAPER_EDGE))
        reduced = on_white(image.convert("RGBA") if image.has_transparency_data else image.convert("RGB"))
    reduced.thumbnail((_WALLPAPER_EDGE, _WALLPAPER_EDGE))
    return reduced


def detection_answer(collage: Collage) -> str:
    return boxes_text([(placed.label, placed.box) for placed in collage.placed])


def collage_turns(collage: Collage, others: Sequence[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Two to four questions about a collage; ``others`` are names that may be asked for in vain."""
    names = list(dict.fromkeys(p.label for p in collage.placed))
    turns = [("What objects were put on the picture?", f"{', '.join(names)}."), *short_turns(collage, others, rng)]
    if single := _named_once(collage):
        chosen = single[int(rng.integers(len(single)))]
        turns.append((f"Where is the <ref>{chosen.label}</ref>?", boxes_text([(chosen.label, chosen.box)])))
    return [turns[int(i)] for i in rng.permutation(len(turns))[:4]]


def short_turns(collage: Collage, others: Sequence[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """The questions about a collage that have one short right answer."""
    names = {p.label for p in collage.placed}
    turns = [("How many objects were put on it?", f"{NUMBERS[len(collage.placed)].capitalize()}.")]
    absent = str(others[int(rng.integers(len(others)))])
    asked, answer = (absent, "No.") if rng.integers(2) and absent not in names else (collage.placed[0].label, "Yes.")
    turns.append((f"Is this among them: {asked}?", answer))
    single = _named_once(collage)
    if len(single) > 1:
        a, b = (single[int(i)] for i in rng.choice(len(single), size=2, replace=False))
        left = a if a.box[0] + a.box[2] < b.box[0] + b.box[2] else b
        turns.append((f"Which is further to the left, the {a.label} or the {b.label}?", f"The {left.label}."))
    return turns


def _named_once(collage: Collage) -> list[Placed]:
    labels = [p.label for p in collage.placed]
    return [p for p in collage.placed if labels.count(p.label) == 1]
